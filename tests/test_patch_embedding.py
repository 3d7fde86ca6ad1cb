"""The patch embedding: its pass on small graphs, what is folded into its weights, and the kernel on a GPU."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint
from graph_surgery.checkpoint import CheckpointError, Normalization, load_model, load_normalization, load_spec
from graph_surgery.export import export
from graph_surgery.fuse import attach_functions, export_graph, fuse_graph, import_graph, load, strip_functions
from graph_surgery.fused_ops import parse_plugins
from graph_surgery.passes import PassReport
from graph_surgery.passes.patch_embedding import PatchEmbeddingPass, fold, pack_weight
from tests.checkpoints import ENCODER, SMALL_DECODER
from tests.small_graphs import GraphBuilder, assert_close, run

EQUAL = Normalization(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = Normalization(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
ONLY_RESCALED = Normalization(1 / 127.5, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
HEIGHT, WIDTH, CHANNELS = 32, 48, 64
PATCHES = HEIGHT // 16 * (WIDTH // 16)


def embeddings(
    *,
    channels: int = CHANNELS,
    size: tuple[int | str, int | str] = (HEIGHT, WIDTH),
    special: int = 2,
    bias: bool = True,
    swap: bool = False,
    flat_positions: bool = False,
    perm: tuple[int, ...] = (0, 2, 1),
    pads: tuple[int, ...] | None = None,
    fill: float | None = None,
    mode: str = "constant",
    preprocessed: bool = False,
    positions_are_input: bool = False,
    again: str = "",
    leak: str = "",
    patch: int = 16,
    **convolution: object,
) -> onnx.ModelProto:
    """Embeddings as the exporter writes them, with variations."""
    b = GraphBuilder()
    pixels = b.input("pixel_values", ["batch", 3, *size])
    x = b("Tanh", pixels) if preprocessed else pixels
    group = convolution.get("group", 1)
    kernel = b.weight(channels, 3 // group, patch, patch)
    attributes = {"kernel_shape": [patch] * 2, "strides": [16, 16]} | convolution
    conv = b("Conv", x, kernel, *([b.weight(channels)] if bias else []), **attributes)
    rows = b("Transpose", b("Reshape", conv, b.constant([-1, channels, PATCHES])), perm=list(perm))
    pads = (0, special, 0, 0, 0, 0) if pads is None else pads
    amounts = [b.constant(list(pads))] + ([] if fill is None else [b.constant(fill)])
    padded = b("Pad", rows, *amounts, mode=mode)
    tokens = PATCHES + pads[1] + pads[4]
    shape = [tokens, channels] if flat_positions else [1, tokens, channels]
    positions = b.input("positions", shape) if positions_are_input else b.weight(*shape)
    y = b.commutative("Add", padded, positions, swap)
    b("Neg", y, output="y")
    b.output("y", None)
    interior = {"conv": conv, "rows": rows, "padded": padded, "pixels": pixels}
    if again:
        b("Neg", interior[again], output="again")
        b.output("again", None)
    if leak:
        b.output(interior[leak], None)
    return b.model()


def run_pass(
    model: onnx.ModelProto, normalization: Normalization | None
) -> tuple[onnx.ModelProto, PassReport]:
    graph = import_graph(model)
    report = PatchEmbeddingPass(normalization).run(graph)
    fused = export_graph(graph, model, {})
    attach_functions(fused)
    onnx.checker.check_model(fused)
    return fused, report


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "normalization", [EQUAL, IMAGENET, ONLY_RESCALED], ids=["equal", "imagenet", "rescaled"]
)
@pytest.mark.parametrize(
    "variation",
    [
        {},
        {"swap": True},
        {"special": 1},
        {"special": 0},
        {"bias": False},
        {"flat_positions": True},
        {"fill": 0.0},
        {"pads": (0, 2, 0, 0, 0, 0), "dilations": [1, 1], "group": 1, "auto_pad": "VALID"},
        {"channels": 192},
    ],
    ids=str,
)
def test_matches(variation: dict, normalization: Normalization) -> None:
    model = embeddings(**variation)
    fused, report = run_pass(model, normalization)
    assert report.rejected == {}
    assert report.fused == ["/block/TrOCRPatchEmbedding"]
    assert [node.op_type for node in fused.graph.node] == ["TrOCRPatchEmbedding", "Neg"]
    (value,) = fused.graph.input
    assert value.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    pixels = random_pixels(3, 3, HEIGHT, WIDTH)
    expected = run(model, {"pixel_values": normalization(pixels).numpy()})["y"]
    assert_close(run(fused, {"pixel_values": pixels.numpy()})["y"], expected)


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"preprocessed": True}, "does not read the graph's input"),
        ({"again": "pixels"}, "should have one consumer"),
        ({"patch": 8}, "its kernel_shape is [8, 8]"),
        ({"pads": (0, 1, 0, 0, 1, 0)}, "not before the tokens only"),
        ({"pads": (0, 0, 0, 0, 2, 0)}, "not before the tokens only"),
        ({"fill": 1.0}, "something else than 0"),
        ({"mode": "edge"}, "with a constant"),
        ({"channels": 96}, "96 channels, not a multiple of 64"),
        ({"size": (40, 48)}, "no multiples of 16"),
        ({"positions_are_input": True}, "adds no constant"),
        ({"again": "conv"}, "should have one consumer"),
        ({"again": "padded"}, "should have one consumer"),
        ({"leak": "rows"}, "is an output of the graph"),
        ({"auto_pad": "SAME_UPPER"}, "its auto_pad is SAME_UPPER"),
    ],
    ids=str,
)
def test_does_not_match(variation: dict, reason: str) -> None:
    model = embeddings(**variation)
    fused, report = run_pass(model, EQUAL)
    assert (report.fused, report.replaced) == ([], {})
    assert any(reason in found for found in report.rejected.values()), report.rejected
    assert sorted(node.name for node in fused.graph.node) == sorted(node.name for node in model.graph.node)
    assert fused.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_without_a_normalisation_nothing_matches() -> None:
    _, report = run_pass(embeddings(), None)
    assert "normalisation of the pixels is not known" in next(iter(report.rejected.values()))


def test_equal_deviations_leave_the_weight_as_it_is() -> None:
    random = np.random.default_rng(0)
    kernel, bias = random.normal(size=(64, 3, 16, 16)), random.normal(size=64)
    weight, scale, folded = fold(kernel, bias, EQUAL)
    np.testing.assert_array_equal(weight, kernel)
    assert scale == np.float32(2 / 255)
    np.testing.assert_allclose(folded, bias + kernel.sum((1, 2, 3)) * (256 / 255 - 1), rtol=1e-12)


def test_order_of_the_packed_weight() -> None:
    """As plugins/patch_embedding/kernel.h says: channel, y / 4, x / 4, x / 2 % 2, y % 4, x % 2."""
    kernel = np.arange(2 * 768).reshape(2, 3, 16, 16)
    packed = pack_weight(kernel)
    for k in range(768):
        y = k // 64 % 4 * 4 + k // 2 % 4
        x = k // 16 % 4 * 4 + k // 8 % 2 * 2 + k % 2
        assert (packed[:, k] == kernel[:, k // 256, y, x]).all()


def test_normalisation_is_the_image_processors(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoImageProcessor

    spec = load_spec(checkpoint("wide"))
    pixels = random_pixels(2, 3, spec.encoder.image_height, spec.encoder.image_width)
    processor = AutoImageProcessor.from_pretrained(spec.source)
    expected = processor(pixels, do_resize=False, return_tensors="pt").pixel_values
    assert torch.equal(load_normalization(spec)(pixels), expected)


def test_no_image_processor(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    spec = dataclasses.replace(load_spec(checkpoint("small")), source=tmp_path)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: no usable image processor"):
        load_normalization(spec)


def exported(tmp_path: Path, encoder_changes: dict) -> tuple:
    encoder, decoder = ARCHITECTURES["small"]
    write_random_checkpoint(
        encoder | ENCODER | encoder_changes, decoder | SMALL_DECODER, tmp_path, torch.float32, 0
    )
    spec = load_spec(tmp_path)
    export(spec, load_model(spec, torch.float32), "fp32", tmp_path)
    return spec, load(tmp_path)["encoder"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patch_size": 8}, "patches are 8 x 8"),
        ({"image_size": [40, 48]}, "images are 40 x 48"),
        ({"hidden_size": 96, "num_attention_heads": 3}, "width is 96"),
    ],
    ids=str,
)
def test_what_the_kernel_cannot_do_stays_and_is_logged(
    tmp_path: Path, caplog, changes: dict, reason: str
) -> None:
    spec, stock = exported(tmp_path, changes)
    with caplog.at_level(logging.WARNING):
        fused = fuse_graph("encoder", stock, spec, {"patch_embedding"})
    assert fused.graph.input == stock.graph.input
    assert "TrOCRPatchEmbedding" not in {node.op_type for node in fused.graph.node}
    assert {entry.key: entry.value for entry in fused.metadata_props}["trocr.pixels"] == "normalised"
    assert reason in caplog.text


def test_a_checkpoint_without_an_image_processor_keeps_its_convolution(tmp_path: Path, caplog) -> None:
    spec, stock = exported(tmp_path, {})
    (tmp_path / "preprocessor_config.json").unlink()
    fused = fuse_graph("encoder", stock, spec, parse_plugins("all"))
    assert fused.graph.input == stock.graph.input
    assert "no usable image processor" in caplog.text


def test_tensorrts_copy_takes_words_of_four_pixels(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    spec, stock = exported(tmp_path, {"image_size": [32, 96]})
    fused = fuse_graph("encoder", stock, spec, parse_plugins("all"))
    assert {entry.key: entry.value for entry in fused.metadata_props}["trocr.pixels"] == "uint8"

    def input_of(model: onnx.ModelProto) -> tuple[int, list[int | str]]:
        (value,) = model.graph.input
        tensor = value.type.tensor_type
        return tensor.elem_type, [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]

    assert input_of(fused) == (onnx.TensorProto.UINT8, ["batch", 3, 32, 96])
    assert input_of(strip_functions(fused)) == (onnx.TensorProto.INT32, ["batch", 3, 32, 24])
    assert input_of(strip_functions(stock)) == input_of(stock)


# The kernel

TYPES = (torch.float16, torch.bfloat16, torch.float32)
PATHS = {torch.float16: ("hopper", "mma"), torch.bfloat16: ("hopper", "mma"), torch.float32: ("auto",)}
SIZES = [(16, 16), (32, 96), (48, 48), (64, 512), (384, 384)]


@pytest.fixture(scope="module")
def bench():
    """profiling.patch_embedding with the built module."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return pytest.importorskip(
        "profiling.patch_embedding", reason="trocr_kernels is not built", exc_type=ImportError
    )


