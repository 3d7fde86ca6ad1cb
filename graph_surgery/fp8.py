"""Fused float16 encoder -> the same encoder with products of 8-bit floating-point numbers (e4m3).

The four products of every layer take e4m3 activations and weights and sum in float32; everything else is as
it was. A tensor, activations or weight, has one scale: its largest magnitude by 448, e4m3's largest number.
Those of the activations are measured beforehand (runtime/calibration.py). The graph's metadata says so:

    trocr.precision  "fp8"
    trocr.ranges     JSON, for every tensor that is quantized the largest magnitude that its scale stands for
"""

import json
import math
import posixpath
from collections import Counter
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.fuse import attach_functions
from graph_surgery.fused_ops import (
    DOMAIN,
    ENCODER_ATTENTION,
    FP8_ENCODER_ATTENTION,
    FP8_LAYER_NORM_LINEAR,
    FP8_LINEAR_RESIDUAL,
    FP8_MAX,
    FP8_OPSET,
    FP8_PLUGINS,
    FP8_ROW_STATISTICS,
    FP8_TYPE,
    FRAGMENT,
    LAYER_NORM_LINEAR,
    LINEAR_RESIDUAL,
    PATCH_EMBEDDING,
    ROW_STATISTICS,
    FusedOp,
    SurgeryError,
)

# Nodes a layer before and after; the products' first inputs are what is quantized.
LAYER = {ENCODER_ATTENTION.name: 1, LAYER_NORM_LINEAR.name: 2, LINEAR_RESIDUAL.name: 2}
PRODUCTS = (LAYER_NORM_LINEAR.name, LINEAR_RESIDUAL.name)

E4M3 = ml_dtypes.float8_e4m3fn


def quantized_tensors(encoder: onnx.ModelProto, spec: ModelSpec) -> list[str]:
    """The tensors [batch, S, width] of a fused float16 encoder whose ranges `quantize_encoder` needs.

    In their order in the graph: the input of the first layer, then of every layer the attention's context,
    the output of the projection, that of FC1 and, but for the last layer's, that of FC2.

    Raises:
        SurgeryError: the graph is another one than the passes `encoder_attention` and `linear` make of a
            float16 encoder of this model.
    """
    _check(encoder, spec)
    return [node.input[0] for node in encoder.graph.node if _is_product(node)]


def quantize_encoder(
    encoder: onnx.ModelProto, spec: ModelSpec, ranges: Mapping[str, float]
) -> onnx.ModelProto:
    """The encoder in fp8; `encoder` itself is left as it is.

    Args:
        encoder: a float16 encoder fused with `encoder_attention` and `linear`.
        ranges: the largest magnitude of each of `quantized_tensors`.

    Raises:
        SurgeryError: see `quantized_tensors`; or a range is missing, or no finite number.
    """
    names = quantized_tensors(encoder, spec)
    _check_ranges(names, ranges)
    scales = {name: scale_of(ranges[name]) for name in names}
    model = onnx.ModelProto()
    model.CopyFrom(encoder)
    renamed = _Rewriting(model, scales).run()

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    replaced = {renamed.get(new, new): stock for new, stock in json.loads(metadata["trocr.replaced"]).items()}
    replaced |= {name: [] for name in renamed.values() if name not in replaced}
    metadata["trocr.precision"] = "fp8"
    metadata["trocr.replaced"] = json.dumps(replaced)
    metadata["trocr.ranges"] = json.dumps({name: float(ranges[name]) for name in names})
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)

    # The standard operators that a fused encoder may still have mean the same in both opsets.
    for entry in model.opset_import:
        if entry.domain == "":
            entry.version = max(entry.version, FP8_OPSET)
    del model.functions[:]
    attach_functions(model)
    return model


def scale_of(largest: float) -> float:
    """The scale of a tensor with this largest magnitude, as float32 holds it; of a tensor of zeros 1."""
    return float(np.float32(largest / FP8_MAX)) or 1.0


