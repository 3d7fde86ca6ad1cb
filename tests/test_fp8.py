"""fp8: the ops' definitions against PyTorch, the rewritten encoder, its calibration, and what is refused."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint
from graph_surgery.checkpoint import DTYPES, ModelSpec, load_model, load_spec
from graph_surgery.export import export_graphs
from graph_surgery.fp8 import fragment_order, quantize, quantize_encoder, quantized_tensors, scale_of
from graph_surgery.fuse import fuse_graph, strip_functions
from graph_surgery.fused_ops import (
    DOMAIN,
    FP8_ENCODER_ATTENTION,
    FP8_LAYER_NORM_LINEAR,
    FP8_LINEAR_RESIDUAL,
    FP8_OPSET,
    FP8_ROW_STATISTICS,
    FP8_TYPE,
    SurgeryError,
    parse_plugins,
)
from runtime import calibration
from runtime.calibration import CalibrationError, calibrate, calibration_images, inputs, line_pixels
from runtime.recognizer import Recognizer, load_image_processor
from tests.checkpoints import ENCODER, SMALL_DECODER
from tests.conftest import BUNDLED_MODEL
from tests.small_graphs import run
from tests.test_fused_ops import attend, check, heads, rounded, rows, run_op, statistics_of

SAMPLES = BUNDLED_MODEL.parent.parent / "samples"
FEW_LINES = [
    SAMPLES / name for name in ("000015.jpg", "000135.jpg", "000188.jpg", "000196.jpg", "000245.jpg")
]

Encoders = Callable[..., tuple[ModelSpec, onnx.ModelProto, dict[str, float]]]


def stored_at(column: int) -> int:
    """Where a column is stored, bit by bit as docs/design.md has it."""
    block, rest = divmod(column, 16)
    b, rest = divmod(rest, 8)
    t, i = divmod(rest, 2)
    return 16 * block + 4 * t + 2 * b + i


def e4m3(values: torch.Tensor, scale: float) -> torch.Tensor:
    """The numbers float32 [.., N] that e4m3 holds of values by scale, in fragment order."""
    numbers = (values / scale).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    stored = np.empty_like(numbers)
    stored[..., [stored_at(column) for column in range(values.shape[-1])]] = numbers
    return torch.from_numpy(stored)


def logical(stored: torch.Tensor) -> torch.Tensor:
    """Columns in their own order again."""
    return stored[..., [stored_at(column) for column in range(stored.shape[-1])]]


def check_e4m3(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but where the last bit of a float32 sum decides between two neighbours."""
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= 0.126 * expected.abs() + 2**-9).all()
    assert (found == expected).float().mean() > 0.999


def test_order_of_fragments():
    columns = np.arange(64)
    stored = fragment_order(columns[None])[0]
    assert [stored[stored_at(column)] for column in columns] == columns.tolist()
    assert stored[:16].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(3, 64)), random.normal(size=(5, 64))
    np.testing.assert_allclose(fragment_order(x) @ fragment_order(weight).T, x @ weight.T, rtol=1e-12)


def test_quantizing_rounds_to_nearest_and_saturates():
    """As ONNX Runtime's Cast does: all numbers, all ties, the values beside them, and what is too large."""
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (1, -1)]
    large = np.array([449, 463, 464, 465, 1e6, np.inf], np.float32)
    values = np.concatenate([numbers, ties, *beside, large, -large]).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["quantized"], to=FP8_TYPE),
        onnx.helper.make_node("Cast", ["quantized"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    values_info = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"])] for name in ("x", "y")
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "cast", *values_info),
        opset_imports=[onnx.helper.make_opsetid("", FP8_OPSET)],
        ir_version=9,
    )
    found = quantize(values, 1.0).astype(np.float32)
    np.testing.assert_array_equal(found, run(model, {"x": values})["y"])
    np.testing.assert_array_equal(found[: len(numbers)], numbers)
    assert np.abs(found).max() == 448
    np.testing.assert_array_equal(quantize(4 * values, 4.0).astype(np.float32), found)


