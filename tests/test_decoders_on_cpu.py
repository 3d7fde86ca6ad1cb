"""The decoders' CUDA kernels on a CPU (tests/cpu_cuda) against the PyTorch decoder of the GPU tests.

What tests/test_greedy_decoder.py asks on a GPU, on smaller decoders: the emulated machine has room for two
teams, so that 3 and 9 lines already need teams of two and of eight rows.
"""

from __future__ import annotations

import importlib
import platform
from types import ModuleType

import pytest
import torch

from profiling.greedy_decoder import (
    DECODERS,
    cross_of_states,
    differences,
    random_cross,
    random_states,
    random_weights,
)
from runtime.greedy_decoder import GreedyDecoder
from runtime.kernels import load_kernels

TEAM = DECODERS["bundled"] | {"num_layers": 2, "source_length": 150}
CHAIN = DECODERS["base"] | {
    "num_layers": 2,
    "hidden_size": 256,
    "num_heads": 4,
    "ffn_size": 512,
    "vocab_size": 203,
    "source_length": 77,
    "encoder_size": 384,
}
CASES = {
    "team": TEAM,
    "narrow team": TEAM | {"hidden_size": 192, "num_heads": 6, "ffn_size": 320, "source_length": 9},
    "chain": CHAIN,
    "relu": CHAIN | {"activation": "relu", "embedding_norm": 0, "embed_scale": 2.0, "source_length": 33},
    "wide states": CHAIN | {"encoder_size": 1024, "num_layers": 1},
    "base states": CHAIN | {"encoder_size": 768, "num_layers": 1, "source_length": 300},
}


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if platform.machine() != "x86_64":
        pytest.skip("coroutines of tests/cpu_cuda are x86-64's")
    load_kernels()  # from the same folder
    return importlib.import_module("trocr_cpu_kernels")


def search(
    kernels, name, lines, steps, slots=None, states=False, dtype=torch.float16, attended=None, **changes
):
    """The outputs, from poisoned buffers, what was attended to, the configuration and the weights."""
    config = CASES[name] | {"dtype": str(dtype).removeprefix("torch.")} | changes
    weights = random_weights(config, dtype, "cpu")
    decoder = GreedyDecoder(kernels, weights, config, slots or lines, steps)
    if attended is None:
        attended = (random_states if states else random_cross)(config, lines, dtype, "cpu", seed=lines)
    outputs = decoder.outputs(lines, steps)
    outputs[0].fill_(-7)
    outputs[1].fill_(torch.nan)
    outputs[2].fill_(-7)
    decoder.run(attended, outputs, slots)
    return outputs, attended, config, weights


def assert_right(outputs, attended, config, weights) -> None:
    if isinstance(attended, torch.Tensor):
        attended = cross_of_states(weights, config, attended)
    found, _ = differences(weights, config, attended, outputs)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("lines", (1, 3, 6, 9))
@pytest.mark.parametrize("name", ("team", "narrow team"))
def test_teams(kernels, name, lines):
    dtype = torch.bfloat16 if lines == 3 else torch.float16
    assert_right(*search(kernels, name, lines, 4, dtype=dtype))


@pytest.mark.parametrize("lines", (1, 3, 9))
@pytest.mark.parametrize("name", ("chain", "relu"))
def test_the_chain_by_keys(kernels, name, lines):
    assert_right(*search(kernels, name, lines, 4))


@pytest.mark.parametrize(
    ("name", "lines"),
    (("chain", 1), ("relu", 17), ("chain", 33), ("wide states", 2), ("base states", 3), ("relu", 70)),
)
def test_the_chain_by_states(kernels, name, lines):
    dtype = torch.bfloat16 if lines == 3 else torch.float16
    assert_right(*search(kernels, name, lines, 3, slots=min(lines, 64), states=True, dtype=dtype))


@pytest.mark.parametrize("name", ("team", "relu"))
def test_a_text_longer_than_what_its_warps_hold(kernels, name):
    assert_right(*search(kernels, name, 1, 66, num_layers=1, source_length=8))


@pytest.mark.parametrize(("name", "slots"), (("team", 5), ("relu", 2)))
def test_finished_rows_take_the_next_line(kernels, name, slots):
    lines, steps = 8, 5
    free, attended, _, _ = search(kernels, name, lines, steps)
    ends = free[0][::3, 2].unique().tolist()
    outputs, _, config, weights = search(kernels, name, lines, steps, slots, attended=attended, eos_ids=ends)
    assert 1 <= outputs[2].min() < outputs[2].max()
    assert_right(outputs, attended, config, weights)
