"""The decoders' CUDA kernels on a CPU (tests/cpu_cuda) against the PyTorch decoder of the GPU tests.

What tests/test_device_decoder.py asks on a GPU, on smaller decoders: the emulated machine has room for two
teams, so that 3 and 9 lines already need teams of two and of eight rows.
"""

from __future__ import annotations

import pytest
import torch

from profiling.device_decoder import (
    DECODERS,
    cross_of_states,
    differences,
    random_cross,
    random_states,
    random_weights,
)
from runtime.backends.tensorrt_backend import DeviceSearch
from runtime.device_decoder import DeviceDecoder
from runtime.search import SearchRequest, SearchSettings
from tests import beam_reference
from tests.decoder_outputs import poisoned_outputs

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
WIDE = CHAIN | {"ffn_size": 1024}  # what the persistent kernel serves
CASES = {
    "wide": WIDE,
    "wide relu": WIDE | {"activation": "relu", "embedding_norm": 0, "num_layers": 3, "source_length": 300},
    "team": TEAM,
    "narrow team": TEAM | {"hidden_size": 192, "num_heads": 6, "ffn_size": 320, "source_length": 9},
    "chain": CHAIN,
    "relu": CHAIN | {"activation": "relu", "embedding_norm": 0, "embed_scale": 2.0, "source_length": 33},
    "wide states": CHAIN | {"encoder_size": 1024, "num_layers": 1},
    "base states": CHAIN | {"encoder_size": 768, "num_layers": 1, "source_length": 300},
}


def search(
    kernels,
    name,
    lines,
    steps,
    slots=None,
    states=False,
    dtype=torch.float16,
    attended=None,
    exact=None,
    **changes,
):
    """The outputs, from poisoned buffers, what was attended to, the configuration and the weights.

    `exact`: keys and values that are rounded to `attended` first.
    """
    config = CASES[name] | {"dtype": str(dtype).removeprefix("torch.")} | changes
    weights = random_weights(config, dtype, "cpu")
    decoder = DeviceDecoder(kernels, weights, config, slots or lines, steps)
    if attended is None:
        attended = (random_states if states else random_cross)(config, lines, dtype, "cpu", seed=lines)
    outputs = poisoned_outputs(decoder, lines, steps)
    if exact is not None:
        decoder.round_to_e4m3(exact, attended)
    decoder.run(attended, outputs, slots)
    return outputs, attended, config, weights


def assert_right(outputs, attended, config, weights) -> None:
    if isinstance(attended, torch.Tensor):
        attended = cross_of_states(weights, config, attended)
    found, _ = differences(weights, config, attended, outputs)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("lines", (1, 3, 6, 9))
@pytest.mark.parametrize("name", ("team", "narrow team"))
def test_teams(cpu_kernels, name, lines):
    dtype = torch.bfloat16 if lines == 3 else torch.float16
    assert_right(*search(cpu_kernels, name, lines, 4, dtype=dtype))


@pytest.mark.parametrize("pieces", (139, 203))
def test_shares_of_the_head(cpu_kernels, pieces):
    """One team beside eight blocks without rows. These have 18 pieces of the head each, the last one 13, and
    the team none; or 21 each, and the team's the other 35: a block four that it keeps, one it streams."""
    config = TEAM | {"num_layers": 1, "source_length": 8, "vocab_size": 32 * pieces - 5, "dtype": "float16"}
    weights = random_weights(config, torch.float16, "cpu")
    # Every logit twice, in another block or another tile: the lower token is right.
    head = weights["head_weight"]
    half = (len(head) + 1) // 2
    head[half:] = head[: len(head) - half]
    decoder = DeviceDecoder(cpu_kernels, weights, config, 1, 3)
    attended = random_cross(config, 1, torch.float16, "cpu")
    outputs = poisoned_outputs(decoder, 1, 3)
    decoder.run(attended, outputs)
    assert_right(outputs, attended, config, weights)
    assert outputs[0].max() < half