def test_scales():
    assert scale_of(896.0) == 2.0
    assert scale_of(1.0) == float(np.float32(1 / 448))
    assert scale_of(0.0) == 1.0
    quantized = quantize(np.array([-3.5, 7.0]), scale_of(7.0)).astype(np.float32)
    assert quantized.tolist() == [-224, 448]


def test_row_statistics():
    torch.manual_seed(0)
    x = rounded({"x": 3 * torch.randn(2, 5, 192) + 2}, torch.float16)["x"]
    scale = 8 / 448  # some are beyond it
    wide, fp8 = {"statistics"}, {"quantized"}
    statistics, quantized = run_op(
        FP8_ROW_STATISTICS, {"x": x}, torch.float16, {"scale": scale}, opset=19, wide=wide, fp8=fp8
    )
    check(statistics, statistics_of(x), torch.float32)
    assert (x > 8).any()
    torch.testing.assert_close(quantized, e4m3(x, scale), rtol=0, atol=0)


@pytest.mark.parametrize("opset", [19, 20])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
@pytest.mark.parametrize("output_scale", [0.0, 0.01])
def test_layernorm_linear(opset: int, activation: str, output_scale: float):
    """Statistics of x before it is quantized, and a weight's sums after."""
    torch.manual_seed(0)
    width, epsilon, x_scale, weight_scale = 128, 0.5, 0.01, 0.001
    x = rounded({"x": torch.randn(3, 5, width) + 1}, torch.float16)["x"]
    quantized = e4m3(x, x_scale)
    weight = e4m3(torch.randn(80, width) / width**0.5, weight_scale)
    bias = torch.randn(80)
    tensors = {
        "x": quantized,
        "statistics": statistics_of(x),
        "weight": weight,
        "weight_sum": weight_scale * weight.sum(1),
        "bias": bias,
    }
    attributes = {"epsilon": epsilon, "activation": activation, "product_scale": x_scale * weight_scale}
    attributes |= {"output_scale": output_scale}
    if output_scale:
        attributes |= {"output_type": FP8_TYPE}
    (found,) = run_op(
        FP8_LAYER_NORM_LINEAR,
        tensors,
        torch.float16,
        attributes,
        opset=opset,
        wide={"statistics", "weight_sum", "bias"},
        fp8={"x", "weight"},
    )
    mean = x.mean(-1, keepdim=True)
    deviation = (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
    normed = (x_scale * logical(quantized) - mean) / deviation
    expected = torch.nn.functional.linear(normed, weight_scale * logical(weight), bias)
    if activation != "none":
        expected = getattr(torch.nn.functional, activation)(expected)
    if output_scale:
        check_e4m3(found, e4m3(expected, output_scale))
    else:
        check(found, expected, torch.float16)


@pytest.mark.parametrize("emit_statistics", [0, 1])
def test_linear_residual(emit_statistics: int):
    torch.manual_seed(0)
    x_scale, weight_scale, output_scale = 0.01, 0.001, 0.008
    x, weight = e4m3(torch.randn(3, 5, 80), x_scale), e4m3(torch.randn(128, 80) / 80**0.5, weight_scale)
    bias, residual = torch.randn(128), rounded({"r": torch.randn(3, 5, 128)}, torch.float16)["r"]
    attributes = {"emit_statistics": emit_statistics, "product_scale": x_scale * weight_scale}
    attributes |= {"output_scale": output_scale}
    y, *emitted = run_op(
        FP8_LINEAR_RESIDUAL,
        {"x": x, "weight": weight, "bias": bias, "residual": residual},
        torch.float16,
        attributes,
        omit=2 * (1 - emit_statistics),
        opset=19,
        wide={"bias", "statistics"},
        fp8={"x", "weight", "quantized"},
    )
    expected = torch.nn.functional.linear(x_scale * logical(x), weight_scale * logical(weight), bias)
    check(y, expected + residual, torch.float16)
    assert len(emitted) == 2 * emit_statistics
    if emitted:
        check(emitted[0], statistics_of(y), torch.float32)
        torch.testing.assert_close(emitted[1], e4m3(y, output_scale), rtol=0, atol=0)  # of what was rounded


def test_encoder_attention():
    torch.manual_seed(0)
    num_heads, head_dim, scale = 3, 64, 2 / 448
    qkv = rounded({"qkv": torch.randn(2, 59, 3 * num_heads * head_dim)}, torch.float16)["qkv"]
    attributes = {"num_heads": num_heads, "output_scale": scale}
    (found,) = run_op(
        FP8_ENCODER_ATTENTION, {"qkv": qkv}, torch.float16, attributes, opset=19, fp8={"context"}
    )
    query, key, value = (heads(part, num_heads) for part in qkv.chunk(3, dim=-1))
    check_e4m3(found, e4m3(rows(attend(query, key, value)), scale))


def test_bad_attributes_and_old_opsets_are_refused():
    with pytest.raises(SurgeryError, match="TrOCRFp8RowStatistics needs opset 19 or newer, the graph has 17"):
        FP8_ROW_STATISTICS.function(17)
    with pytest.raises(SurgeryError, match="product_scale is required"):
        FP8_LAYER_NORM_LINEAR.node_attributes(epsilon=1e-5)
    with pytest.raises(SurgeryError, match="output_type=1 is not one of 10, 17"):
        FP8_LAYER_NORM_LINEAR.node_attributes(epsilon=1e-5, product_scale=1.0, output_type=1)


# The rewritten encoder.


@pytest.fixture(scope="module")
def encoders(checkpoint: Callable[[str], Path]) -> Encoders:
    """Description, fused encoder and ranges of a checkpoint of tests/checkpoints.py. Only to be read."""

    @cache
    def made(name: str, plugins: str = "fused") -> tuple[ModelSpec, onnx.ModelProto, dict[str, float]]:
        spec = load_spec(checkpoint(name))
        fused = fused_encoder(spec, plugins)
        return spec, fused, calibrate(fused, spec, FEW_LINES)

    return made


def fused_encoder(spec: ModelSpec, plugins: str = "fused", precision: str = "fp16") -> onnx.ModelProto:
    stock = export_graphs(spec, load_model(spec, DTYPES[precision]), precision)["encoder"]
    return fuse_graph("encoder", stock, spec, parse_plugins(plugins))


def encode(encoder: onnx.ModelProto, spec: ModelSpec) -> np.ndarray:
    pixels = line_pixels(load_image_processor(spec), FEW_LINES).numpy()
    return run(encoder, {"pixel_values": pixels})["last_hidden_state"].astype(np.float32)


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square, relative to that of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


@pytest.mark.parametrize(("name", "layers"), [("small", 2), ("base", 2), ("large", 3), ("wide", 2)])
def test_every_product_is_exchanged(encoders: Encoders, name: str, layers: int):
    spec, fused, ranges = encoders(name)
    before = fused.SerializeToString()
    model = quantize_encoder(fused, spec, ranges)
    assert fused.SerializeToString() == before
    onnx.checker.check_model(model)
    ops = [node.op_type.removeprefix("TrOCR") for node in model.graph.node]
    layer = ["LayerNormLinear", "EncoderAttention", "LinearResidual", "LayerNormLinear", "LinearResidual"]
    expected = ["PatchEmbedding", "Fp8RowStatistics", *(f"Fp8{op}" for op in layers * layer), "LayerNorm"]
    assert ops == expected
    emitted = [sum(map(bool, node.output)) for node in model.graph.node if "LinearRes" in node.op_type]
    assert emitted == [3] * (2 * layers - 1) + [1]
    assert sum(map(bool, model.graph.node[0].output)) == 1  # the statistics are the next op's
    types = Counter(tensor.data_type for tensor in model.graph.initializer)
    assert types[FP8_TYPE] == 4 * layers
    assert {function.name for function in model.functions} == {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", ["small", "base", "large", "wide"])
def test_results_are_near_those_of_float16(encoders: Encoders, name: str):
    spec, fused, ranges = encoders(name)
    expected = encode(fused, spec)
    found = encode(quantize_encoder(fused, spec, ranges), spec)
    assert 1e-4 < relative_error(found, expected) < 0.05


def test_without_the_patch_embedding(encoders: Encoders):
    """The first statistics are then an op of the float16 graph, and the pixels normalised."""
    spec, _, ranges = encoders("small")
    plain = fused_encoder(spec, "encoder_attention,linear")
    plain_ranges = calibrate(plain, spec, FEW_LINES)
    assert plain_ranges.keys() == ranges.keys()
    np.testing.assert_allclose(list(plain_ranges.values()), list(ranges.values()), rtol=0.02)
    model = quantize_encoder(plain, spec, plain_ranges)
    onnx.checker.check_model(model)
    counts = Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)
    assert counts == {
        "TrOCRFp8RowStatistics": 1,
        "TrOCRFp8LayerNormLinear": 4,
        "TrOCRFp8LinearResidual": 4,
        "TrOCRFp8EncoderAttention": 2,
    }
    pixels = np.random.default_rng(0).normal(size=(2, 3, 48, 48)).astype(np.float16)
    expected, found = (
        run(graph, {"pixel_values": pixels})["last_hidden_state"].astype(np.float32)
        for graph in (plain, model)
    )
    assert relative_error(found, expected) < 0.1


@pytest.mark.parametrize("plugins", ["fused", "encoder_attention,linear"])
def test_every_stock_node_stays_or_is_accounted_for(checkpoint, plugins: str):
    spec = load_spec(checkpoint("small"))
    fused = fused_encoder(spec, plugins)
    model = quantize_encoder(fused, spec, dict.fromkeys(quantized_tensors(fused, spec), 1.0))
    before, after = (json.loads(metadata(graph)["trocr.replaced"]) for graph in (fused, model))
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert after.keys() <= set(names)
    assert sorted(node for nodes in after.values() for node in nodes) == sorted(
        node for nodes in before.values() for node in nodes
    )
    for old, new in (
        ("attention/qkv_proj/TrOCRLayerNormLinear", "attention/qkv_proj/TrOCRFp8LayerNormLinear"),
        ("attention/TrOCREncoderAttention", "attention/TrOCRFp8EncoderAttention"),
        ("mlp/fc2/TrOCRLinearResidual", "mlp/fc2/TrOCRFp8LinearResidual"),
    ):
        assert after[f"/layers.1/{new}"] == before[f"/layers.1/{old}"]
    (statistics,) = (name for name in after if name.endswith("TrOCRFp8RowStatistics"))
    assert after[statistics] == []


def test_metadata_has_the_ranges(encoders: Encoders):
    spec, fused, ranges = encoders("small")
    found = metadata(quantize_encoder(fused, spec, ranges))
    assert json.loads(found.pop("trocr.ranges")) == ranges
    assert found.pop("trocr.precision") == "fp8"
    changed = ("trocr.precision", "trocr.replaced")
    expected = {key: value for key, value in metadata(fused).items() if key not in changed}
    found.pop("trocr.replaced")
    assert found == expected


def test_weights_and_scales(encoders: Encoders):
    """One scale a weight, K in fragment order, and sums of what was quantized."""
    spec, fused, ranges = encoders("small")
    model = quantize_encoder(fused, spec, ranges)
    node = next(n for n in model.graph.node if n.name == "/layers.1/mlp/fc1/TrOCRFp8LayerNormLinear")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    name = "layers.1.mlp.fc1.MatMul.weight"
    source = onnx.numpy_helper.to_array(weights(fused)[name]).astype(np.float32)
    tensor = weights(model)[name]
    assert tensor.data_type == FP8_TYPE and list(tensor.dims) == list(source.shape)
    numbers = np.frombuffer(tensor.raw_data, ml_dtypes.float8_e4m3fn).reshape(source.shape)
    scale = float(np.float32(np.abs(source).max() / 448))
    np.testing.assert_array_equal(numbers.astype(np.float32), e4m3(torch.from_numpy(source), scale).numpy())
    sums = onnx.numpy_helper.to_array(weights(model)[f"{name}_sum"])
    np.testing.assert_allclose(sums, scale * numbers.astype(np.float64).sum(1), rtol=1e-6, atol=1e-7)
    x, y = "/layers.1/Add_output_0", "/layers.1/mlp/activation_fn/Mul_1_output_0"
    assert list(node.input) == [
        f"{x}_quantized",
        *node.input[1:2],
        name,
        f"{name}_sum",
        "layers.1.mlp.fc1.MatMul.bias",
    ]
    assert attributes["product_scale"] == pytest.approx(ranges[x] / 448 * scale)
    assert attributes["output_scale"] == pytest.approx(ranges[y] / 448)
    assert (attributes["output_type"], attributes["activation"]) == (FP8_TYPE, b"gelu")
    qkv = next(n for n in model.graph.node if n.name.endswith("layers.1/attention/qkv_proj/" + node.op_type))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in qkv.attribute}
    assert attributes["output_scale"] == 0


