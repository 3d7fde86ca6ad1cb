"""Beam search on the GPU against runtime.beam_search over a PyTorch decoder; what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from profiling.device_decoder import cross_of_states, random_cross, random_states
from runtime.device_decoder import DeviceDecoder
from runtime.search import SearchSettings
from tests.beam_reference import assert_right, likely_ends
from tests.decoder_outputs import poisoned_outputs
from tests.test_device_decoder import settings, weights_of

FOUR = SearchSettings(4)
SETTINGS = (
    SearchSettings(2, length_penalty=0.0),
    SearchSettings(3, length_penalty=2.0, no_repeat_ngram_size=2, early_stopping=True),
    FOUR,
    SearchSettings(4, length_penalty=0.8, no_repeat_ngram_size=1, early_stopping="never"),
    SearchSettings(5, length_penalty=-1.0, early_stopping="never"),
    SearchSettings(8, early_stopping=True),
)


def attended(config, name, images, dtype, states):
    """What cross-attention reads, and the keys and values that this is for the reference."""
    if not states:
        cross = random_cross(config, images, dtype, "cuda", seed=images)
        return cross, cross
    found = random_states(config, images, dtype, "cuda", seed=images)
    return found, cross_of_states(weights_of(name, dtype), config, found)


def with_ends(name, dtype, ends=1) -> dict:
    """The decoder's configuration with so many ids that end a text."""
    config = settings(name, dtype)
    _, cross = attended(config, name, 8, dtype, False)
    return config | {"eos_ids": likely_ends(weights_of(name, dtype), config, cross, ends)}


def search(hopper, name, dtype, config, source, images, steps, chosen, slots=64):
    """The device's outputs from poisoned buffers, and its decoder."""
    decoder = DeviceDecoder(hopper, weights_of(name, dtype), config, slots, steps)
    outputs = poisoned_outputs(decoder, images, steps)
    decoder.search_beams(source, outputs, chosen)
    torch.cuda.synchronize()
    return outputs, decoder


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
@pytest.mark.parametrize("images", (1, 3, 8))
@pytest.mark.parametrize(("name", "states"), (("bundled", False), ("small", False), ("relu", True)))
def test_finds_what_the_reference_finds(hopper, name, states, images, chosen):
    dtype = torch.float16
    config = with_ends(name, dtype)
    source, cross = attended(config, name, images, dtype, states)
    outputs, _ = search(hopper, name, dtype, config, source, images, 12, chosen)
    assert_right(weights_of(name, dtype), config, cross, outputs, chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("images", (1, 2, 16))
@pytest.mark.parametrize(
    ("name", "states"),
    (("bundled", False), ("small", False), ("base", False), ("base", True), ("odd", False)),
)
def test_decoders(hopper, name, states, images, dtype):
    if name == "base" and not states and images * 4 > 8:
        pytest.skip("so many rows attend to states")
    config = with_ends(name, dtype, ends=2 if name == "small" else 1)
    source, cross = attended(config, name, images, dtype, states)
    outputs, _ = search(hopper, name, dtype, config, source, images, 20, FOUR)
    assert_right(weights_of(name, dtype), config, cross, outputs, FOUR)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("bundled", "relu"))
def test_long_texts(hopper, name):
    """No end, and more tokens than a row's warps hold at once."""
    dtype, config = torch.float16, settings(name, torch.float16)
    config = config | {"eos_ids": [config["vocab_size"] - 1]}
    source, cross = attended(config, name, 2, dtype, False)
    outputs, _ = search(hopper, name, dtype, config, source, 2, 150, FOUR)
    assert_right(weights_of(name, dtype), config, cross, outputs, FOUR)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "states"), (("bundled", False), ("relu", True)))
def test_an_image_does_not_depend_on_its_neighbours(hopper, name, states):
    """In another order, and in groups: more rows than fit at once. The same bits."""
    dtype, images = torch.float16, 37
    config = settings(name, dtype)
    source, _ = attended(config, name, images, dtype, states)
    chosen = SearchSettings(4, length_penalty=0.0, early_stopping=True)
    free, _ = search(hopper, name, dtype, config, source, images, 12, chosen)
    said = Counter(free[0][:, 3:].flatten().tolist())
    config |= {"eos_ids": [token for token, _ in said.most_common(2)]}  # texts that say them end there
    outputs, decoder = search(hopper, name, dtype, config, source, images, 12, chosen)
    expected = [tensor.clone() for tensor in outputs]
    assert expected[2].unique().numel() > 1  # texts of several lengths
    order = torch.randperm(images, device="cuda")
    if states:
        shuffled = source[order].contiguous()
    else:
        shuffled = tuple([tensor[order].contiguous() for tensor in tensors] for tensors in source)
    decoder.search_beams(shuffled, outputs, chosen)
    torch.cuda.synchronize()
    for got, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(got, wanted[order])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("bundled", "relu"))
def test_searches_of_all_kinds_on_one_decoder(hopper, name):
    """Greedy and beam searches of several sizes one after another, on other streams: the same every time."""
    dtype = torch.float16
    config = with_ends(name, dtype)
    source, _ = attended(config, name, 6, dtype, False)
    few = tuple([tensor[:2].contiguous() for tensor in tensors] for tensors in source)
    decoder = DeviceDecoder(hopper, weights_of(name, dtype), config, 64, 12)
    runs = [
        (lambda outputs: decoder.run(source, outputs), 6),
        (lambda outputs: decoder.search_beams(few, outputs, FOUR), 2),
        (lambda outputs: decoder.search_beams(few, outputs, SETTINGS[1]), 2),
        (lambda outputs: decoder.search_beams(few, outputs, FOUR, stop=False), 2),
    ]
    outputs = [decoder.outputs(images, 12) for _, images in runs]
    seen = []
    stream = torch.cuda.Stream()
    for turn in range(3):
        with torch.cuda.stream(stream if turn == 1 else torch.cuda.current_stream()):
            for (run, _), its in zip(runs, outputs, strict=True):
                for tensor in its:
                    tensor.fill_(-3)
                run(its)
        torch.cuda.synchronize()
        seen.append([tensor.tolist() for its in outputs for tensor in its])
    for later in seen[1:]:
        assert later == seen[0]
    assert (outputs[3][2] == 12).all()


@pytest.mark.gpu
def test_refuses(hopper):
    dtype, name = torch.float16, "bundled"
    config = settings(name, dtype) | {"eos_ids": [3]}
    assert hopper.beam_search_obstacle(config, 8) is None
    assert "more than 8" in hopper.beam_search_obstacle(config, 9)
    assert "candidates" in hopper.beam_search_obstacle(config | {"eos_ids": [3, 4, 5, 6, 7]}, 6)
    assert "131072" in hopper.beam_search_obstacle(config | {"vocab_size": 140000}, 2)
    source, _ = attended(config, name, 2, dtype, False)
    decoder = DeviceDecoder(hopper, weights_of(name, dtype), config, 64, 12)
    with pytest.raises(RuntimeError, match="max_new_tokens"):
        decoder.search_beams(source, decoder.outputs(2, 13), FOUR)
