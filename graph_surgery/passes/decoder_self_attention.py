"""Self-attention of the decoder with its cache: growing (stock) becomes fixed (fused), see docs/design.md."""

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import DECODER_SELF_ATTENTION
from graph_surgery.passes.attention import Attention, Heads, match_attention, pack_projections, trace_heads
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import Mismatch, describe, only_consumer, producer, require_op, shape

POSITION_IDS = "position_ids"
CAPACITY = "capacity"


class DecoderSelfAttentionPass(FusionPass):
    """Three projections, two appends to the cache, attention to all of it -> one projection, one fused op.

    The stock graph appends the new token at the end of the cache, which is row `position_ids` of a fixed one:
    both have the same rows up to there, and the fused op ignores what lies beyond.
    """

    op = DECODER_SELF_ATTENTION
    anchors = frozenset({"Softmax"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        return {"decoder": spec.decoder.num_hidden_layers}

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        attention = match_attention(anchor)
        query = attention.query
        if not query.from_rows or shape(query.source)[1] != 1:
            raise Mismatch(f"the query '{query.source.name}' is not one row [B, 1, H*d]")
        position_ids = _position_ids(graph, shape(query.source)[0])
        past_key, new_key, present_key, key_nodes = _match_append(graph, attention, attention.key)
        past_value, new_value, present_value, value_nodes = _match_append(graph, attention, attention.value)
        qkv, projection = pack_projections(anchor, query, new_key, new_value)
        fused = self.fused_node(
            anchor,
            [qkv, past_key, past_value, position_ids],
            [attention.context, present_key, present_value],
            [*attention.all_nodes, *key_nodes, *value_nodes],
            num_heads=query.num_heads,
        )
        return [*projection, fused]

    def finish(self, graph: gs.Graph) -> None:
        """Past and present of the fused layers now have one capacity."""
        for node in graph.nodes:
            if node.op == self.op.name:
                _, past_key, past_value, _ = node.inputs
                _, present_key, present_value = node.outputs
                for cache in (past_key, past_value, present_key, present_value):
                    batch, heads, _, head_dim = cache.shape
                    cache.shape = [batch, heads, CAPACITY, head_dim]


def _position_ids(graph: gs.Graph, batch: int | str) -> gs.Tensor:
    for tensor in graph.inputs:
        if tensor.name == POSITION_IDS:
            if tensor.dtype != np.int64 or shape(tensor) != (batch, 1):
                raise Mismatch(f"graph input {POSITION_IDS} is not int64 [batch, 1]")
            return tensor
    raise Mismatch(f"the graph has no input {POSITION_IDS}, which says where in the cache the new token goes")


def _match_append(
    graph: gs.Graph, attention: Attention, heads: Heads
) -> tuple[gs.Tensor, Heads, gs.Tensor, list[gs.Node]]:
    """Match Concat(past, new) along the rows: past, new, present and the nodes that make present."""
    if heads.from_rows:
        raise Mismatch(f"'{heads.source.name}' is not appended to a cache")
    append = require_op(producer(heads.source), "Concat", f"of cache and new token at '{heads.source.name}'")
    if append.attrs["axis"] not in (2, -2) or len(append.inputs) != 2:
        raise Mismatch(
            f"Concat '{append.name}' does not append one tensor along axis 2, the rows of the cache"
        )
    past, new = append.inputs
    present = append.outputs[0]
    if not any(past is tensor for tensor in graph.inputs):
        raise Mismatch(f"the cache '{past.name}' is not an input of the graph")
    if not any(present is tensor for tensor in graph.outputs):
        raise Mismatch(f"the longer cache '{present.name}' is not an output of the graph")
    # Fixed, both hold more rows than growing: nothing else may look at them.
    only_consumer(past)
    readers = {id(node) for node in attention.all_nodes}
    for user in present.outputs:
        if id(user) not in readers:
            raise Mismatch(f"the longer cache '{present.name}' is also used by {describe(user)}")
    new_heads = trace_heads(new)
    if not new_heads.from_rows or new_heads.transposed or new_heads.scale != 1:
        raise Mismatch(f"'{new.name}' is not one plain row of heads [B, H, 1, d]")
    return past, new_heads, present, [append, *new_heads.nodes]
