"""Beam search against Hugging Face's `generate`: same tokens and scores, on random and on trained weights."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoImageProcessor, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from graph_surgery.checkpoint import ModelSpec, load_model, load_spec
from runtime.backends.torch_backend import TorchBackend
from runtime.beam_search import BeamSearch
from runtime.generation import Decoder
from runtime.images import load_image
from runtime.search import Generation, GenerationError, SearchSettings, ban_repeated_ngrams
from tests.checkpoints import CASES
from tests.conftest import BUNDLED_MODEL
from tests.test_generation import (
    NEW_TOKENS,
    NORMALIZATION,
    ending_tokens,
    generate,
    open_backend,
    pixel_values,
)

SAMPLES = sorted((BUNDLED_MODEL.parent.parent / "samples").glob("*.jpg"))
GRID = [
    SearchSettings(*values)
    for values in itertools.product(range(1, 6), (0.0, 0.8, 1.0, 2.0), (0, 3), (False, True, "never"))
    if values[0] > 1 or values[1:] in ((1.0, 0, False), (1.0, 3, False))
]


def expected_generation(
    model: VisionEncoderDecoderModel,
    pixels: torch.Tensor | None,
    spec: ModelSpec,
    settings: SearchSettings,
    **inputs,
) -> tuple[list[list[int]], list[float] | None]:
    """Hugging Face's tokens a row; and in beam search the mean log-probabilities."""
    found = model.generate(
        None if pixels is None else NORMALIZATION(pixels),
        eos_token_id=list(spec.eos_token_ids),
        pad_token_id=spec.pad_token_id,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
        **asdict(settings),
        **inputs,
    )
    rows = []
    for row in found.sequences[:, 1:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in spec.eos_token_ids), len(row))
        rows.append(row[:end])
    if settings.num_beams == 1:
        return rows, None
    scores = found.sequences_scores.tolist()
    exponent = settings.length_penalty - 1
    return rows, [score * len(row) ** exponent for row, score in zip(rows, scores, strict=True)]


def check(found: Generation, expected: tuple[list[list[int]], list[float] | None]) -> None:
    token_ids, mean_log_probs = expected
    assert found.token_ids == token_ids
    if mean_log_probs is not None:
        assert found.mean_log_probs == pytest.approx(mean_log_probs, abs=1e-4)


@cache
def with_varied_ends(folder: Path) -> tuple[ModelSpec, VisionEncoderDecoderModel, torch.Tensor]:
    """A random checkpoint whose rows end at different steps, the model, and pixel values of five images."""
    spec = load_spec(folder)
    model, pixels = load_model(spec), pixel_values(spec, batch=5)
    never = spec.decoder.vocab_size
    ends = ending_tokens(generate(model, pixels, eos_token_id=never).sequences, never)
    return replace(spec, eos_token_ids=tuple(e for e in ends if e != never)), model, pixels


@cache
def expected_of_small(folder: Path, settings: SearchSettings) -> tuple[list[list[int]], list[float] | None]:
    spec, model, pixels = with_varied_ends(folder)
    return expected_generation(model, pixels, spec, settings)


@pytest.mark.parametrize("backend_name", ["torch", "none", "all"])
@pytest.mark.parametrize("case", CASES)
def test_every_architecture(
    case: str, backend_name: str, checkpoint: Callable[[str], Path], graphs: Callable[[Path, str], Path]
):
    spec, model, pixels = with_varied_ends(checkpoint(case))
    backend = open_backend(backend_name, spec, graphs)
    for settings in (SearchSettings(3), SearchSettings(4, 2.0, 3, True)):
        found = Decoder(backend, NEW_TOKENS, settings)(pixels)
        check(found, expected_generation(model, pixels, spec, settings))


@pytest.mark.parametrize("backend_name", ["torch", "none", "all"])
def test_every_setting(
    backend_name: str, checkpoint: Callable[[str], Path], graphs: Callable[[Path, str], Path]
):
    spec, _, pixels = with_varied_ends(checkpoint("small"))
    backend = open_backend(backend_name, spec, graphs)
    texts = set()
    for settings in GRID:
        expected = expected_of_small(checkpoint("small"), settings)
        found = Decoder(backend, NEW_TOKENS, settings)(pixels)
        check(found, expected)
        texts.add(str(found.token_ids))
    assert len(texts) > 10  # the settings do make a difference here


@pytest.mark.slow
@pytest.mark.parametrize("settings", GRID, ids=lambda s: "-".join(map(str, asdict(s).values())))
def test_sample_lines(settings: SearchSettings, bundled):
    spec, model, backend, hidden, encoding = bundled
    expected = expected_generation(model, None, spec, settings, encoder_outputs=BaseModelOutput(hidden))
    check(Decoder(backend, NEW_TOKENS, settings).decode(encoding, len(hidden)), expected)


