"""The device decoder against a PyTorch decoder on the same weights; its packing; what it refuses."""

from __future__ import annotations

from functools import cache
from itertools import product as cartesian

import pytest
import torch
import torch.nn.functional as F

from profiling.device_decoder import (
    DECODERS,
    NO_END,
    cross_of_states,
    differences,
    random_cross,
    random_states,
    random_weights,
)
from runtime.device_decoder import STATE_ROWS, DeviceDecoder, pack_blobs
from tests.decoder_outputs import poisoned_outputs

# name -> config: the published decoders with fewer layers, and other sizes and switches.
BASE = DECODERS["base"] | {"num_layers": 2, "vocab_size": 5003}
CASES = {
    "bundled": DECODERS["bundled"] | {"num_layers": 3},
    "small": DECODERS["small"] | {"num_layers": 2},
    "base": BASE,
    "no-embedding-norm": BASE | {"embedding_norm": 0, "embed_scale": 2.0, "source_length": 37},
    "relu": BASE | {"activation": "relu", "vocab_size": 997},
    "odd": DECODERS["small"]
    | {
        "num_layers": 2,
        "hidden_size": 192,
        "num_heads": 6,
        "ffn_size": 320,
        "vocab_size": 119,
        "source_length": 8,
    },
    "wide-heads": DECODERS["small"]
    | {
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 1001,
        "source_length": 1025,
        "encoder_size": 384,
    },
    "large": BASE | {"encoder_size": 1024, "vocab_size": 1009},
    "chain": BASE | {"ffn_size": 2048, "vocab_size": 1009},  # of a size that the wide decoder does not take
}
STATES = (
    "base",
    "large",
    "no-embedding-norm",
    "relu",
    "wide-heads",
)  # that may attend to the encoder's states


def settings(name: str, dtype: torch.dtype) -> dict:
    return CASES[name] | {"dtype": str(dtype).removeprefix("torch.")}


@cache
def weights_of(name: str, dtype: torch.dtype) -> dict:
    return random_weights(settings(name, dtype), dtype, "cuda")


def search(kernels, name, dtype, lines, steps, slots=None, cross=None, states=False, **changes):
    """The decoder's outputs (tokens, log_probs, lengths), from poisoned buffers, and what it attended to.

    `states`: attend to the encoder's states in place of keys and values.
    """
    config = settings(name, dtype) | changes
    decoder = DeviceDecoder(kernels, weights_of(name, dtype), config, slots or lines, steps)
    if cross is None:
        cross = (random_states if states else random_cross)(config, lines, dtype, "cuda", seed=lines)
    outputs = poisoned_outputs(decoder, lines, steps)
    decoder.run(cross, outputs, slots)
    torch.cuda.synchronize()
    return outputs, cross, config, decoder


def assert_right(name, dtype, outputs, cross, config) -> None:
    if isinstance(cross, torch.Tensor):
        cross = cross_of_states(weights_of(name, dtype), config, cross)
    found, _ = differences(weights_of(name, dtype), config, cross, outputs)
    assert not found, "\n".join(found[:10])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("lines", (1, 2, 3, 8, 11, 16, 17, 33, 64, 70))