def test_tensorrt_gets_float16_in_the_place_of_e4m3(encoders: Encoders):
    spec, fused, ranges = encoders("small")
    model = quantize_encoder(fused, spec, ranges)
    stripped = strip_functions(model)
    assert not stripped.functions and model.functions
    assert b"output_type" not in stripped.SerializeToString()
    types = {tensor.data_type for tensor in stripped.graph.initializer}
    assert types == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    for name, tensor in weights(stripped).items():
        original = weights(model)[name]
        assert tensor.raw_data == original.raw_data
        if original.data_type == FP8_TYPE:
            assert tensor.data_type == onnx.TensorProto.FLOAT16
            assert list(tensor.dims) == [original.dims[0], original.dims[1] // 2]
            assert len(tensor.raw_data) == 2 * np.prod(tensor.dims)
    outputs = {
        "RowStatistics": {2},
        "LayerNormLinear": {1},
        "EncoderAttention": {1},
        "LinearResidual": {1, 3},
    }
    for node in stripped.graph.node:
        if node.op_type.startswith("TrOCRFp8"):
            assert len(node.output) in outputs[node.op_type.removeprefix("TrOCRFp8")] and all(node.output)


@pytest.mark.parametrize("plugins", ["none", "linear", "encoder_attention"])
def test_a_graph_without_the_fused_layers_is_refused(checkpoint, plugins: str):
    spec = load_spec(checkpoint("small"))
    with pytest.raises(SurgeryError, match=r"four fused products and one fused attention in each of the"):
        quantize_encoder(fused_encoder(spec, plugins), spec, {})


def test_widths_that_are_not_multiples_of_64_are_refused(tmp_path: Path):
    encoder, decoder = ARCHITECTURES["small"]
    narrow = ENCODER | {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}
    write_random_checkpoint(encoder | narrow, decoder | SMALL_DECODER, tmp_path, torch.float32, seed=0)
    spec = load_spec(tmp_path)
    with pytest.raises(SurgeryError, match=r"found 2 of 2 .*, 0 of 4 .*multiples of 64, or .* fp16"):
        quantized_tensors(fused_encoder(spec), spec)


def test_another_number_of_layers_is_refused(encoders: Encoders):
    spec, fused, _ = encoders("small")
    deeper = dataclasses.replace(spec, encoder=dataclasses.replace(spec.encoder, num_hidden_layers=3))
    with pytest.raises(SurgeryError, match="found 2 of 3 TrOCREncoderAttention"):
        quantized_tensors(fused, deeper)


def test_other_types_are_refused(checkpoint):
    spec = load_spec(checkpoint("small"))
    with pytest.raises(SurgeryError, match=r"no constant weight in float16; fp8 starts from .* fp16"):
        quantized_tensors(fused_encoder(spec, precision="bf16"), spec)


def test_a_context_that_is_read_elsewhere_is_refused(encoders: Encoders):
    spec, fused, ranges = encoders("small")
    leaking = onnx.ModelProto()
    leaking.CopyFrom(fused)
    (context,) = (
        node.output[0]
        for node in fused.graph.node
        if node.name == "/layers.1/attention/TrOCREncoderAttention"
    )
    leaking.graph.output.append(onnx.helper.make_tensor_value_info(context, onnx.TensorProto.FLOAT16, None))
    with pytest.raises(SurgeryError, match="not the output of an attention or an activation for it alone"):
        quantize_encoder(leaking, spec, ranges)


@pytest.mark.parametrize("value", [None, float("inf"), float("nan"), -1.0])
def test_bad_ranges_are_refused(encoders: Encoders, value: float | None):
    spec, fused, ranges = encoders("small")
    name = "/layers.0/Add_output_0"
    spoilt = ranges | {name: value}
    with pytest.raises(SurgeryError, match=r"no range of /layers\.0/Add_output_0|finite magnitude.*bf16"):
        quantize_encoder(fused, spec, spoilt)


# Calibration.


def test_ranges_are_what_the_tensors_have(encoders: Encoders):
    """Against the tensors themselves, over all images; the same in every run."""
    spec, fused, ranges = encoders("small")
    names = quantized_tensors(fused, spec)
    assert list(ranges) == names
    assert len(names) == 2 * 4  # the last layer's FC2 is not quantized, the first layer's input is
    extended = onnx.ModelProto()
    extended.CopyFrom(fused)
    for name in names:
        extended.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None))
    session = onnxruntime.InferenceSession(extended.SerializeToString(), providers=["CPUExecutionProvider"])
    processor = load_image_processor(spec)
    largest = dict.fromkeys(names, 0.0)
    for image in FEW_LINES:
        tensors = session.run(names, {"pixel_values": line_pixels(processor, [image]).numpy()})
        for name, tensor in zip(names, tensors, strict=True):
            largest[name] = max(largest[name], float(np.abs(tensor).max()))
    assert largest == pytest.approx(ranges, rel=2e-3)  # another batch size, other sums
    assert calibrate(fused, spec, FEW_LINES) == ranges


