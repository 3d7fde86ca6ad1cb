"""Small helpers with which the passes walk a graph. They only look; nothing here changes a graph."""

import math
from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs


class Mismatch(Exception):
    """The subgraph around an anchor cannot be replaced; the message says why."""


def describe(node: gs.Node | None) -> str:
    return f"{node.op} '{node.name}'" if node is not None else "a graph input or constant"


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes `tensor`; None for graph inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def only_consumer(tensor: gs.Tensor) -> gs.Node:
    if len(tensor.outputs) != 1:
        users = ", ".join(describe(node) for node in tensor.outputs) or "nothing"
        raise Mismatch(f"tensor '{tensor.name}' should have one consumer, it feeds {users}")
    return tensor.outputs[0]


def require_op(node: gs.Node | None, op: str, where: str) -> gs.Node:
    if node is None or node.op != op:
        raise Mismatch(f"expected {op} {where}, found {describe(node)}")
    return node


def shape(tensor: gs.Tensor) -> tuple[int | str, ...]:
    """The inferred shape; equal symbols are equal sizes. Raises Mismatch where it is not known."""
    if tensor.shape is None:
        raise Mismatch(f"the shape of tensor '{tensor.name}' is not known")
    return tuple(tensor.shape)


def last_axis(node: gs.Node) -> bool:
    """Whether a Softmax or LayerNormalization works on the last axis (alone)."""
    return node.attrs.get("axis", -1) in (-1, len(shape(node.inputs[0])) - 1)


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant of one element, else None."""
    if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) == 1:
        return float(tensor.values.item())
    return None


def split_scalar(node: gs.Node | None) -> tuple[gs.Tensor, float] | None:
    """(x, factor) of `Mul(x, c)`, `Mul(c, x)` or `Div(x, c)` with a scalar constant, None of other nodes."""
    if node is None or node.op not in ("Mul", "Div"):
        return None
    left, right = node.inputs
    if (c := scalar(right)) is not None:
        return left, c if node.op == "Mul" else 1 / c
    if node.op == "Mul" and (c := scalar(left)) is not None:
        return right, c
    return None


def split_bias(node: gs.Node | None) -> tuple[gs.Tensor, gs.Constant] | None:
    """(x, b) of `Add(x, b)` or `Add(b, x)` with a constant vector as long as x's last axis."""
    if node is None or node.op != "Add":
        return None
    for x, bias in (node.inputs, reversed(node.inputs)):
        if isinstance(bias, gs.Constant) and len(bias.shape) == 1 and tuple(bias.shape) == shape(x)[-1:]:
            return x, bias
    return None


def bias_or_zeros(bias: gs.Constant | None, weight: gs.Constant) -> np.ndarray:
    """The bias [out] of a product with a weight [in, out]; zeros of the weight's type where it has none."""
    return np.zeros(weight.shape[1], weight.values.dtype) if bias is None else bias.values


def close(value: float, expected: float, dtype: np.dtype | int) -> bool:
    """Whether `value`, read from a graph of this type, is `expected` up to the roundings of two factors."""
    # graphsurgeon names the types that NumPy lacks by ONNX's number.
    numpy_dtype = ml_dtypes.bfloat16 if dtype == onnx.TensorProto.BFLOAT16 else dtype
    return math.isclose(value, expected, rel_tol=2 * float(ml_dtypes.finfo(numpy_dtype).eps))


def require_private(graph: gs.Graph, nodes: Iterable[gs.Node], outputs: Iterable[gs.Tensor]) -> None:
    """Prove that `nodes` can go: of their tensors only `outputs` are used elsewhere or leave the graph."""
    inside = {id(node) for node in nodes}
    staying = {tensor.name for tensor in outputs}
    graph_outputs = {tensor.name for tensor in graph.outputs}
    for node in nodes:
        for tensor in node.outputs:
            if tensor.name in staying:
                continue
            if tensor.name in graph_outputs:
                raise Mismatch(f"interior tensor '{tensor.name}' is an output of the graph")
            for user in tensor.outputs:
                if id(user) not in inside:
                    raise Mismatch(f"interior tensor '{tensor.name}' is also used by {describe(user)}")
