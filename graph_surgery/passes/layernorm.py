"""Residual addition and LayerNormalization."""

from collections.abc import Collection

import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import RESIDUAL_LAYER_NORM
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import Mismatch, last_axis, producer, require_op, shape

ONNX_DEFAULT_EPSILON = 1e-5


class LayerNormPass(FusionPass):
    """Add and LayerNormalization -> one fused op.

    A pre-LN layer needs the sum again as its next residual: it becomes the op's second output.
    """

    op = RESIDUAL_LAYER_NORM
    anchors = frozenset({"LayerNormalization"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        # Every encoder layer has two residuals; each is normalised by the LayerNorm after it, the last by the
        # final one. Every decoder layer has three. The embedding LayerNorm normalises the sum of token and
        # position.
        firings = {
            "encoder": 2 * spec.encoder.num_hidden_layers,
            "decoder": 3 * spec.decoder.num_hidden_layers + spec.decoder.layernorm_embedding,
        }
        if "linear" in fused:
            del firings["encoder"]  # its residuals went with the products before them
        return firings

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        if not last_axis(anchor):
            raise Mismatch(f"it normalises from axis {anchor.attrs['axis']} on, not the last axis alone")
        if len(anchor.inputs) != 3:
            raise Mismatch("it has no bias (beta)")
        if any(not output.is_empty() for output in anchor.outputs[1:]):
            raise Mismatch("its mean or deviation is used")
        total, gamma, beta = anchor.inputs
        add = require_op(producer(total), "Add", "of the residual before the LayerNormalization")
        x, residual = add.inputs
        if shape(x) != shape(residual):
            raise Mismatch(f"{list(shape(x))} + {list(shape(residual))} broadcasts, a residual does not")
        for weight in (gamma, beta):
            if shape(weight) != shape(x)[-1:]:
                raise Mismatch(
                    f"'{weight.name}' has shape {list(shape(weight))}, expected {list(shape(x)[-1:])}"
                )

        emit_sum = len(total.outputs) > 1 or any(total is output for output in graph.outputs)
        fused = self.fused_node(
            anchor,
            [x, residual, gamma, beta],
            # A local function has all its outputs always; an unused one has no name.
            [anchor.outputs[0], total if emit_sum else gs.Variable.empty()],
            [add, anchor],
            epsilon=float(anchor.attrs.get("epsilon", ONNX_DEFAULT_EPSILON)),
            emit_sum=int(emit_sum),
        )
        return [fused]