@pytest.fixture(scope="module")
def bundled(graphs: Callable[[Path, str], Path]):
    """The bundled checkpoint, on PyTorch and on fused ONNX Runtime graphs; six sample lines, encoded."""
    spec = load_spec(BUNDLED_MODEL)
    model, backend = load_model(spec), open_backend("all", spec, graphs)
    processor = AutoImageProcessor.from_pretrained(BUNDLED_MODEL)
    images = [load_image(path, path.name) for path in SAMPLES[:6]]
    pixels = processor(images, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    with torch.inference_mode():
        hidden = model.encoder(pixel_values=NORMALIZATION(pixels)).last_hidden_state
        return spec, model, backend, hidden, backend.encode(pixels)


def test_an_image_does_not_depend_on_its_batch(checkpoint: Callable[[str], Path]):
    """Images of a batch are certain at different steps, and the batch is halved on the way."""
    spec, _, pixels = with_varied_ends(checkpoint("base-stage1"))
    backend = TorchBackend(spec)
    selected = []
    select = backend.select
    backend.select = lambda state, images: selected.append(len(images)) or select(state, images)
    decode = Decoder(backend, NEW_TOKENS, SearchSettings(3, early_stopping=True))
    whole = decode(pixels)
    assert selected == [2, 1]
    for row in range(len(pixels)):
        alone = decode(pixels[row : row + 1])
        assert alone.token_ids == whole.token_ids[row : row + 1]
        assert alone.mean_log_probs == pytest.approx(whole.mean_log_probs[row : row + 1], abs=1e-5)
    assert decode(pixels).token_ids == whole.token_ids


class NoSynchronisation(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or give tensors of a size that depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = str(func)
        assert not any(forbidden in name for forbidden in self.FORBIDDEN), name
        if "index" in name and len(args) > 1 and isinstance(args[1], (list, tuple)):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        SearchSettings(),
        SearchSettings(1, 1.0, 3),
        SearchSettings(4),
        SearchSettings(3, 2.0, 3, "never"),
        SearchSettings(2, early_stopping=True),
    ],
)
def test_a_step_can_become_a_cuda_graph(settings: SearchSettings, checkpoint: Callable[[str], Path]):
    """Nothing synchronises, everything that lasts stays at its address, and each step does the same calls."""
    spec, _, pixels = with_varied_ends(checkpoint("small"))
    backend = TorchBackend(spec)
    search = Decoder(backend, NEW_TOKENS, settings).search(len(pixels))
    search.state = backend.start(pixels, settings.num_beams)
    search.reset()
    vocab, rows = spec.decoder.vocab_size, len(pixels) * settings.num_beams
    logits = torch.randn((NEW_TOKENS, rows, vocab), generator=torch.Generator().manual_seed(4))
    given = iter(logits)
    backend.step = lambda state, input_ids, position_ids: next(given)
    backend.reorder = lambda state, rows, position_ids: None
    lasting = [t for t in vars(search).values() if isinstance(t, torch.Tensor)]
    assert len(lasting) > 6
    addresses = [tensor.data_ptr() for tensor in lasting]
    calls = set()
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(NEW_TOKENS):
            with NoSynchronisation() as mode:
                search.step()
            calls.add(mode.calls)
    assert len(calls) == 1
    kept = [t for t in vars(search).values() if isinstance(t, torch.Tensor)]
    assert [tensor.data_ptr() for tensor in kept] == addresses


def test_repeated_ngrams_are_banned():
    ids = torch.tensor([[5, 6, 7, 5, 6, 0, 0], [5, 6, 7, 6, 5, 0, 0], [3, 3, 3, 3, 3, 0, 0]])
    position = torch.full((3, 1), 4)

    def banned(size: int) -> list[list[int]]:
        scores = torch.zeros(3, 10)
        ban_repeated_ngrams(scores, ids, position, size)
        return [row.isinf().nonzero().flatten().tolist() for row in scores]

    assert banned(3) == [[7], [], [3]]
    assert banned(2) == [[7], [6], [3]]
    assert banned(1) == [[5, 6, 7], [5, 6, 7], [3]]
    assert banned(6) == [[], [], []]
    assert banned(60) == [[], [], []]  # longer than any text may become


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; choose 1"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; choose a finite number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1; choose a positive"),
        ({"early_stopping": "maybe"}, "early_stopping is 'maybe'; choose False, True or 'never'"),
    ],
)
def test_settings_that_mean_nothing(settings: dict, message: str):
    with pytest.raises(GenerationError, match=message):
        SearchSettings(**settings)


@pytest.mark.parametrize("penalty", [1e300, 1000.0, 30.0, -30.0, -1000.0])
def test_length_penalty_that_no_number_holds(penalty: float, checkpoint: Callable[[str], Path]):
    """Its powers overflow, or all hypotheses become equally bad."""
    backend = TorchBackend(load_spec(checkpoint("small")))
    with pytest.raises(GenerationError, match=r"length_penalty is .*20 tokens.*; choose one nearer to 0"):
        Decoder(backend, 20, SearchSettings(2, length_penalty=penalty))
    Decoder(backend, 20, SearchSettings(2, length_penalty=math.copysign(9, penalty)))
    Decoder(backend, 20, SearchSettings(1, length_penalty=penalty))  # of beam search only


def test_more_candidates_than_tokens(checkpoint: Callable[[str], Path]):
    backend = TorchBackend(load_spec(checkpoint("small")))
    with pytest.raises(GenerationError, match=r"num_beams is 61: 122 candidates .* has 120 tokens"):
        BeamSearch(backend, 1, NEW_TOKENS, SearchSettings(61))