def test_images_of_a_calibration(tmp_path: Path):
    samples = calibration_images()
    assert len(samples) == 16
    assert samples == sorted(SAMPLES.glob("*.jpg"))[:16]
    assert calibration_images([str(SAMPLES / "000015.jpg"), str(SAMPLES / "0001*.jpg")])[1:] == sorted(
        SAMPLES.glob("0001*.jpg")
    )
    for paths, message in (
        ([str(tmp_path)], "no images in this folder"),
        ([str(tmp_path / "*.png")], "matches no file"),
        ([str(tmp_path / "line.png")], r"line\.png: no such file"),
    ):
        with pytest.raises(CalibrationError, match=f"--calibration: .*{message}"):
            calibration_images(paths)


def test_samples_that_are_not_there(tmp_path: Path, monkeypatch):
    for folder, message in ((tmp_path, "no images in this folder"), (tmp_path / "none", "no such file")):
        monkeypatch.setattr(calibration, "SAMPLES", folder)
        with pytest.raises(CalibrationError, match=message):
            calibration_images()


def test_an_unreadable_image_is_named(encoders: Encoders, tmp_path: Path):
    spec, fused, _ = encoders("small")
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    with pytest.raises(CalibrationError, match=r"--calibration: .*broken\.png"):
        calibrate(fused, spec, [FEW_LINES[0], broken])


def test_the_images_are_hashed_in_their_order(tmp_path: Path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    found = inputs([first, second])
    assert found["images"] == 2 and found == inputs([first, second])
    assert inputs([second, first]) != found
    second.write_bytes(b"3")
    assert inputs([first, second]) != found


@pytest.mark.slow
def test_the_bundled_checkpoint_reads_its_lines(tmp_path: Path):
    """Of lines that it was not calibrated with, every text is that of float16."""
    from build import build

    lines = sorted(SAMPLES.glob("*.jpg"))[-8:]
    texts = {}
    for precision in ("fp16", "fp8"):
        folder = build(str(BUNDLED_MODEL), "fused", precision, out=tmp_path / precision, onnx_only=True)
        results = Recognizer(folder, backend="onnxruntime").recognize(lines)
        texts[precision] = [result.text for result in results]
    assert texts["fp8"] == texts["fp16"]