@pytest.mark.parametrize("name", ("bundled", "small", "base"))
def test_tokens_are_the_best(hopper, name, lines, dtype):
    outputs, cross, config, _ = search(hopper, name, dtype, lines, 12)
    assert (outputs[2] == 12).all()
    assert_right(name, dtype, outputs, cross, config)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "lines"),
    (*(("small", lines) for lines in (1, 3, 16, 40)), *(("base", lines) for lines in (1, 5, 16))),
)
def test_keys_and_values_of_e4m3(hopper, name, lines):
    """What is decoded is what PyTorch decodes by the rounded keys and values."""
    dtype, steps = torch.float16, 12
    config = settings(name, dtype)
    decoder = DeviceDecoder(hopper, weights_of(name, dtype), config, lines, steps)
    assert decoder.takes_e4m3(lines)
    exact = random_cross(config, lines, dtype, "cuda", seed=lines)
    exact[0][0][0, 0, 0, :3] = torch.tensor([500.0, -60000.0, 2.0**-9])
    rounded = tuple([torch.zeros_like(tensor, dtype=torch.float8_e4m3fn) for tensor in of] for of in exact)
    outputs = poisoned_outputs(decoder, lines, steps)
    decoder.round_to_e4m3(exact, rounded)
    decoder.run(rounded, outputs)
    torch.cuda.synchronize()
    for got, of in zip((*rounded[0], *rounded[1]), (*exact[0], *exact[1]), strict=True):
        assert torch.equal(got.float(), of.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert_right(name, dtype, outputs, tuple([tensor.half() for tensor in of] for of in rounded), config)


@pytest.mark.gpu
@pytest.mark.parametrize("lines", (1, 3, 5, 40))
@pytest.mark.parametrize("name", ("no-embedding-norm", "relu", "odd", "wide-heads", "chain"))
def test_other_decoders(hopper, name, lines):
    outputs, cross, config, _ = search(hopper, name, torch.float16, lines, 7)
    assert_right(name, torch.float16, outputs, cross, config)


@pytest.mark.gpu
@pytest.mark.parametrize("lines", (1, 4))
@pytest.mark.parametrize("name", ("bundled", "relu"))
def test_long_texts(hopper, name, lines):
    """More keys than one turn of self-attention holds."""
    outputs, cross, config, _ = search(hopper, name, torch.float16, lines, 150)
    assert_right(name, torch.float16, outputs, cross, config)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("lines", (1, 3, 16, 17, 33, 64))
@pytest.mark.parametrize("name", STATES)
def test_attends_to_states(hopper, name, lines, dtype):
    outputs, states, config, decoder = search(hopper, name, dtype, lines, 12, states=True)
    assert decoder.attends_to_states
    assert_right(name, dtype, outputs, states, config)


@pytest.mark.gpu
def test_attends_to_states_in_long_texts(hopper):
    """More keys than one turn of self-attention holds, in rows that take a second line."""
    outputs, states, config, _ = search(hopper, "base", torch.float16, 5, 150, slots=3, states=True)
    assert_right("base", torch.float16, outputs, states, config)


@pytest.mark.gpu
def test_refuses_states(hopper):
    """More rows than one step takes; a decoder without the weights; a width that no kernel has."""
    dtype = torch.float16
    lines = STATE_ROWS + 1
    with pytest.raises(RuntimeError, match="slots 1 to 64"):
        search(hopper, "base", dtype, lines, 3, states=True)
    config = settings("base", dtype)
    assert "width" in hopper.device_decoder_states_obstacle(config | {"encoder_size": 512})
    assert "heads" in hopper.device_decoder_states_obstacle(settings("small", dtype) | {"encoder_size": 384})
    decoder = DeviceDecoder(hopper, weights_of("base", dtype), config | {"encoder_size": 512}, 4, 4)
    assert not decoder.attends_to_states
    with pytest.raises(RuntimeError, match="made with their weights"):
        decoder.run(random_states(config, 4, dtype, "cuda"), decoder.outputs(4, 4))


def ended(hopper, name: str, lines: int, steps: int, states: bool = False):
    """A search whose lines end apart: its outputs, what it attended to, its configuration."""
    free, cross, _, _ = search(hopper, name, torch.float16, lines, steps, states=states)
    ends = free[0][::5, 4].unique().tolist()[:8]
    outputs, _, config, _ = search(hopper, name, torch.float16, lines, steps, cross=cross, eos_ids=ends)
    assert 1 <= outputs[2].min() < outputs[2].max()
    for line, (tokens, alone, length) in enumerate(zip(outputs[0], free[0], outputs[2], strict=True)):
        assert tokens[:length].tolist() == alone[:length].tolist(), line
    return outputs, cross, config


@pytest.mark.gpu
@pytest.mark.parametrize("slots", (1, 2, 7, 16, 37))
@pytest.mark.parametrize(
    ("name", "states"), (("bundled", False), ("relu", False), ("chain", False), ("relu", True))
)
def test_finished_rows_take_the_next_line(hopper, name, states, slots):
    lines, steps = 37, 10
    expected, cross, config = ended(hopper, name, lines, steps, states)
    found, *_ = search(hopper, name, torch.float16, lines, steps, slots, cross, eos_ids=config["eos_ids"])
    assert_right(name, torch.float16, found, cross, config)
    # Few rows are spread over more warps than many, which adds in another order: near-ties may change.
    same = (found[0] == expected[0]).all(1)
    assert same.float().mean() > 0.9
    assert torch.allclose(found[1][same], expected[1][same], rtol=0, atol=5e-3 * steps)


@pytest.mark.gpu
@pytest.mark.parametrize(("lines", "slots"), ((37, 37), (37, 20), (12, 8)))
@pytest.mark.parametrize(("name", "states"), (("bundled", False), ("relu", False), ("relu", True)))
def test_a_line_does_not_depend_on_its_neighbours(hopper, name, states, lines, slots):
    """In another order, beside other lines, in another row: the same bits."""
    expected, cross, config = ended(hopper, name, lines, 10, states)
    ends = config["eos_ids"]
    expected, *_ = search(hopper, name, torch.float16, lines, 10, slots, cross, eos_ids=ends)
    order = torch.randperm(lines, device="cuda")
    if states:
        shuffled = cross[order].contiguous()
    else:
        shuffled = tuple([part[order].contiguous() for part in parts] for parts in cross)
    found, *_ = search(hopper, name, torch.float16, lines, 10, slots, shuffled, eos_ids=ends)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted[order])


