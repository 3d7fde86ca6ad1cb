"""Self-attention of the encoder: every row attends to all rows of its image."""

from collections.abc import Collection

import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import ENCODER_ATTENTION
from graph_surgery.passes.attention import match_attention, pack_projections
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import Mismatch


class EncoderAttentionPass(FusionPass):
    """Three projections, split into heads, attention, merge -> one projection and one fused op."""

    op = ENCODER_ATTENTION
    anchors = frozenset({"Softmax"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        return {"encoder": spec.encoder.num_hidden_layers}

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        attention = match_attention(anchor)
        if not (attention.query.from_rows and attention.key.from_rows and attention.value.from_rows):
            raise Mismatch("queries, keys and values are not all projections of this graph's rows")
        qkv, projection = pack_projections(anchor, attention.query, attention.key, attention.value)
        fused = self.fused_node(
            anchor, [qkv], [attention.context], attention.all_nodes, num_heads=attention.query.num_heads
        )
        return [*projection, fused]
