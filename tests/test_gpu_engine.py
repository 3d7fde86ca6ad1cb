"""Engines on a GPU: stock and fused against PyTorch, batches, CUDA graphs, and what does not fit."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from build import build
from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint
from graph_surgery.checkpoint import load_spec
from profiling.accuracy import LINES, line_images
from runtime.backends.base import BackendError
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tensorrt_backend import TensorRTBackend
from runtime.backends.torch_backend import TorchBackend
from runtime.engine import Engine, EngineError
from runtime.generation import Decoder
from runtime.manifest import FILE_NAME, Manifest
from runtime.recognizer import Recognizer
from runtime.search import GenerationError, SearchSettings
from tests.checkpoints import DECODER, ENCODER, SMALL_DECODER
from tests.conftest import BUNDLED_MODEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU can be used here"),
]
TIMING_CACHE = Path("engines/timing.cache").resolve()  # shared with other builds: an engine takes a minute
TOKENS = 8
WIDE = {"d_model": 256, "decoder_attention_heads": 4, "decoder_ffn_dim": 1024}  # what the wide decoder serves
FOLDERS = ("none", "fused")


@pytest.fixture(scope="module")
def engines(checkpoint: Callable[[str], Path], tmp_path_factory) -> Callable[[str], Path]:
    """The engine folder of the reduced small checkpoint with these --plugins, for batches of 1 to 4."""
    root = tmp_path_factory.mktemp("engines")

    @cache
    def built(plugins: str) -> Path:
        model = str(checkpoint("small"))
        return build(model, plugins, "fp16", (1, 2, 4), root / plugins, timing_cache=TIMING_CACHE)

    return built


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> TorchBackend:
    return TorchBackend(load_spec(checkpoint("small")), "fp32")


def pixels(backend, batch: int) -> torch.Tensor:
    encoder = backend.spec.encoder
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 3, encoder.image_height, encoder.image_width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def forced_logits(backend, images: torch.Tensor) -> torch.Tensor:
    """float32 [B, TOKENS, V] after the same tokens in every backend: one rounding cannot change the rest."""
    state = backend.start(images)
    batch = len(images)
    tokens = torch.arange(batch * TOKENS).reshape(batch, TOKENS) % backend.spec.decoder.vocab_size
    logits = []
    for step in range(TOKENS):
        ids = tokens[:, step : step + 1].to(backend.device)
        logits.append(backend.step(state, ids, torch.full_like(ids, step)).float().clone())
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("plugins", FOLDERS)
def test_agrees_with_torch(engines, reference, plugins: str, batch: int):
    backend = TensorRTBackend(engines(plugins))
    images = pixels(backend, batch)
    expected = forced_logits(reference, images)
    found = forced_logits(backend, images)
    assert found.shape == (batch, TOKENS, backend.spec.decoder.vocab_size)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_fp8_agrees_with_its_definition(checkpoint, tmp_path: Path):
    """The encoder's engine against the same graph on ONNX Runtime: sums round elsewhere, and may round e4m3
    numbers to their neighbours."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    model = str(checkpoint("small"))
    folder = build(model, "fused", "fp8", (1, 2, 4), tmp_path / "fp8", timing_cache=TIMING_CACHE)
    backend = TensorRTBackend(folder)
    spec = load_spec(folder)
    definition = OnnxRuntimeBackend(folder, spec, TOKENS)
    for batch in (1, 4):
        images = pixels(backend, batch)
        expected, found = forced_logits(definition, images), forced_logits(backend, images).cpu()
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("plugins", FOLDERS)
def test_rows_do_not_depend_on_the_batch(engines, plugins: str):
    backend = TensorRTBackend(engines(plugins))
    images = pixels(backend, 4)
    whole = forced_logits(backend, images)
    single = forced_logits(backend, images[:1])
    # Another batch takes other kernels, which round differently.
    assert (whole[:1] - single).abs().max() <= 0.02 * whole.abs().max()


@pytest.mark.parametrize("plugins", FOLDERS)
def test_graphs_do_not_change_tokens(engines, plugins: str):
    """Also with another batch size in between, and when graphs are replayed."""
    plain = Decoder(TensorRTBackend(engines(plugins), cuda_graphs=False), TOKENS)
    captured = Decoder(TensorRTBackend(engines(plugins)), TOKENS)
    for batch in (3, 1, 3, 4, 1, 3):
        images = pixels(plain.backend, batch)
        assert captured(images).token_ids == plain(images).token_ids