@pytest.mark.gpu
def test_without_an_end_every_line_has_its_full_length(hopper):
    free, cross, _, _ = search(hopper, "bundled", torch.float16, 5, 8)
    ends = free[0][:, 2].unique().tolist()
    _, _, _, decoder = search(hopper, "bundled", torch.float16, 5, 8, cross=cross, eos_ids=ends)
    found = decoder.outputs(5, 8)
    decoder.run(cross, found, stop=False)
    torch.cuda.synchronize()
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, free, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "lines", "repeats"), (("small", 24, 3), ("base", 1, 30), ("base", 8, 30), ("base", 16, 30))
)
def test_repeats_are_equal_on_any_stream(hopper, name, lines, repeats):
    outputs, cross, _, decoder = search(hopper, name, torch.float16, lines, 9)
    first = [tensor.clone() for tensor in outputs]
    stream = torch.cuda.Stream()
    for _ in range(repeats):
        for tensor in outputs:
            tensor.fill_(-1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decoder.run(cross, outputs)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(first, outputs, strict=True))


@pytest.mark.gpu
def test_requests_of_other_sizes_on_one_decoder(hopper):
    """Fewer lines, slots and tokens than the decoder was made for; graphs of earlier requests stay valid."""
    dtype, name = torch.float16, "bundled"
    outputs, cross, _, decoder = search(hopper, name, dtype, 20, 12)
    few = tuple([part[:3].contiguous() for part in parts] for parts in cross)
    short = decoder.outputs(3, 5)
    decoder.run(few, short, slots=2)
    torch.cuda.synchronize()
    assert torch.equal(short[0], outputs[0][:3, :5])
    expected = outputs[0].clone()
    outputs[0].zero_()
    decoder.run(cross, outputs)
    torch.cuda.synchronize()
    assert torch.equal(outputs[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"lines": 0}, "lines must be"),
        ({"slots": 9}, "slots 1 to 8"),
        ({"max_new_tokens": 13}, "max_new_tokens"),
        ({"cross_keys": []}, "cross keys"),
        ({"tokens": 0}, "null"),
    ),
)
def test_refuses_a_request(hopper, change, message):
    outputs, cross, _, decoder = search(hopper, "bundled", torch.float16, 8, 12)
    request = {
        "lines": 8,
        "slots": 8,
        "cross_keys": [tensor.data_ptr() for tensor in cross[0]],
        "cross_values": [tensor.data_ptr() for tensor in cross[1]],
        "tokens": outputs[0].data_ptr(),
        "log_probs": outputs[1].data_ptr(),
        "lengths": outputs[2].data_ptr(),
        "max_new_tokens": 12,
        "stream": 0,
    }
    with pytest.raises(RuntimeError, match=message):
        decoder._decoder.run(**(request | change))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"dtype": "float32"}, "neither float16 nor bfloat16"),
        ({"ffn_size": 1000}, "feed-forward width"),
        ({"num_heads": 5}, "head size"),
        ({"hidden_size": 2048, "num_heads": 32}, "width"),
        ({"eos_ids": list(range(9))}, "more than 8"),
    ),
)
def test_refuses_a_decoder(hopper, change, message):
    assert message in hopper.device_decoder_obstacle(settings("small", torch.float16) | change)


