"""Linear layers of pre-LN encoder layers, and what is around them: LayerNorm, bias, activation, residual."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fused_ops import (
    LAYER_NORM_LINEAR,
    LINEAR_RESIDUAL,
    ROW_STATISTICS,
    STATISTICS_WIDTH,
)
from graph_surgery.passes.attention import Projection, trace_projection
from graph_surgery.passes.base import FusionPass, NewNode, named_after
from graph_surgery.passes.bias_activation import match_erf_gelu
from graph_surgery.passes.layernorm import ONNX_DEFAULT_EPSILON
from graph_surgery.passes.matching import (
    Mismatch,
    bias_or_zeros,
    describe,
    last_axis,
    producer,
    shape,
    split_bias,
    split_scalar,
)

PRODUCTS_WITH_PACKED_QKV = 4  # QKV, projection, FC1, FC2
PRODUCTS = 6  # queries, keys and values apart


@dataclass
class Product:
    """`activation(x @ weight (+ bias))` of a LayerNormalization's output x; `nodes` lie between x and y."""

    matmul: gs.Node
    weight: gs.Constant
    bias: gs.Constant | None
    activation: str
    y: gs.Tensor
    nodes: list[gs.Node]


class LinearPass(FusionPass):
    """Around each LayerNormalization: the product and residual before it, and the products after it.

    What normalises reads the statistics that the product before it wrote; for the input of the first layer
    an op of its own takes them. gamma and beta are folded into weight and bias. The last LayerNormalization
    stays, for no product follows it.
    """

    op = LAYER_NORM_LINEAR
    anchors = frozenset({"LayerNormalization"})

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        encoder = spec.encoder
        if encoder.hidden_size % STATISTICS_WIDTH or encoder.intermediate_size % STATISTICS_WIDTH:
            return {}  # the kernels' statistics are of 64 columns
        products = PRODUCTS_WITH_PACKED_QKV if "encoder_attention" in fused else PRODUCTS
        return {"encoder": products * encoder.num_hidden_layers}

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        if not last_axis(anchor):
            raise Mismatch(f"it normalises from axis {anchor.attrs['axis']} on, not the last axis alone")
        if any(not output.is_empty() for output in anchor.outputs[1:]):
            raise Mismatch("its mean or deviation is used")
        x, normed = anchor.inputs[0], anchor.outputs[0]
        products = [_match_product(node) for node in normed.outputs if node.op == "MatMul"]
        before = _residual_operands(producer(x))
        if len(products) < len(normed.outputs):
            products = []  # the normalised tensor is needed: only the product before it can be fused
        if not products and before is None:
            raise Mismatch("neither a product and residual before it nor a product after it")
        width = shape(x)[-1]
        if width % STATISTICS_WIDTH:
            raise Mismatch(f"it normalises {width} values, not a multiple of {STATISTICS_WIDTH}")

        statistics = gs.Variable.empty()
        if products:
            name = before[0].nodes[-1].name if before else anchor.name
            statistics = gs.Variable(
                f"{name}_statistics", np.float32, [*shape(x)[:-1], width // STATISTICS_WIDTH, 2]
            )
        new_nodes = []
        if before:
            new_nodes.append(self._linear_residual(*before, x, statistics))
        else:
            new_nodes.append(self.fused_node(anchor, [x], [statistics], [], op=ROW_STATISTICS))
        for product in products:
            replaces = [anchor, *product.nodes] if product is products[0] else product.nodes
            new_nodes.append(self._layer_norm_linear(anchor, product, statistics, replaces))
        return new_nodes

    def _linear_residual(
        self, product: Projection, residual: gs.Tensor, y: gs.Tensor, statistics: gs.Variable
    ) -> NewNode:
        matmul = product.nodes[-1]
        weight = product.weight.values.T
        outputs, inputs = weight.shape
        _require_sizes(matmul, inputs, outputs)
        bias = bias_or_zeros(product.bias, product.weight)
        return self.fused_node(
            matmul,
            [
                product.x,
                named_after(matmul.name, "weight", np.ascontiguousarray(weight)),
                named_after(matmul.name, "bias", bias.astype(np.float32)),
                residual,
            ],
            [y, statistics],
            [producer(y), *product.nodes],
            op=LINEAR_RESIDUAL,
            emit_statistics=int(not statistics.is_empty()),
        )

    def _layer_norm_linear(
        self, norm: gs.Node, product: Product, statistics: gs.Variable, replaces: list[gs.Node]
    ) -> NewNode:
        x, *affine = norm.inputs
        gamma, beta = (*affine, None)[:2]
        if not all(isinstance(tensor, gs.Constant) for tensor in affine):
            raise Mismatch("its gamma or beta is not constant")
        inputs, outputs = product.weight.shape
        _require_sizes(product.matmul, inputs, outputs)

        # In float64, and rounded once. The sums are those of the rounded weights: so the mean of x cancels.
        wide_weight = product.weight.values.astype(np.float64)
        folded = wide_weight * gamma.values.astype(np.float64)[:, None]
        weight = np.ascontiguousarray(folded.T).astype(product.weight.values.dtype)
        weight_sum = weight.astype(np.float64).sum(axis=1)
        if not np.isfinite(weight_sum).all():
            raise Mismatch(f"gamma times the weight of {describe(product.matmul)} overflows {weight.dtype}")
        bias = bias_or_zeros(product.bias, product.weight).astype(np.float64)
        if beta is not None:
            bias = bias + beta.values.astype(np.float64) @ wide_weight
        return self.fused_node(
            product.matmul,
            [
                x,
                statistics,
                named_after(product.matmul.name, "weight", weight),
                named_after(product.matmul.name, "weight_sum", weight_sum.astype(np.float32)),
                named_after(product.matmul.name, "bias", bias.astype(np.float32)),
            ],
            [product.y],
            replaces,
            op=LAYER_NORM_LINEAR,
            epsilon=float(norm.attrs.get("epsilon", ONNX_DEFAULT_EPSILON)),
            activation=product.activation,
        )


def _residual_operands(add: gs.Node | None) -> tuple[Projection, gs.Tensor] | None:
    """(product, residual) of an Add of a linear layer's output and another tensor of its shape."""
    if add is None or add.op != "Add" or shape(add.inputs[0]) != shape(add.inputs[1]):
        return None
    for rows, residual in (add.inputs, reversed(add.inputs)):
        try:
            return trace_projection(rows), residual
        except Mismatch:
            continue
    return None


def _match_product(matmul: gs.Node) -> Product:
    weight = matmul.inputs[1]
    if not isinstance(weight, gs.Constant) or len(weight.shape) != 2:
        raise Mismatch(f"{describe(matmul)} after it has no constant weight [in, out]")
    y, nodes = matmul.outputs[0], [matmul]
    bias = None
    if len(y.outputs) == 1 and (biased := split_bias(y.outputs[0])) is not None:
        bias = biased[1]
        nodes.append(y.outputs[0])
        y = y.outputs[0].outputs[0]
    activation, y, activation_nodes = _match_activation(y)
    return Product(matmul, weight, bias, activation, y, nodes + activation_nodes)


def _match_activation(x: gs.Tensor) -> tuple[str, gs.Tensor, list[gs.Node]]:
    """What is applied to x (gelu, relu, or none that the op has), its result, and its nodes."""
    if len(x.outputs) == 1:
        (node,) = x.outputs
        if node.op == "Relu":
            return "relu", node.outputs[0], [node]
        if node.op == "Gelu" and node.attrs.get("approximate", "none") == "none":
            return "gelu", node.outputs[0], [node]
    erfs = [
        user
        for node in x.outputs
        if split_scalar(node)
        for user in node.outputs[0].outputs
        if user.op == "Erf"
    ]
    for erf in erfs:
        try:
            biased, y, nodes = match_erf_gelu(erf)
        except Mismatch:
            continue
        if biased is x:
            return "gelu", y, nodes
    return "none", x, []


def _require_sizes(matmul: gs.Node, inputs: int, outputs: int) -> None:
    if inputs % STATISTICS_WIDTH or outputs % STATISTICS_WIDTH:
        raise Mismatch(
            f"{describe(matmul)} has a weight [{inputs}, {outputs}], "
            f"sizes that are not both multiples of {STATISTICS_WIDTH}"
        )