@pytest.mark.parametrize("plugins", FOLDERS)
def test_replays_use_no_stale_state(engines, plugins: str):
    """A graph captured for one image must read another one's buffers."""
    backend = TensorRTBackend(engines(plugins))
    decode = Decoder(backend, TOKENS)
    first, second = torch.zeros_like(pixels(backend, 2)), pixels(backend, 2)
    runs = [decode(images) for images in (first, second, first, second)]
    assert runs[0].mean_log_probs == runs[2].mean_log_probs
    assert runs[1].mean_log_probs == runs[3].mean_log_probs
    assert runs[0].mean_log_probs != runs[1].mean_log_probs


@pytest.mark.parametrize("plugins", FOLDERS)
def test_beam_search_is_that_of_torch_in_fp32(checkpoint, tmp_path_factory, reference, plugins: str):
    """Also when graphs are replayed, and with the other set of buffers for the images' keys and values."""
    out = tmp_path_factory.mktemp("beams") / plugins
    model = str(checkpoint("small"))
    folder = build(model, plugins, "fp32", (1, 2, 4), out, num_beams=3, timing_cache=TIMING_CACHE)
    backend = TensorRTBackend(folder)
    for settings in (SearchSettings(3), SearchSettings(2, 2.0, 3, True), SearchSettings(1, 1.0, 2)):
        decode, expected = Decoder(backend, TOKENS, settings), Decoder(reference, TOKENS, settings)
        for batch in (4, 4, 3, 4, 1, 4):
            images = pixels(backend, batch)
            found, wanted = decode(images), expected(images)
            assert found.token_ids == wanted.token_ids
            assert found.mean_log_probs == pytest.approx(wanted.mean_log_probs, abs=1e-3)
    with pytest.raises(GenerationError, match=r"num_beams is 13, .* at most 12 rows"):
        Decoder(backend, TOKENS, SearchSettings(13))


def test_encoding_ahead_changes_nothing(engines):
    backend = TensorRTBackend(engines("fused"), device_decoder=False)
    decode = Decoder(backend, TOKENS)
    batches = [pixels(backend, batch) for batch in (4, 3, 4, 2, 4, 1)]
    alone = [decode(images) for images in batches]
    ahead = []
    encoding = backend.encode(batches[0])
    for images, following in zip(batches, [*batches[1:], None], strict=True):
        current = encoding
        if following is not None:
            encoding = backend.encode(following)
        ahead.append(decode.decode(current, len(images)))
    assert ahead == alone


@pytest.mark.parametrize("plugins", FOLDERS)
def test_selected_images_go_on(engines, plugins: str):
    """After `select` a row's logits are those of the same history without it."""
    backend = TensorRTBackend(engines(plugins))
    images = pixels(backend, 4)
    tokens = torch.arange(4, device=backend.device)[:, None]

    def step(state, ids, position):
        return backend.step(state, ids, torch.full_like(ids, position)).float().clone()

    state = backend.start(images)
    step(state, tokens, 0)
    expected = step(state, tokens + 4, 1)
    state = backend.start(images)
    step(state, tokens, 0)
    chosen = torch.tensor([3, 1], device=backend.device)
    state = backend.select(state, chosen)
    found = step(state, tokens[chosen] + 4, 1)
    assert (found - expected[chosen]).abs().max() <= 0.01 * expected.abs().max()


def test_works_on_another_stream(engines):
    backend = TensorRTBackend(engines("fused"))
    images = pixels(backend, 2)
    expected = forced_logits(backend, images)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = forced_logits(backend, images)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(found, expected)


def test_manifest(engines):
    stock, fused = (Manifest.read(engines(plugins)) for plugins in FOLDERS)
    assert stock.engines.keys() == fused.engines.keys() == {"encoder", "cross_kv", "decoder"}
    assert stock.gpu == torch.cuda.get_device_name()
    assert stock.plugin_library_sha256 is None and len(fused.plugin_library_sha256) == 64
    assert (stock.cache, fused.cache) == ("growing", "fixed")