def test_needs_hopper(kernels):
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("this GPU is served")
    assert "compute capability" in kernels.device_decoder_obstacle(settings("small", torch.float16))


@pytest.mark.parametrize("name", ("small", "base", "odd"))
def test_pieces_have_the_size_that_the_kernel_reads(kernels, name):
    config = settings(name, torch.float16) | {"vocab_size": 51}
    blobs = pack_blobs(random_weights(config, torch.float16, "cpu"), config)
    sizes = kernels.device_decoder_blob_bytes(config)
    pieces = {part: blobs[part][0].nbytes if part == "head" else blobs[part].shape[-1] for part in sizes}
    assert pieces == sizes


def test_the_chains_pieces_hold_every_weight():
    config = settings("base", torch.float16) | {"vocab_size": 51}
    weights = random_weights(config, torch.float16, "cpu")
    blobs = pack_blobs(weights, config)

    def same(part: str, floats: int, *names: str) -> None:
        pieces = blobs[part].flatten(0, -2)
        stored = pieces[:, 4 * floats :].contiguous().view(torch.float16).flatten()
        expected = torch.cat([weights[name].flatten() for name in names])
        assert torch.equal(stored.sort().values, expected.sort().values)

    columns = 1024 * 8 // 64
    assert blobs["cross_keys"].shape == (2, 16, 8, 2, 12, 8, 32)
    assert blobs["cross_values"].shape == (2, 16, 8, 24, 8, 32)
    same("self", 24 + columns, "self_qkv_weight", "self_out_weight")
    same("cross", 8 + columns, "cross_query_weight", "cross_out_weight")
    same("feed_forward", 32, "fc1_weight", "fc2_weight")
    assert blobs["head"].shape == (7, 32, 8, 32)
    assert not blobs["head"][6, :, 3:].any()  # rows behind the vocabulary
    assert blobs["norms"].shape == (1 + 3 * config["num_layers"], 2, 1024)