def paths(dtype: torch.dtype) -> list[str]:
    hopper = torch.cuda.get_device_capability()[0] == 9
    return [path for path in PATHS[dtype] if hopper or path != "hopper"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel(bench, size: tuple[int, int], dtype: torch.dtype) -> None:
    for batch, outputs, special in ((1, 64, 1), (3, 192, 2), (7, 384, 2), (2, 768, 1), (1, 320, 0)):
        problem = bench.PatchEmbedding(batch, outputs, special, dtype, size, seed=batch)
        for path in paths(dtype):
            problem.poison()
            problem.run(path)
            assert not problem.errors(), f"{path}: {problem}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("model", ["small", "base", "large"])
@pytest.mark.parametrize("batch", [1, 8, 16, 64])
def test_kernel_on_the_encoders(bench, batch: int, model: str, dtype: torch.dtype) -> None:
    """Both widths of Hopper's blocks are among these."""
    special, outputs = bench.ENCODERS[model]
    problem = bench.PatchEmbedding(batch, outputs, special, dtype)
    problem.run()
    assert not problem.errors(), str(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0, 127, 128, 255])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernel_on_even_images(bench, dtype: torch.dtype, value: int) -> None:
    problem = bench.PatchEmbedding(2, 384, 2, dtype, (48, 96))
    problem.pixels.fill_(value)
    for path in paths(dtype):
        problem.poison()
        problem.run(path)
        assert not problem.errors(), path


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernel_with_other_normalisations(bench, dtype: torch.dtype) -> None:
    for normalization in (IMAGENET, ONLY_RESCALED):
        problem = bench.PatchEmbedding(2, 256, 1, dtype, (64, 48), normalization)
        problem.run()
        assert not problem.errors(), normalization


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernel_without_statistics(bench, dtype: torch.dtype) -> None:
    problem = bench.PatchEmbedding(2, 384, 2, dtype, (48, 96))
    for path in paths(dtype):
        problem.poison()
        problem.run(path, statistics=False)
        assert not problem.errors(statistics=False), path
        assert problem.statistics.isnan().all()