def test_second_build_is_a_no_op(engines, checkpoint, capsys):
    folder = engines("fused")
    before = (folder / FILE_NAME).stat().st_mtime_ns
    build(str(checkpoint("small")), "fused", "fp16", (1, 2, 4), folder, timing_cache=TIMING_CACHE)
    assert "up to date" in capsys.readouterr().out
    assert (folder / FILE_NAME).stat().st_mtime_ns == before


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the device decoder needs compute capability 9.0",
)
def test_one_search_of_more_lines_than_the_engines_batch(checkpoint, tmp_path):
    """Encoded in 3 batches for one search: as one by one, to the bit, and again when graphs are replayed."""
    folder = build(str(checkpoint("wide")), "fused", "fp16", (1, 2, 4), tmp_path, timing_cache=TIMING_CACHE)
    backend = TensorRTBackend(folder)
    decode = Decoder(backend, TOKENS)
    images = pixels(backend, 11)
    alone = [decode(images[first:end]) for first, end in ((0, 3), (3, 7), (7, 11))]
    for _ in range(3):
        found = decode(images)
        assert found.token_ids == [ids for part in alone for ids in part.token_ids]
        assert found.mean_log_probs == [value for part in alone for value in part.mean_log_probs]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the decoder's own beam search needs compute capability 9.0",
)
def test_beam_search_as_a_whole(checkpoint, tmp_path):
    """More rows than the engines have room for; as step by step, but for near ties of two roundings."""
    folder = build(str(checkpoint("wide")), "fused", "fp16", (1, 2, 4), tmp_path, timing_cache=TIMING_CACHE)
    whole, steps = TensorRTBackend(folder), TensorRTBackend(folder, device_decoder=False)
    settings = SearchSettings(4, 2.0, 3, True)
    assert whole.searches(settings) and not steps.searches(settings)
    images = pixels(whole, 11)
    decode = Decoder(whole, TOKENS, settings)
    found = decode(images)
    assert decode(images) == found
    by_step = Decoder(steps, TOKENS, settings)
    expected = [by_step(images[i : i + 1]).token_ids[0] for i in range(len(images))]
    assert sum(map(list.__eq__, found.token_ids, expected)) >= 10


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="the device decoder needs compute capability 9.0",
)
@pytest.mark.parametrize(("architecture", "many"), [("small", 3), ("base", 3), ("base", 11)])
def test_encoding_and_search_in_one_graph(architecture: str, many: int, tmp_path):
    """As one after the other, to the bit: on both sets of buffers, replayed, and between other encodings."""
    changes = SMALL_DECODER if architecture == "small" else DECODER | WIDE
    encoder, decoder = ARCHITECTURES[architecture]
    model = write_random_checkpoint(
        encoder | ENCODER, decoder | changes, tmp_path / "model", torch.float32, 0
    )
    profile = (1, 2, many + 1)
    folder = build(str(model), "fused", "fp16", profile, tmp_path / "engines", timing_cache=TIMING_CACHE)
    backend = TensorRTBackend(folder)
    decode = Decoder(backend, TOKENS)
    sizes = (many, 1, many, many + 1, 1, many, many)
    batches = [pixels(backend, n).roll(i) for i, n in enumerate(sizes)]
    apart = [decode.decode(decode.encode(images, alone=False), len(images)) for images in batches]
    for _ in range(3):
        for images, expected in zip(batches, apart, strict=True):
            encoding = decode.encode(images, alone=True)
            assert encoding.found is not None
            assert decode.decode(encoding, len(images)) == expected
    earlier = decode.encode(batches[0], alone=False)
    assert decode(batches[1]) == apart[1]
    assert decode.decode(earlier, many) == apart[0]
    both = [decode.encode(images, alone=True) for images in batches[1:3]]
    assert [decode.decode(encoding, encoding.images) for encoding in both] == apart[1:3]
    other = Decoder(backend, TOKENS - 2)
    assert other.decode(both[1], many).token_ids == [ids[: TOKENS - 2] for ids in apart[2].token_ids]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="searches that read e4m3 need compute capability 9.0",
)
def test_reads_lines_in_e4m3(tmp_path):
    """Nearly the tokens of float16, and a line's text alone is that among others: each replayed, too."""
    folder = build(
        str(BUNDLED_MODEL), "fused", "fp16", (1, 16, 64), tmp_path / "engines", timing_cache=TIMING_CACHE
    )
    texts = {}
    with line_images(BUNDLED_MODEL.parent.parent / LINES, most=40) as images:
        for batch in (1, 40):
            exact, rounded = (
                Recognizer(folder, backend="tensorrt", batch_size=batch, e4m3_cross=asked)
                for asked in (False, True)
            )
            assert rounded.backend.reads_e4m3(batch) and not exact.backend.reads_e4m3(batch)
            expected, found, again = (r.recognize(images) for r in (exact, rounded, rounded))
            texts[batch] = [result.text for result in found]
            pairs = [
                pair
                for results in zip(found, expected, strict=True)
                for pair in zip_longest(*(result.token_ids for result in results))
            ]
            assert sum(one == other for one, other in pairs) >= 0.98 * len(pairs)
            found, again, expected = (
                [result.mean_log_prob for result in results] for results in (found, again, expected)
            )
            assert found == again != expected
    assert texts[1] == texts[40]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="searches that read e4m3 need compute capability 9.0",
)
def test_which_searches_of_wide_heads_read_e4m3(tmp_path):
    """Those of up to 16 lines; more are as without, to the bit."""
    encoder, decoder = ARCHITECTURES["base"]
    model = write_random_checkpoint(
        encoder | ENCODER, decoder | DECODER | WIDE, tmp_path / "model", torch.float32, 0
    )
    folder = build(str(model), "fused", "fp16", (1, 16, 20), tmp_path / "engines", timing_cache=TIMING_CACHE)
    exact, rounded = (TensorRTBackend(folder, e4m3_cross=asked) for asked in (False, True))
    assert [rounded.reads_e4m3(images) for images in (1, 16, 17)] == [True, True, False]
    for batch, same in ((16, False), (17, True), (3, False)):
        images = pixels(exact, batch)
        found, expected = (Decoder(backend, TOKENS)(images) for backend in (rounded, exact))
        assert (found.mean_log_probs == expected.mean_log_probs) == same