def test_a_piece_of_the_chain_is_what_its_block_reads():
    """By the definition: layer 1, block 2 of head 3; inner columns 64 to 95."""
    config = settings("base", torch.float16) | {"vocab_size": 51}
    weights = random_weights(config, torch.float16, "cpu")
    blobs = pack_blobs(weights, config)
    width, columns = 1024, 128
    rows = 3 * 64 + 2 * 8 + torch.arange(8)  # of the head's query, key or value

    piece = blobs["self"][1, 3, 2]
    floats = piece[: 4 * (24 + columns)].view(torch.float32)
    halves = piece[4 * (24 + columns) :].view(torch.float16)
    qkv = halves[: 24 * width].view(width // 32, 3, 8, 32)
    out = halves[24 * width :].view(2, columns, 32)
    for part in range(3):
        expected = weights["self_qkv_weight"][1, part * width + rows]  # [8, inputs]
        assert torch.equal(qkv[:, part].transpose(0, 1).flatten(1), expected)
        assert torch.equal(floats[8 * part : 8 * part + 8], weights["self_qkv_bias"][1, part * width + rows])
    # out[in, out] of inputs 192 to 255 (the head) and outputs 256 to 383 (block 2 of 8)
    assert torch.equal(out.transpose(0, 1).flatten(1), weights["self_out_weight"][1, 192:256, 256:384].T)
    assert torch.equal(floats[24:], weights["self_out_bias"][1, 256:384])

    piece = blobs["feed_forward"][1, 2]
    assert torch.equal(piece[:128].view(torch.float32), weights["fc1_bias"][1, 64:96])
    halves = piece[128:].view(torch.float16)
    first = halves[: 32 * width].view(width // 32, 32, 32)
    assert torch.equal(first.transpose(0, 1).flatten(1), weights["fc1_weight"][1, 64:96])
    assert torch.equal(halves[32 * width :].view(width, 32), weights["fc2_weight"][1, 64:96].T)


def test_a_share_of_the_wide_decoder_has_the_norm_folded_in():
    """Share 5's part of the query of cross-attention in layer 1, from what the sublayer before left."""
    config = settings("base", torch.float16) | {"vocab_size": 51}
    weights = random_weights(config, torch.float16, "cpu")
    blobs = pack_blobs(weights, config)
    assert blobs["wide_layers"].shape == (config["num_layers"], 14, 128, 8 * 1024)
    assert blobs["wide_constants"].shape == (config["num_layers"], 128, 200)

    weight = blobs["wide_layers"][1, 4, 5].view(32, 8, 32).transpose(0, 1).flatten(1).float()
    # Those of self-attention come before: three tiles' biases, three tiles' sums, output's bias, gamma, beta.
    bias, sums, output_bias, gamma, beta = blobs["wide_constants"][1, 5, 72:112].view(5, 8)
    of_norm = [weights[f"norm_{name}"][1, 0].float() for name in ("gamma", "beta")]
    columns = slice(40, 48)
    left = 3 * torch.randn(7, 1024) + 0.5
    hidden = F.layer_norm(left, [1024], *of_norm, config["epsilon"])
    expected = hidden @ weights["cross_query_weight"][1, columns].float().T
    expected += weights["cross_query_bias"][1, columns]
    mean, deviation = left.mean(1, keepdim=True), left.std(1, unbiased=False, keepdim=True)
    assert torch.allclose((left @ weight.T - mean * sums) / deviation + bias, expected, rtol=0, atol=5e-3)
    assert torch.equal(output_bias, weights["cross_out_bias"][1, columns].float())
    assert torch.equal(torch.stack([gamma, beta]), torch.stack(of_norm)[:, columns])


def test_a_heads_weights_of_the_states_are_what_its_blocks_read():
    """By the definition: layer 1, head 3, block 2: an eighth of the states' columns, eight of the head's."""
    config = settings("base", torch.float16) | {"vocab_size": 51}
    weights = random_weights(config, torch.float16, "cpu")
    blobs = pack_blobs(weights, config)
    keys = blobs["cross_keys"][1, 3, 2]  # [inputs / 32, outputs / 8, 8, 32]
    expected = weights["cross_key_weight"][1, 192:256, 192:288].T  # [outputs, inputs]
    assert torch.equal(keys.permute(1, 2, 0, 3).reshape(96, 64), expected)
    values = blobs["cross_values"][1, 3, 2]  # [inputs / 32, 8, 32]
    assert torch.equal(values.transpose(0, 1).flatten(1), weights["cross_value_weight"][1, 208:216])


def product(units: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """rows [n, inputs] times units [outputs / 16, inputs / 32, 512], as the lanes of a warp hold them."""
    tiles, chunks, _ = units.shape
    out = torch.zeros(len(rows), tiles * 16)
    # step, g, t; which two of the eight inputs, which output, which of the two
    lanes = units.view(tiles, chunks, 2, 8, 4, 2, 2, 2).float()
    for step, g, t, pair, high, e in cartesian(*map(range, (2, 8, 4, 2, 2, 2))):
        inputs = torch.arange(chunks) * 32 + 8 * t + 4 * step + 2 * pair + e
        outputs = torch.arange(tiles) * 16 + g + 8 * high
        out[:, outputs] += rows[:, inputs].float() @ lanes[:, :, step, g, t, pair, high, e].T
    return out


@pytest.mark.parametrize("name", ("small", "odd"))
def test_a_piece_of_a_team_is_what_its_block_multiplies(name):
    """Layer 1, head 3, with random rows; narrower decoders are padded with zeros."""
    config = settings(name, torch.float16) | {"vocab_size": 51}
    width, inner = config["hidden_size"], config["ffn_size"]
    weights = random_weights(config, torch.float16, "cpu")
    blobs = pack_blobs(weights, config)
    layer, head, wide = 1, 3, 256
    units = blobs["layers"][layer, head].view(torch.float16).view(-1, 512)
    parts = iter(units.split((48, 16, 16, 16, 64, 64)))
    hidden = torch.zeros(3, wide)
    hidden[:, :width] = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    context = hidden[:, :32]
    mine = torch.arange(32) + 32 * head
    qkv = torch.cat([mine + part * width for part in range(3)])
    columns = torch.arange(128) + 128 * head
    columns = columns[columns < inner]

    def check(chunks: int, rows: torch.Tensor, expected: torch.Tensor) -> None:
        found = product(next(parts).view(-1, chunks, 512), rows)
        assert torch.allclose(found[:, : expected.shape[1]], expected, atol=1e-4)
        assert not found[:, expected.shape[1] :].any()

    real = hidden[:, :width]
    check(8, hidden, real @ weights["self_qkv_weight"][layer, qkv].float().T)
    check(1, context, context @ weights["self_out_weight"][layer, mine].float())
    check(8, hidden, real @ weights["cross_query_weight"][layer, mine].float().T)
    check(1, context, context @ weights["cross_out_weight"][layer, mine].float())
    check(8, hidden, real @ weights["fc1_weight"][layer, columns].float().T)
    expanded = torch.ones(3, 128)
    check(4, expanded, expanded[:, : len(columns)] @ weights["fc2_weight"][layer, columns].float())

    floats = blobs["constants"][layer, head].view(torch.float32)
    assert torch.equal(floats[:96], weights["self_qkv_bias"][layer, qkv])
    assert torch.equal(floats[96:128], weights["cross_query_bias"][layer, mine])
    assert torch.equal(floats[128 : 128 + len(columns)], weights["fc1_bias"][layer, columns])
    biases = floats[256 : 256 + 3 * wide].view(3, wide)
    for bias, of in zip(biases, ("self_out_bias", "cross_out_bias", "fc2_bias"), strict=True):
        assert torch.equal(bias[:width], weights[of][layer])
    norms = blobs["constants"][layer, head].view(torch.float16)[-6 * wide :].view(3, 2, wide)
    assert torch.equal(norms[:, 0, :width], weights["norm_gamma"][layer])
    assert torch.equal(norms[:, 1, :width], weights["norm_beta"][layer])
    assert not norms[:, :, width:].any()

    logits = product(blobs["head"].view(-1, 8, 512), hidden)
    assert torch.allclose(logits[:, :51], real @ weights["head_weight"].float().T, atol=1e-4)
    assert not logits[:, 51:].any()


def test_no_end_is_no_token():
    assert all(config["vocab_size"] < NO_END for config in DECODERS.values())
