"""What the three attention passes share: from a Softmax to the heads of queries, keys and values."""

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graph_surgery.passes.base import NewNode, named_after, sibling_name
from graph_surgery.passes.matching import (
    Mismatch,
    bias_or_zeros,
    close,
    describe,
    last_axis,
    only_consumer,
    producer,
    require_op,
    shape,
    split_bias,
    split_scalar,
)


@dataclass
class Heads:
    """A tensor of attention heads traced back to where it comes from.

    source: rows [B, S, H*d] if `from_rows`, else heads [B, H, S, d].
    transposed: the tensor is [B, H, d, S], else [B, H, S, d].
    scale: product of the scalars multiplied in on the way.
    nodes: all nodes between source and tensor.
    """

    source: gs.Tensor
    from_rows: bool
    transposed: bool
    scale: float
    num_heads: int
    head_dim: int
    nodes: list[gs.Node]


@dataclass
class Attention:
    """softmax(query @ key^T / sqrt(d)) @ value; `nodes` lie between heads and `context` rows."""

    query: Heads
    key: Heads
    value: Heads
    context: gs.Tensor
    nodes: list[gs.Node]

    @property
    def all_nodes(self) -> list[gs.Node]:
        return [*self.query.nodes, *self.key.nodes, *self.value.nodes, *self.nodes]


@dataclass
class Projection:
    """`x @ weight (+ bias)` with constant weight [in, out] and bias [out]."""

    x: gs.Tensor
    weight: gs.Constant
    bias: gs.Constant | None
    nodes: list[gs.Node]


def match_attention(softmax: gs.Node) -> Attention:
    """Match unmasked attention scaled by 1/sqrt(d): on the queries, on the keys, or after the product."""
    if not last_axis(softmax):
        raise Mismatch(f"the softmax is over axis {softmax.attrs['axis']}, not over the last one, the keys")
    nodes = [softmax]
    scale = 1.0
    scores = softmax.inputs[0]
    while (scaled := split_scalar(producer(scores))) is not None:
        nodes.append(producer(scores))
        scores, factor = scaled
        scale *= factor
    product = producer(scores)
    if product is not None and product.op in ("Add", "Where"):
        raise Mismatch(f"{describe(product)} before the softmax looks like a mask, and the op has none")
    require_op(product, "MatMul", "of queries and keys before the softmax")
    nodes.append(product)

    query, key = (trace_heads(tensor) for tensor in product.inputs)
    mix = require_op(
        only_consumer(softmax.outputs[0]), "MatMul", "of probabilities and values after the softmax"
    )
    if mix.inputs[0] is not softmax.outputs[0]:
        raise Mismatch(f"the probabilities are the second operand of {describe(mix)}")
    value = trace_heads(mix.inputs[1])
    nodes.append(mix)
    if (query.transposed, key.transposed, value.transposed) != (False, True, False):
        raise Mismatch(
            "the products are not those of attention, "
            "[B, H, Q, d] x [B, H, d, S] and [B, H, Q, S] x [B, H, S, d]"
        )
    if len({(heads.num_heads, heads.head_dim) for heads in (query, key, value)}) != 1:
        raise Mismatch("queries, keys and values are not split into the same heads")

    scale *= query.scale * key.scale
    expected = 1 / math.sqrt(query.head_dim)
    if not close(scale, expected, scores.dtype):
        raise Mismatch(f"the scale is {scale:.6g}, not 1/sqrt(head_dim) = {expected:.6g}")
    if value.scale != 1:
        raise Mismatch(f"the values are scaled by {value.scale:.6g}")

    context, merge = _merge_heads(mix.outputs[0])
    return Attention(query, key, value, context, nodes + merge)


def trace_heads(tensor: gs.Tensor) -> Heads:
    """Trace heads [B, H, S, d] or [B, H, d, S] back through scalars, transposes, and the split of rows."""
    if len(shape(tensor)) != 4:
        raise Mismatch(
            f"tensor '{tensor.name}' has shape {list(shape(tensor))}, expected four axes [B, H, S, d]"
        )
    nodes: list[gs.Node] = []
    scale = 1.0
    axes = [0, 1, 2, 3]  # where the axes of the given tensor are in `source`
    source = tensor
    num_heads = head_dim = None
    while (node := producer(source)) is not None:
        if (scaled := split_scalar(node)) is not None:
            scale *= scaled[1]
        elif node.op == "Transpose" and num_heads is None:
            permutation = node.attrs["perm"]
            axes = [permutation[axis] for axis in axes]
        elif num_heads is None and (split := _split_of_rows(node)) is not None:
            num_heads, head_dim, rows_first = split
            if rows_first:  # [B, S, H, d]: the axes of [B, H, S, d] are at 0, 2, 1, 3
                axes = [(0, 2, 1, 3)[axis] for axis in axes]
        else:
            break
        nodes.append(node)
        source = scaled[0] if scaled is not None else node.inputs[0]

    if axes not in ([0, 1, 2, 3], [0, 1, 3, 2]):
        raise Mismatch(f"tensor '{tensor.name}' is not heads [B, H, S, d] or their transpose [B, H, d, S]")
    from_rows = num_heads is not None
    if not from_rows:
        _, num_heads, _, head_dim = shape(source)
    if not isinstance(num_heads, int) or not isinstance(head_dim, int):
        raise Mismatch(f"number and size of the heads of '{tensor.name}' are not constant")
    return Heads(source, from_rows, axes == [0, 1, 3, 2], scale, num_heads, head_dim, nodes)


