"""Keys and values of cross-attention: the products of the encoder's states, and their split into heads."""

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import CROSS_KEY_VALUE
from graph_surgery.passes.attention import Heads, trace_heads, trace_projection
from graph_surgery.passes.base import FusionPass, NewNode, named_after
from graph_surgery.passes.matching import Mismatch, bias_or_zeros

KEY, VALUE = ".key", ".value"  # how the names of the graph's outputs end
HEAD_STEP = 8  # the kernels move eight elements of a head at once


class CrossKeyValuePass(FusionPass):
    """Two products of one tensor, their biases and the split of both into heads -> one fused op."""

    op = CROSS_KEY_VALUE
    anchors = frozenset({"Transpose"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        if spec.decoder.head_dim % HEAD_STEP:
            return {}
        return {"cross_kv": spec.decoder.num_hidden_layers}

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        outputs = {tensor.name: tensor for tensor in graph.outputs}
        name = anchor.outputs[0].name
        if name not in outputs or not name.endswith((KEY, VALUE)):
            raise Mismatch(f"'{name}' is no output of keys or values")
        stem = name.removesuffix(KEY).removesuffix(VALUE)
        key, value = outputs.get(stem + KEY), outputs.get(stem + VALUE)
        if key is None or value is None:
            raise Mismatch(f"'{name}' has not both keys and values")
        keys, values = _heads(key), _heads(value)
        if (keys.num_heads, keys.head_dim) != (values.num_heads, values.head_dim):
            raise Mismatch("keys and values are not split into the same heads")
        projections = [trace_projection(heads.source) for heads in (keys, values)]
        if projections[0].x is not projections[1].x:
            raise Mismatch("keys and values are projections of different tensors")
        weights = [projection.weight.values.T for projection in projections]
        biases = [bias_or_zeros(projection.bias, projection.weight) for projection in projections]
        if weights[0].shape[1] % HEAD_STEP:
            raise Mismatch(f"the products are of {weights[0].shape[1]} inputs, not a multiple of {HEAD_STEP}")
        fused = self.fused_node(
            anchor,
            [
                projections[0].x,
                named_after(anchor.name, "weight", np.ascontiguousarray(np.concatenate(weights))),
                named_after(anchor.name, "bias", np.concatenate(biases).astype(np.float32)),
            ],
            [key, value],
            [*keys.nodes, *values.nodes, *projections[0].nodes, *projections[1].nodes],
            num_heads=keys.num_heads,
        )
        return [fused]


def _heads(tensor: gs.Tensor) -> Heads:
    """The heads [B, H, S, d] that `tensor` is, of rows [B, S, H*d]."""
    heads = trace_heads(tensor)
    if not heads.from_rows or heads.transposed or heads.scale != 1:
        raise Mismatch(f"'{tensor.name}' is not the split of rows into heads [B, H, S, d]")
    if heads.head_dim % HEAD_STEP:
        raise Mismatch(f"the heads have {heads.head_dim} elements, not a multiple of {HEAD_STEP}")
    return heads
