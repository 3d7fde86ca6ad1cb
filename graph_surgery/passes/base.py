"""What all passes share: trying every anchor, proving that the match is safe, and exchanging nodes."""

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import DOMAIN, FusedOp
from graph_surgery.passes.matching import Mismatch, require_private


@dataclass
class NewNode:
    """A node to be, and the nodes that it makes superfluous."""

    op: str
    name: str
    inputs: list[gs.Tensor]
    outputs: list[gs.Tensor]
    replaces: list[gs.Node]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str | None = None


@dataclass
class PassReport:
    """What a pass did to one graph.

    fused: names of the fused nodes.
    replaced: for every new node (the fused ones and packed projections) the names of the stock nodes it
    stands for.
    rejected: for every anchor left alone (by name) the reason.
    """

    fused: list[str] = field(default_factory=list)
    replaced: dict[str, list[str]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


class FusionPass(ABC):
    """Replaces every occurrence of one subgraph by one fused op.

    op: the op it puts there; its plugin's other ops, if any, come with it.
    anchors: the ONNX operators around which it looks for the subgraph.
    """

    op: ClassVar[FusedOp]
    anchors: ClassVar[frozenset[str]]

    def for_model(self, spec: ModelSpec) -> "FusionPass":
        """The pass for one model: another one where it depends on more than the graph."""
        return self

    @abstractmethod
    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        """How many fused nodes the pass puts into each of a model's graphs, after the passes `fused`.

        A graph that is not named is not searched. A node that replaces no stock node does not count.
        """

    @abstractmethod
    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        """The nodes to put in place of the subgraph around `anchor`. Changes nothing.

        Raises Mismatch where the subgraph is another one than the op computes.
        """

    def finish(self, graph: gs.Graph) -> None:  # noqa: B027 - most passes have nothing left to do
        """Called once on a graph in which the pass has fired."""

    def run(self, graph: gs.Graph) -> PassReport:
        """Fuse wherever it is right. `graph` needs inferred shapes (fuse.import_graph)."""
        report = PassReport()
        for anchor in [node for node in graph.nodes if node.op in self.anchors]:
            if not anchor.outputs:
                continue  # it went with an earlier anchor
            try:
                new_nodes = self.match(graph, anchor)
                require_private(
                    graph,
                    [node for new in new_nodes for node in new.replaces],
                    [tensor for new in new_nodes for tensor in new.outputs],
                )
            except Mismatch as mismatch:
                report.rejected[anchor.name] = str(mismatch)
                continue
            for new in new_nodes:
                report.replaced[new.name] = [node.name for node in new.replaces]
                _exchange(graph, new)
                if new.domain == DOMAIN and new.replaces:
                    report.fused.append(new.name)
        graph.cleanup().toposort()
        if report.fused:
            self.finish(graph)
        return report

    def fused_node(
        self,
        anchor: gs.Node,
        inputs: list[gs.Tensor],
        outputs: list[gs.Tensor],
        replaces: list[gs.Node],
        op: FusedOp | None = None,
        **attributes: int | float | str,
    ) -> NewNode:
        """A node of `op` (by default the pass's), named after its module: /layers.3/attention/TrOCR..."""
        op = op or self.op
        return NewNode(
            op=op.name,
            name=sibling_name(anchor, op.name),
            inputs=inputs,
            outputs=outputs,
            replaces=replaces,
            attributes=op.node_attributes(**attributes),
            domain=DOMAIN,
        )


def sibling_name(node: gs.Node, name: str) -> str:
    """A name beside `node` in the module tree of the exporter's node names."""
    return posixpath.join(posixpath.dirname(node.name), name)


def named_after(node_name: str, name: str, values: np.ndarray) -> gs.Constant:
    """A constant named as PyTorch names weights: layers.3.attention.o_proj.MatMul.weight."""
    return gs.Constant(f"{node_name.strip('/').replace('/', '.')}.{name}", values)


def _exchange(graph: gs.Graph, new: NewNode) -> None:
    for node in new.replaces:
        node.inputs.clear()
        node.outputs.clear()
    graph.nodes.append(
        gs.Node(new.op, new.name, dict(new.attributes), list(new.inputs), list(new.outputs), new.domain)
    )