@pytest.mark.parametrize("lines", (1, 2, 3, 5, 8, 9, 16))
@pytest.mark.parametrize("name", ("wide", "wide relu"))
def test_the_persistent_kernel(cpu_kernels, name, lines):
    dtype = torch.bfloat16 if lines == 3 else torch.float16
    assert_right(*search(cpu_kernels, name, lines, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "lines", "source_length"),
    (
        *(("team", lines, 150) for lines in (1, 2, 3, 5, 9)),
        *(("team", lines, 578) for lines in (1, 4, 6)),
        ("narrow team", 3, 9),
        *(("wide", lines, 77) for lines in (1, 2, 3, 8, 12)),
        ("wide relu", 5, 300),
        ("wide relu", 11, 300),
    ),
)
def test_keys_and_values_of_e4m3(cpu_kernels, name, lines, source_length):
    """What is decoded is what PyTorch decodes by the rounded keys and values."""
    config = CASES[name] | {"source_length": source_length}
    exact = random_cross(config, lines, torch.float16, "cpu", seed=lines)
    rounded = tuple([torch.zeros_like(tensor, dtype=torch.float8_e4m3fn) for tensor in of] for of in exact)
    exact[0][0][0, 0, 0, :3] = torch.tensor([500.0, -60000.0, 2.0**-9])
    outputs, _, config, weights = search(
        cpu_kernels, name, lines, 4, attended=rounded, exact=exact, source_length=source_length
    )
    for got, of in zip((*rounded[0], *rounded[1]), (*exact[0], *exact[1]), strict=True):
        assert torch.equal(got.float(), of.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert_right(outputs, tuple([tensor.half() for tensor in of] for of in rounded), config, weights)


@pytest.mark.parametrize(("name", "most_by_keys"), (("team", None), ("wide", 4)))
def test_a_search_rounds_what_it_reads(cpu_kernels, name, most_by_keys):
    """As the runtime does it: of the first lines of larger buffers, time and again at the same addresses."""
    lines, most, steps = 3, 5, 4
    config = CASES[name] | {"dtype": "float16", "source_length": 77}
    weights = random_weights(config, torch.float16, "cpu")
    decoder = DeviceDecoder(cpu_kernels, weights, config, lines, steps)
    search = DeviceSearch(decoder, config["num_layers"], most_by_keys, e4m3_cross=True)
    addresses = []
    run = decoder.run

    def watched(attended, *arguments, **options):
        addresses.append([tensor.data_ptr() for part in attended for tensor in part])
        assert {(tensor.dtype, len(tensor)) for part in attended for tensor in part} == {
            (torch.float8_e4m3fn, lines)
        }
        run(attended, *arguments, **options)

    decoder.run = watched
    found = []
    for seed in (1, 2, 1):
        exact = random_cross(config, most, torch.float16, "cpu", seed)
        cross = {
            f"{layer}.encoder.{kind}": tensor
            for kind, part in zip(("key", "value"), exact, strict=True)
            for layer, tensor in enumerate(part)
        }
        result = search(torch.empty(0), cross, lines, SearchRequest(steps))
        rounded = tuple([t[:lines].to(torch.float8_e4m3fn).half() for t in part] for part in exact)
        outputs = (result.tokens, result.log_probs, result.lengths)
        assert_right(outputs, rounded, config, weights)
        found.append(result.memory.clone())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert addresses[0] == addresses[1] == addresses[2]


def test_e4m3_is_refused_where_it_cannot_be(cpu_kernels):
    for name, dtype in (("chain", torch.float16), ("team", torch.bfloat16), ("wide", torch.bfloat16)):
        keys, values = random_cross(CASES[name], 1, dtype, "cpu")
        cross = tuple([tensor.to(torch.float8_e4m3fn) for tensor in of] for of in (keys, values))
        with pytest.raises(RuntimeError, match="e4m3 are for float16"):
            search(cpu_kernels, name, 1, 2, dtype=dtype, attended=cross)


@pytest.mark.parametrize("lines", (1, 3, 9))
@pytest.mark.parametrize("name", ("chain", "relu"))
def test_the_chain_by_keys(cpu_kernels, name, lines):
    assert_right(*search(cpu_kernels, name, lines, 4))


@pytest.mark.parametrize(
    ("name", "lines"),
    (("chain", 1), ("relu", 17), ("chain", 33), ("wide states", 2), ("base states", 3), ("relu", 70)),
)
def test_the_chain_by_states(cpu_kernels, name, lines):
    dtype = torch.bfloat16 if lines == 3 else torch.float16
    assert_right(*search(cpu_kernels, name, lines, 3, slots=min(lines, 64), states=True, dtype=dtype))


@pytest.mark.parametrize(
    ("name", "lines"),
    (("team", 1), ("team", 9), ("relu", 3), ("wide", 1), ("wide", 3), ("wide relu", 8), ("wide", 12)),
)
def test_warps_at_their_own_pace(cpu_kernels, name, lines):
    """Some fall behind others of their block, and blocks behind blocks: the same bits."""
    expected, attended, config, weights = search(cpu_kernels, name, lines, 4)
    assert_right(expected, attended, config, weights)
    cpu_kernels.slow_warps(100)
    try:
        found, _, _, _ = search(cpu_kernels, name, lines, 4, attended=attended)
    finally:
        cpu_kernels.slow_warps(1)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ("team", "relu", "wide"))
