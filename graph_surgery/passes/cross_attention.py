"""Cross-attention of the decoder: one new token attends to the keys and values of the image."""

from collections.abc import Collection

import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import CROSS_ATTENTION
from graph_surgery.passes.attention import match_attention
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import Mismatch, describe, producer, shape

IMAGES = "images"


class CrossAttentionPass(FusionPass):
    """Split of the query into heads, scaled product, softmax, product, merge -> one fused op."""

    op = CROSS_ATTENTION
    anchors = frozenset({"Softmax"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        return {"decoder": spec.decoder.num_hidden_layers}

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        attention = match_attention(anchor)
        query, key, value = attention.query, attention.key, attention.value
        if not query.from_rows or shape(query.source)[1] != 1:
            raise Mismatch(f"the query '{query.source.name}' is not one row [B, 1, H*d]")
        for heads in (key, value):
            if (node := producer(heads.source)) is not None:
                raise Mismatch(
                    f"the keys and values are not inputs of the graph, {describe(node)} computes them"
                )
        fused = self.fused_node(
            anchor,
            [query.source, key.source, value.source],
            [attention.context],
            attention.all_nodes,
            num_heads=query.num_heads,
        )
        return [fused]

    def finish(self, graph: gs.Graph) -> None:
        """The fused op takes the keys and values of an image once for several rows, the beams of a search."""
        for node in graph.nodes:
            if node.op == self.op.name:
                for tensor in node.inputs[1:]:
                    tensor.shape = [IMAGES, *tensor.shape[1:]]