def _split_of_rows(node: gs.Node) -> tuple[int, int, bool] | None:
    """How the node splits rows [B, S, H*d] into heads, if it does.

    (H, d, True) for heads [B, S, H, d], (H, d, False) for [B, H, 1, d].
    """
    if node.op != "Reshape":
        return None
    before, after = shape(node.inputs[0]), shape(node.outputs[0])
    if len(before) != 3 or len(after) != 4 or before[0] != after[0]:
        return None
    _, length, width = before
    if after[1] == length and _product(after[2], after[3]) == width:
        return after[2], after[3], True
    # With one row there is nothing to transpose, and the exporter reshapes directly.
    if length == 1 and after[2] == 1 and _product(after[1], after[3]) == width:
        return after[1], after[3], False
    return None


def _merge_heads(mixed: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]]:
    """From heads [B, H, S, d] to rows [B, S, H*d]: the rows and the nodes on the way."""
    batch, num_heads, length, head_dim = shape(mixed)
    rows_shape = (batch, length, _product(num_heads, head_dim))
    node = only_consumer(mixed)
    nodes = [node]
    if node.op == "Transpose" and node.attrs["perm"] == [0, 2, 1, 3]:
        node = only_consumer(node.outputs[0])
        nodes.append(node)
    elif length != 1:
        raise Mismatch(
            f"expected the transpose of the heads after the values' product, found {describe(node)}"
        )
    require_op(node, "Reshape", "of the heads to rows")
    if shape(node.outputs[0]) != rows_shape:
        raise Mismatch(
            f"the heads are merged to {list(shape(node.outputs[0]))}, expected rows {list(rows_shape)}"
        )
    return node.outputs[0], nodes


def _product(a: int | str, b: int | str) -> int | None:
    return a * b if isinstance(a, int) and isinstance(b, int) else None


def trace_projection(rows: gs.Tensor) -> Projection:
    """Trace rows back to the linear layer that computes them."""
    node = producer(rows)
    nodes = []
    bias = None
    if (biased := split_bias(node)) is not None:
        nodes.append(node)
        rows, bias = biased
        node = producer(rows)
    require_op(node, "MatMul", f"with a weight at '{rows.name}'")
    x, weight = node.inputs
    if not isinstance(weight, gs.Constant) or len(weight.shape) != 2:
        raise Mismatch(f"{describe(node)} has no constant weight [in, out]")
    return Projection(x, weight, bias, [*nodes, node])


def pack_projections(
    softmax: gs.Node, query: Heads, key: Heads, value: Heads
) -> tuple[gs.Variable, list[NewNode]]:
    """One projection to rows [B, S, 3*H*d], laid out as [3, H, d], instead of three of the same input.

    Layers without bias get none; where only some of the three have one, the others' is zero.
    """
    projections = [trace_projection(heads.source) for heads in (query, key, value)]
    x = projections[0].x
    if any(projection.x is not x for projection in projections):
        raise Mismatch("queries, keys and values are projections of different tensors")
    width = query.num_heads * query.head_dim
    dtype = query.source.dtype

    def rows(name: str) -> gs.Variable:
        return gs.Variable(f"{sibling_name(softmax, name)}_output_0", dtype, [*shape(x)[:-1], 3 * width])

    module = sibling_name(softmax, "qkv_proj")
    packed = named_after(
        module, "weight", np.concatenate([projection.weight.values for projection in projections], axis=1)
    )
    matmuls = [projection.nodes[-1] for projection in projections]
    qkv = rows("qkv_proj/MatMul")
    new_nodes = [NewNode("MatMul", sibling_name(softmax, "qkv_proj/MatMul"), [x, packed], [qkv], matmuls)]
    if any(projection.bias is not None for projection in projections):
        biases = [bias_or_zeros(projection.bias, projection.weight) for projection in projections]
        bias = named_after(module, "bias", np.concatenate(biases))
        adds = [node for projection in projections for node in projection.nodes[:-1]]
        biased = rows("qkv_proj/Add")
        new_nodes.append(NewNode("Add", sibling_name(softmax, "qkv_proj/Add"), [qkv, bias], [biased], adds))
        qkv = biased
    return qkv, new_nodes
