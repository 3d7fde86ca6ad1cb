"""The kernels between two steps of a beam search (beams_sm90.cu), on a CPU, against runtime.beam_search."""

from __future__ import annotations

import ctypes
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from runtime.search import Generation, SearchSettings, length_penalties, make_generation
from tests.beam_reference import host_search

START, PAD = 5, 1
INTEGERS = (
    "images",
    "beams",
    "candidates",
    "vocabulary",
    "lists",
    "capacity",
    "max_new_tokens",
    "no_repeat_ngram",
)
POINTERS = (
    "penalties",
    "logits",
    "ranked",
    "normalizers",
    "rows",
    "inputs",
    "owners",
    "running",
    "running_scores",
    "complete",
    "complete_scores",
    "complete_lengths",
    "open",
    "arrived",
    "tokens",
    "log_probs",
    "lengths",
)


class DeviceSearch(ctypes.Structure):
    """The struct BeamSearch of beams.h."""

    _fields_ = (
        *((name, ctypes.c_int) for name in INTEGERS),
        ("stops_early", ctypes.c_bool),
        ("hopes_long", ctypes.c_bool),
        ("start_id", ctypes.c_int),
        ("pad_id", ctypes.c_int),
        ("end_ids", ctypes.c_int * 8),
        ("ends", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in POINTERS),
    )


class Logits:
    """A language: logits of the next token by image, position and last token."""

    def __init__(self, images: int, steps: int, vocabulary: int, ends: tuple[int, ...], seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(images, steps, 16, vocabulary, generator=generator) * (1 + seed % 3)
        self.table[..., list(ends)] += 2 * (seed % 4)
        self.ends, self.images, self.vocabulary = ends, images, vocabulary

    def of(self, image: int, position: int, token: int) -> torch.Tensor:
        return self.table[image, position, token % 16]


def on_device(kernels, logits: Logits, steps: int, settings: SearchSettings) -> Generation:
    """The kernels' result; at every step, a row finds its hypothesis in the caches of its ancestors."""
    images, beams = logits.images, settings.num_beams
    rows, lists = images * beams, -(-logits.vocabulary // 1024)
    candidates = max(2, 1 + len(logits.ends)) * beams
    capacity = steps + 3

    def integers(*shape: int) -> torch.Tensor:
        return torch.full(shape, -9, dtype=torch.int32)

    def floats(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan)

    tensors = {
        "penalties": length_penalties(steps, settings.length_penalty),
        "logits": floats(rows, logits.vocabulary),
        "ranked": integers(rows, lists, candidates, 2),
        "normalizers": floats(rows, lists, 2),
        "rows": integers(rows, 2),
        "inputs": integers(rows),
        "owners": integers(rows, capacity),
        "running": integers(rows, 1 + steps),
        "running_scores": floats(rows),
        "complete": integers(rows, steps),
        "complete_scores": floats(rows),
        "complete_lengths": integers(rows),
        "open": integers(1),
        "arrived": integers(1),
        "tokens": integers(images, steps),
        "log_probs": floats(images),
        "lengths": integers(images),
    }
    search = DeviceSearch(
        images=images,
        beams=beams,
        candidates=candidates,
        vocabulary=logits.vocabulary,
        lists=lists,
        capacity=capacity,
        max_new_tokens=steps,
        no_repeat_ngram=settings.no_repeat_ngram_size,
        stops_early=settings.early_stopping is True,
        hopes_long=settings.hopes_long,
        start_id=START,
        pad_id=PAD,
        end_ids=(ctypes.c_int * 8)(*logits.ends),
        ends=len(logits.ends),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    assert ctypes.sizeof(search) == kernels.beam_search_bytes
    kernels.begin_beams(ctypes.addressof(search))
    cache = integers(rows, capacity)  # of the tokens themselves, in place of their keys
    for position in itertools.count():
        assert position < steps
        for row in range(rows):
            line, its = tensors["rows"][row].tolist()
            if line < 0:
                continue
            assert (line, its) == (row // beams, position)
            cache[row, position] = tensors["inputs"][row]
            owners = tensors["owners"][row, :position].long()
            history = [*cache[owners, torch.arange(position)].tolist(), tensors["inputs"][row].item()]
            assert history == tensors["running"][row, : position + 1].tolist()
            tensors["logits"][row] = logits.of(line, position, history[-1])
        if not kernels.advance_beams(ctypes.addressof(search)):
            break
    lengths = tensors["lengths"]
    behind = torch.arange(steps) >= lengths[:, None]
    assert (tensors["tokens"][behind] == PAD).all()
    return make_generation(tensors["tokens"], lengths, tensors["log_probs"] / lengths)


class StepBackend:
    """What BeamSearch needs of a backend."""

    name, device = "table", torch.device("cpu")

    def __init__(self, logits: Logits, beams: int):
        self.logits, self.beams = logits, beams
        self.spec = SimpleNamespace(
            decoder=SimpleNamespace(vocab_size=logits.vocabulary),
            decoder_start_token_id=START,
            pad_token_id=PAD,
            eos_token_ids=logits.ends,
        )

    def step(self, state, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        ids = zip(position_ids.flatten().tolist(), input_ids.flatten().tolist(), strict=True)
        return torch.stack([self.logits.of(row // self.beams, *both) for row, both in enumerate(ids)])

    def reorder(self, state, rows: torch.Tensor, position_ids: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("vocabulary", (40, 97, 1024, 1025, 3000))
@pytest.mark.parametrize("beams", (2, 3, 4, 8))
def test_is_that_of_the_host(cpu_kernels, vocabulary: int, beams: int):
    """Every length penalty, n-gram size and kind of end, on random languages."""
    choices = random.Random(f"{vocabulary} {beams}")
    lengths = set()
    for seed, early_stopping in enumerate((False, True, "never") * 3):
        ends = tuple(choices.sample(range(30), choices.choice((0, 1, 1, 2) if beams < 8 else (0, 1))))
        penalty, ngram = choices.choice((0.0, 0.8, 1.0, 2.0, -1.0)), choices.choice((0, 0, 1, 2, 3))
        settings = SearchSettings(beams, penalty, ngram, early_stopping)
        steps = choices.choice((1, 6, 12))
        logits = Logits(choices.choice((1, 2, 3)), steps, vocabulary, ends, seed)
        found = on_device(cpu_kernels, logits, steps, settings)
        expected = host_search(StepBackend(logits, beams), logits.images, steps, settings)
        assert found.token_ids == expected.token_ids, (settings, ends, steps)
        assert found.mean_log_probs == pytest.approx(expected.mean_log_probs, abs=1e-4)
        lengths |= {(len(ids), steps) for ids in found.token_ids}
    assert any(length < steps for length, steps in lengths)
