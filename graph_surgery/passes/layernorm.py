"""LayerNormalization, with the residual addition before it where there is one."""

from collections.abc import Collection

import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import LAYER_NORM, RESIDUAL_LAYER_NORM
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import Mismatch, last_axis, producer, shape

ONNX_DEFAULT_EPSILON = 1e-5


class LayerNormPass(FusionPass):
    """Add and LayerNormalization -> one fused op; LayerNormalization of anything else -> another.

    A pre-LN layer needs the sum again as its next residual: it becomes the op's second output.
    """

    op = RESIDUAL_LAYER_NORM
    anchors = frozenset({"LayerNormalization"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        # Every encoder layer has two LayerNorms, and after the last comes a final one; all but the first
        # normalise a residual. Every decoder layer has three residuals. The embedding LayerNorm normalises
        # the sum of token and position.
        return {
            # Within the layers `linear` takes them.
            "encoder": 1 if "linear" in fused else 2 * spec.encoder.num_hidden_layers + 1,
            "decoder": 3 * spec.decoder.num_hidden_layers + spec.decoder.layernorm_embedding,
        }

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        if not last_axis(anchor):
            raise Mismatch(f"it normalises from axis {anchor.attrs['axis']} on, not the last axis alone")
        if len(anchor.inputs) != 3:
            raise Mismatch("it has no bias (beta)")
        if any(not output.is_empty() for output in anchor.outputs[1:]):
            raise Mismatch("its mean or deviation is used")
        total, gamma, beta = anchor.inputs
        for weight in (gamma, beta):
            if shape(weight) != shape(total)[-1:]:
                raise Mismatch(
                    f"'{weight.name}' has shape {list(shape(weight))}, expected {list(shape(total)[-1:])}"
                )
        epsilon = float(anchor.attrs.get("epsilon", ONNX_DEFAULT_EPSILON))
        add = producer(total)
        # An addition that broadcasts is no residual.
        if add is None or add.op != "Add" or shape(add.inputs[0]) != shape(add.inputs[1]):
            inputs = [total, gamma, beta]
            return [
                self.fused_node(anchor, inputs, [anchor.outputs[0]], [anchor], op=LAYER_NORM, epsilon=epsilon)
            ]

        x, residual = add.inputs
        emit_sum = len(total.outputs) > 1 or any(total is output for output in graph.outputs)
        fused = self.fused_node(
            anchor,
            [x, residual, gamma, beta],
            # A local function has all its outputs always; an unused one has no name.
            [anchor.outputs[0], total if emit_sum else gs.Variable.empty()],
            [add, anchor],
            epsilon=epsilon,
            emit_sum=int(emit_sum),
        )
        return [fused]