@pytest.mark.gpu
def test_kernel_is_bitwise_repeatable_on_any_stream_and_overlapped(bench) -> None:
    problem = bench.PatchEmbedding(16, 384, 2, torch.float16)
    problem.run()
    y, statistics = problem.y.clone(), problem.statistics.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for overlap in (False, True, True):
        with torch.cuda.stream(stream):
            problem.poison()
            problem.run(overlap=overlap)
        stream.synchronize()
        assert torch.equal(problem.y[: problem.rows], y[: problem.rows])
        assert torch.equal(problem.statistics[: problem.rows], statistics[: problem.rows])


@pytest.mark.gpu
def test_pixels_written_by_the_preceding_kernel_are_seen(bench) -> None:
    """Overlapped, the kernel must still wait for its pixels; replays of one graph, as an engine runs."""
    problem = bench.PatchEmbedding(8, 384, 2, torch.float16)
    images = [torch.randint_like(problem.pixels, 256) for _ in range(4)]
    source = images[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        problem.run(overlap=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            torch.bitwise_not(source, out=problem.pixels)
            problem.run(overlap=True)
        for image in images:
            source.copy_(image)
            problem.poison()
            graph.replay()
            stream.synchronize()
            assert torch.equal(problem.pixels, ~image)
            assert not problem.errors()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"height": 40}, "multiples of 16"),
        ({"width": 0}, "multiples of 16"),
        ({"outputs": 96}, "multiple of 64"),
        ({"batch": 0}, "at least 1"),
        ({"special_tokens": -1}, "at least 0"),
        ({"dtype": "float32", "path": "mma"}, "16-bit types"),
        ({"pixels": 8}, "pointer 'pixels' is not a multiple of 16 bytes"),
        ({"statistics": 4}, "invalid argument"),
    ],
    ids=str,
)
def test_kernel_refuses_what_it_cannot_do(bench, change: dict, reason: str) -> None:
    x = torch.zeros(64, 768, dtype=torch.float16, device="cuda")
    arguments = dict.fromkeys(("pixels", "weight", "bias", "positions", "y"), x.data_ptr()) | {
        "scale": 1.0,
        "batch": 1,
        "height": 16,
        "width": 16,
        "special_tokens": 0,
        "outputs": 64,
        "dtype": "float16",
    }
    with pytest.raises(RuntimeError, match=reason):
        bench.kernels.patch_embedding(**(arguments | change))
