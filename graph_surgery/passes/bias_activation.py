"""Bias and activation of the feed-forward layers."""

import math
from collections.abc import Collection

import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import BIAS_ACTIVATION
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import (
    Mismatch,
    close,
    describe,
    only_consumer,
    producer,
    require_op,
    scalar,
    split_bias,
    split_scalar,
)


class BiasActivationPass(FusionPass):
    """Add of a bias, and Relu, Gelu or the nodes of x * (1 + erf(x / sqrt(2))) / 2 -> one fused op."""

    op = BIAS_ACTIVATION
    anchors = frozenset({"Relu", "Gelu", "Erf"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        firings = {"encoder": spec.encoder.num_hidden_layers, "decoder": spec.decoder.num_hidden_layers}
        if "linear" in fused:
            del firings["encoder"]  # its activations went with the products before them
        return firings

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        if anchor.attrs.get("approximate", "none") != "none":
            raise Mismatch(
                f"it approximates GELU by {anchor.attrs['approximate']}, the op computes the exact one"
            )
        if anchor.op == "Erf":
            biased, y, nodes = match_erf_gelu(anchor)
        else:
            biased, y, nodes = anchor.inputs[0], anchor.outputs[0], [anchor]
        add = require_op(producer(biased), "Add", "of the bias before the activation")
        split = split_bias(add)
        if split is None:
            raise Mismatch(f"{describe(add)} adds no constant bias as long as the last axis")
        x, bias = split
        activation = "relu" if anchor.op == "Relu" else "gelu"
        return [self.fused_node(anchor, [x, bias], [y], [add, *nodes], activation=activation)]


def match_erf_gelu(erf: gs.Node) -> tuple[gs.Tensor, gs.Tensor, list[gs.Node]]:
    """Match x * (1 + erf(x / sqrt(2))) * 0.5, its factors in any order: x, result, and the nodes between."""
    inner = producer(erf.inputs[0])
    split = split_scalar(inner)
    if split is None or not close(split[1], math.sqrt(0.5), erf.inputs[0].dtype):
        raise Mismatch("its operand is not x / sqrt(2)")
    x = split[0]
    shifted = only_consumer(erf.outputs[0])
    if shifted.op != "Add" or 1.0 not in (scalar(tensor) for tensor in shifted.inputs):
        raise Mismatch(f"expected 1 + erf(x / sqrt(2)), found {describe(shifted)}")

    nodes = [inner, erf, shifted]
    product = shifted.outputs[0]
    factor, has_x = 1.0, False
    while not (has_x and factor == 0.5):
        node = only_consumer(product)
        if (scaled := split_scalar(node)) is not None:
            factor *= scaled[1]
        elif node.op == "Mul" and not has_x:
            left, right = node.inputs
            other = right if left is product else left
            if other is not x:  # x may have been halved before
                halved = split_scalar(producer(other))
                if halved is None or halved[0] is not x:
                    raise Mismatch(f"{describe(node)} multiplies by '{other.name}', not by x")
                factor *= halved[1]
                nodes.append(producer(other))
            has_x = True
        else:
            raise Mismatch(f"{describe(node)} is no part of x * (1 + erf(x / sqrt(2))) / 2")
        nodes.append(node)
        product = node.outputs[0]
    return x, product, nodes