def quantize(values: np.ndarray, scale: float) -> np.ndarray:
    """float [..] -> e4m3 [..] of values / scale: rounded to nearest, even at ties, saturated at 448."""
    scaled = values.astype(np.float32) / np.float32(scale)
    return np.clip(scaled, -FP8_MAX, FP8_MAX).astype(E4M3)  # beyond 448 astype makes NaN


def fragment_order(values: np.ndarray) -> np.ndarray:
    """[.., N], N a multiple of 16, with the columns of each 16 as tensor cores hold them.

    Column 16 j + 8 b + 2 t + i (b and i of 0..1, t of 0..3) goes to 16 j + 4 t + 2 b + i.
    """
    columns = values.reshape(*values.shape[:-1], -1, *FRAGMENT)
    return np.ascontiguousarray(columns.swapaxes(-3, -2)).reshape(values.shape)


class _Rewriting:
    """The exchange of a checked graph's nodes. scales: of the activations, by their names."""

    def __init__(self, model: onnx.ModelProto, scales: Mapping[str, float]):
        self.graph = model.graph
        self.scales = scales
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.renamed: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Exchange the nodes. Returns old name -> new name; what is new altogether has itself as old name."""
        nodes = []
        for node in self.graph.node:
            nodes += self._exchange(node) if node.domain == DOMAIN else [node]
        nodes = [_copy(node) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        return self.renamed

    def _exchange(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        kept = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == ROW_STATISTICS.name:
            (x,), (statistics,) = node.input, node.output
            return [self._row_statistics(node, x, statistics)]
        if node.op_type == PATCH_EMBEDDING.name and kept["emit_statistics"]:
            y, statistics = node.output
            alone = _copy(node)
            alone.output[1] = ""
            for attribute in alone.attribute:
                if attribute.name == "emit_statistics":
                    attribute.i = 0
            # What is quantized is no output of the patch embedding: an op of its own takes both.
            return [alone, self._row_statistics(node, y, statistics, renames=False)]
        if node.op_type == ENCODER_ATTENTION.name:
            scale = self.scales[node.output[0]]
            attributes = {"num_heads": kept["num_heads"], "output_scale": scale}
            return [self._node(node, FP8_ENCODER_ATTENTION, node.input, node.output, attributes)]
        if node.op_type == LAYER_NORM_LINEAR.name:
            return [self._layer_norm_linear(node, kept)]
        if node.op_type == LINEAR_RESIDUAL.name:
            return [self._linear_residual(node, kept["emit_statistics"])]
        return [node]

    def _row_statistics(
        self, node: onnx.NodeProto, x: str, statistics: str, renames: bool = True
    ) -> onnx.NodeProto:
        attributes = {"scale": self.scales[x]}
        outputs = [statistics, _quantized(x)]
        return self._node(node, FP8_ROW_STATISTICS, [x], outputs, attributes, renames)

    def _layer_norm_linear(self, node: onnx.NodeProto, kept: Mapping[str, float | bytes]) -> onnx.NodeProto:
        x, statistics, weight, weight_sum, bias = node.input
        (y,) = node.output
        weight_scale, sums = self._quantize_weight(weight)
        self.weights[weight_sum].CopyFrom(onnx.numpy_helper.from_array(sums, weight_sum))
        attributes = {
            "epsilon": kept["epsilon"],
            "activation": kept["activation"].decode(),
            "product_scale": self.scales[x] * weight_scale,
        }
        if y in self.scales:
            attributes |= {"output_scale": self.scales[y], "output_type": FP8_TYPE}
        inputs = [_quantized(x), statistics, weight, weight_sum, bias]
        return self._node(node, FP8_LAYER_NORM_LINEAR, inputs, [y], attributes)

    def _linear_residual(self, node: onnx.NodeProto, emit: int) -> onnx.NodeProto:
        x, weight, bias, residual = node.input
        y, statistics = node.output
        weight_scale, _ = self._quantize_weight(weight)
        attributes = {"emit_statistics": emit, "product_scale": self.scales[x] * weight_scale}
        outputs = [y, "", ""]
        if emit:
            attributes["output_scale"] = self.scales[y]
            outputs = [y, statistics, _quantized(y)]
        return self._node(node, FP8_LINEAR_RESIDUAL, [x, weight, bias, residual], outputs, attributes)

    def _quantize_weight(self, name: str) -> tuple[float, np.ndarray]:
        """Put e4m3 numbers, K in fragment order, in the place of a weight [N, K].

        Returns its scale, and the sums float32 [N] over K of the numbers times the scale.
        """
        tensor = self.weights[name]
        weight = onnx.numpy_helper.to_array(tensor)
        scale = scale_of(float(np.abs(weight).max()))
        quantized = quantize(weight, scale)
        sums = (quantized.astype(np.float64) * scale).sum(axis=1)
        stored = fragment_order(quantized).tobytes()
        tensor.CopyFrom(onnx.helper.make_tensor(name, FP8_TYPE, quantized.shape, stored, raw=True))
        return scale, sums.astype(np.float32)

    def _node(
        self,
        old: onnx.NodeProto,
        op: FusedOp,
        inputs: list[str],
        outputs: list[str],
        attributes: Mapping[str, int | float | str],
        renames: bool = True,
    ) -> onnx.NodeProto:
        name = posixpath.join(posixpath.dirname(old.name), op.name)
        self.renamed[old.name if renames else name] = name
        complete = op.node_attributes(**attributes)
        return onnx.helper.make_node(op.name, inputs, outputs, name=name, domain=DOMAIN, **complete)


def _is_product(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in PRODUCTS


def _quantized(name: str) -> str:
    return f"{name}_quantized"


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def _check(encoder: onnx.ModelProto, spec: ModelSpec) -> None:
    """Raise SurgeryError where the graph has other nodes or another type than can be rewritten."""
    layers = spec.encoder.num_hidden_layers
    counts = Counter(node.op_type for node in encoder.graph.node if node.domain == DOMAIN)
    found = {op: counts[op] for op in LAYER}
    expected = {op: layers * count for op, count in LAYER.items()}
    if found != expected:
        wrong = ", ".join(f"{count} of {expected[op]} {op}" for op, count in found.items())
        raise SurgeryError(
            "encoder.onnx: fp8 needs four fused products and one fused attention in each of the encoder's "
            f"{layers} layers, found {wrong}: fuse {' and '.join(FP8_PLUGINS)}, for widths that are "
            "multiples of 64, or choose --precision fp16"
        )
    types = {tensor.name: tensor.data_type for tensor in encoder.graph.initializer}
    for node in encoder.graph.node:
        if _is_product(node):
            weight = node.input[2 if node.op_type == LAYER_NORM_LINEAR.name else 1]
            if types.get(weight) != onnx.TensorProto.FLOAT16:
                raise SurgeryError(
                    f"encoder.onnx: {node.name} has no constant weight in float16; fp8 starts from a graph "
                    "exported in fp16"
                )
    _check_readers(encoder)


def _check_readers(encoder: onnx.ModelProto) -> None:
    """Raise SurgeryError where a tensor that becomes e4m3 in place has another reader than a product."""
    nodes = encoder.graph.node
    made = {output: node.op_type for node in nodes for output in node.output if output}
    readers = Counter(tensor for node in nodes for tensor in node.input)
    left = {value.name for value in encoder.graph.output}
    for node in nodes:
        if node.op_type != LINEAR_RESIDUAL.name:
            continue
        x = node.input[0]
        in_place = made.get(x) in (ENCODER_ATTENTION.name, LAYER_NORM_LINEAR.name)
        if not in_place or readers[x] > 1 or x in left:
            raise SurgeryError(
                f"encoder.onnx: {node.name} reads {x}, which is not the output of an attention or an "
                "activation for it alone; export and fuse the checkpoint anew, or choose --precision fp16"
            )


def _check_ranges(names: list[str], ranges: Mapping[str, float]) -> None:
    for name in names:
        value = ranges.get(name)
        if value is None:
            raise SurgeryError(f"encoder.onnx: no range of {name}; calibrate this graph again")
        if not math.isfinite(value) or value < 0:
            raise SurgeryError(
                f"encoder.onnx: the range of {name} is {value}, no finite magnitude: float16 may be too "
                "small for this checkpoint; choose --precision bf16"
            )