def test_a_text_longer_than_what_its_warps_hold(cpu_kernels, name):
    assert_right(*search(cpu_kernels, name, 1, 66, num_layers=1, source_length=8))


@pytest.mark.parametrize(
    ("name", "slots", "states"),
    (
        ("team", 5, False),
        ("relu", 2, False),
        ("relu", 5, True),
        ("wide", 1, False),
        ("wide", 5, False),
        ("wide", 11, False),
    ),
)
def test_finished_rows_take_the_next_line(cpu_kernels, name, slots, states):
    lines, steps = 8 if slots < 8 else 17, 5
    free, attended, _, _ = search(cpu_kernels, name, lines, steps, states=states)
    ends = free[0][::3, 2].unique().tolist()
    outputs, _, config, weights = search(
        cpu_kernels, name, lines, steps, slots, attended=attended, eos_ids=ends
    )
    assert 1 <= outputs[2].min() < outputs[2].max()
    assert_right(outputs, attended, config, weights)


@pytest.mark.parametrize(
    ("name", "slots"), (("team", 5), ("chain", 5), ("wide", 5), ("wide relu", 5), ("wide", 12))
)
def test_a_line_does_not_depend_on_its_neighbours(cpu_kernels, name, slots):
    """In another order, so that most start at another token: the same bits."""
    lines, steps = slots + 3, 5
    free, attended, _, _ = search(cpu_kernels, name, lines, steps)
    ends = free[0][::3, 1:3].unique().tolist()
    expected, _, _, _ = search(cpu_kernels, name, lines, steps, slots, attended=attended, eos_ids=ends)
    order = torch.arange(lines).flip(0)
    shuffled = tuple([part[order].contiguous() for part in parts] for parts in attended)
    found, _, _, _ = search(cpu_kernels, name, lines, steps, slots, attended=shuffled, eos_ids=ends)
    assert expected[2].min() < steps
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted[order])


@pytest.mark.parametrize(
    ("name", "images", "states", "settings"),
    (
        ("team", 1, False, SearchSettings(4)),
        ("narrow team", 2, False, SearchSettings(3, 2.0, 2, True)),
        ("team", 4, False, SearchSettings(4, 0.8, 1, "never")),
        ("chain", 1, False, SearchSettings(2, 0.0)),
        ("relu", 2, False, SearchSettings(4, -1.0, 0, "never")),
        ("chain", 1, True, SearchSettings(8)),
        ("relu", 5, True, SearchSettings(4, 2.0, 3, True)),
        ("chain", 17, True, SearchSettings(4)),  # more rows than one search has
    ),
    ids=str,
)
def test_beam_search(cpu_kernels, name, images, states, settings):
    config, dtype, steps = CASES[name] | {"dtype": "float16"}, torch.float16, 7
    weights = random_weights(config, dtype, "cpu")
    if states:
        attended = random_states(config, images, dtype, "cpu", seed=images)
        cross = cross_of_states(weights, config, attended)
    else:
        attended = cross = random_cross(config, images, dtype, "cpu", seed=images)
    config["eos_ids"] = beam_reference.likely_ends(weights, config, cross, 1)
    decoder = DeviceDecoder(cpu_kernels, weights, config, 64, steps)
    assert decoder.searches_beams(settings.num_beams) and not decoder.searches_beams(9)
    outputs = decoder.outputs(images, steps)
    decoder.search_beams(attended, outputs, settings)
    beam_reference.assert_right(weights, config, cross, outputs, settings)
    first = [tensor.clone() for tensor in outputs]
    decoder.search_beams(attended, outputs, settings)
    assert all(map(torch.equal, first, outputs))