def test_e4m3_where_no_search_reads_it(engines):
    """With stock engines, and step by step."""
    for plugins, options in (("none", {}), ("fused", {"device_decoder": False})):
        folder = engines(plugins)
        with pytest.raises(EngineError, match=rf"{folder}: no search here .*--precision fp16 or fp8.* leave"):
            TensorRTBackend(folder, e4m3_cross=True, **options)


def test_batch_above_the_profile(engines):
    backend = TensorRTBackend(engines("fused"), device_decoder=False)
    with pytest.raises(EngineError, match=r"encoder.engine: a batch of 5 is above 4.*--batch"):
        backend.start(pixels(backend, 5))


def test_pixels_on_the_gpu_and_normalised_ones(engines):
    """uint8 from the GPU as from the host; floats are normalised, which fused does not take."""
    stock, fused = (TensorRTBackend(engines(plugins)) for plugins in FOLDERS)
    images = pixels(stock, 2)
    for backend in (stock, fused):
        assert torch.equal(forced_logits(backend, images.cuda()), forced_logits(backend, images))
    assert torch.equal(forced_logits(stock, stock.normalization(images)), forced_logits(stock, images))
    with pytest.raises(BackendError, match=r"torch\.float32, and this encoder takes uint8"):
        fused.start(stock.normalization(images))


def test_more_tokens_than_the_cache(engines):
    backend = TensorRTBackend(engines("fused"))
    with pytest.raises(GenerationError, match="33"):
        Decoder(backend, 33)


def test_wrong_tensors(engines):
    engine = Engine.load(engines("none"), "encoder")
    images = torch.zeros(1, 3, 48, 48, dtype=torch.float16, device="cuda")
    outputs = engine.empty_outputs({"pixel_values": images})
    with pytest.raises(EngineError, match="no tensor for last_hidden_state"):
        engine.bind({"pixel_values": images})
    with pytest.raises(EngineError, match=r"pixel_values is torch\.float32"):
        engine.bind({"pixel_values": images.float()} | outputs)
    with pytest.raises(EngineError, match=r"pixel_values has shape \[1, 3, 48, 32\]"):
        engine.bind({"pixel_values": images[..., :32].contiguous()} | outputs)
    with pytest.raises(EngineError, match=r"a batch of 8 is above 4"):
        engine.bind({"pixel_values": images.repeat(8, 1, 1, 1)} | outputs)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("gpu", "NVIDIA L4", r"built for NVIDIA L4"),
        ("compute_capability", "8.9", r"compute capability 8\.9"),
        ("tensorrt", "9.9.9", r"built with TensorRT 9\.9\.9"),
    ],
)
def test_engines_of_another_machine(engines, tmp_path: Path, field: str, value: str, message: str):
    folder = Path(shutil.copytree(engines("none"), tmp_path / "copy"))
    content = json.loads((folder / FILE_NAME).read_text())
    content[field] = value
    (folder / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(EngineError, match=message):
        Engine.load(folder, "encoder")


def test_damaged_engine(engines, tmp_path: Path):
    folder = Path(shutil.copytree(engines("none"), tmp_path / "copy"))
    plan = bytearray((folder / "encoder.engine").read_bytes())
    plan[len(plan) // 2] ^= 1
    (folder / "encoder.engine").write_bytes(plan)
    with pytest.raises(EngineError, match=r"encoder\.engine: damaged or replaced"):
        Engine.load(folder, "encoder")
