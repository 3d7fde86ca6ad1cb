"""The greedy decode kernel against a float32 search in PyTorch with the same weights.

Workspace and outputs start as NaN or nonsense. A row's tokens must be the float32 search's up to the first
step at which that one's best two logits are closer than half precision can tell apart.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from graph_surgery.checkpoint import load_model, load_spec
from graph_surgery.export import CrossKeyValue
from profiling.greedy_decode import (
    DECODERS,
    PAD_ID,
    START_ID,
    GreedyReference,
    differences,
    random_cross,
    random_decoder,
)
from profiling.kernel_calls import load_kernels
from runtime.greedy_weights import GreedyDecode, decoder_shape, pack_decoder, plan

pytestmark = pytest.mark.gpu

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "trocr-tiny-printed"
TINY = DECODERS["tiny"][0]
SMALL = DECODERS["small"][0] | {"decoder_layers": 3}
BASE = DECODERS["base"][0] | {"decoder_layers": 2, "tie_word_embeddings": False}

# name -> decoder, length of the encoder's states: published ones with fewer layers, and other switches.
CASES = {
    "tiny": (TINY, 578),
    "small": (SMALL, 578),
    "base": (BASE, 577),
    "no-embedding-norm": (BASE | {"layernorm_embedding": False, "scale_embedding": True}, 37),
    "relu": (BASE | {"activation_function": "relu", "vocab_size": 997}, 577),
    "odd": (
        TINY | {"d_model": 192, "decoder_attention_heads": 6, "decoder_ffn_dim": 320, "vocab_size": 119},
        1,
    ),
    "wide-heads": (TINY | {"d_model": 512, "decoder_ffn_dim": 2048, "activation_function": "gelu"}, 101),
    "long": (TINY | {"d_model": 128, "decoder_attention_heads": 2, "decoder_ffn_dim": 5120}, 12),
}


@pytest.fixture(scope="module")
def kernels():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    try:
        module = load_kernels()
    except ImportError as error:
        pytest.skip(str(error))
    torch.backends.cuda.matmul.allow_tf32 = False
    return module


@cache
def packed(name: str, dtype: torch.dtype):
    """A case's decoder in float32 with weights rounded to `dtype`, and the weights packed in `dtype`."""
    config, length = CASES[name]
    model = random_decoder(config, dtype, "cuda")
    shape = decoder_shape(model, length)
    weights = pack_decoder(model, shape, plan(load_kernels(), shape))
    return model.float(), weights


def poison(search: GreedyDecode) -> None:
    search.workspace.fill_(0xFF)  # NaN in every floating type
    search.token_ids.fill_(-7)
    search.log_probs.fill_(torch.nan)
    search.steps.fill_(-1)


def run(search: GreedyDecode, cross) -> None:
    poison(search)
    search(*cross, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()


def searched(kernels, name: str, dtype, batch: int, max_steps: int, end_ids=(), cross=None):
    """The kernel's search, its reference, and the encoder's keys and values."""
    model, weights = packed(name, dtype)
    if cross is None:
        cross = random_cross(model, batch, CASES[name][1], seed=batch)
        cross = [[part.to(dtype) for part in layers] for layers in cross]
    search = GreedyDecode(kernels, weights, batch, max_steps, START_ID, PAD_ID, list(end_ids))
    run(search, cross)
    return search, GreedyReference(model, cross, max_steps, START_ID, PAD_ID, list(end_ids)), cross


def assert_right(search: GreedyDecode, exact: GreedyReference, dtype=torch.float16) -> None:
    bf16 = dtype == torch.bfloat16
    found, _ = differences(search, exact, margin=0.8 if bf16 else 0.1, tolerance=0.4 if bf16 else 0.05)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("batch", (1, 3, 8, 16, 33, 64))
@pytest.mark.parametrize("name", ("tiny", "small", "base"))
def test_matches_float32(kernels, name, batch, dtype):
    search, exact, _ = searched(kernels, name, dtype, batch, 12)
    assert_right(search, exact, dtype)
    assert search.steps.item() == 12
    if dtype == torch.float16:
        # Most rows have no near-tie in 12 steps: without this, an early one could excuse every row.
        assert (search.token_ids == exact.token_ids).float().mean() > 0.8


@pytest.mark.parametrize("batch", (1, 5, 40))
@pytest.mark.parametrize("name", ("no-embedding-norm", "relu", "odd", "wide-heads", "long"))
def test_other_decoders(kernels, name, batch):
    search, exact, _ = searched(kernels, name, torch.float16, batch, 7)
    assert_right(search, exact)


def test_long_text(kernels):
    """More keys than a pass of self-attention takes."""
    search, exact, _ = searched(kernels, "tiny", torch.float16, 3, 200)
    assert_right(search, exact)


@pytest.mark.parametrize("name", ("tiny", "relu"))
@pytest.mark.parametrize("batch", (1, 16, 64))
def test_rows_end_apart(kernels, name, batch):
    """With several ids that end the text, rows end at different steps; the search ends with the last."""
    free, _, cross = searched(kernels, name, torch.float16, batch, 10)
    end_ids = free.token_ids[:: max(1, batch // 4), 4].unique().tolist()[:4]
    search, exact, _ = searched(kernels, name, torch.float16, batch, 10, end_ids, cross)
    assert_right(search, exact)
    for row, alone in zip(search.token_ids.tolist(), free.token_ids.tolist(), strict=True):
        ends = [step for step in range(1, 11) if alone[step] in end_ids]
        length = ends[0] + 1 if ends else 11
        assert row == alone[:length] + [PAD_ID] * (11 - length)
    lengths = (search.log_probs != 0).sum(1)
    assert search.steps.item() == lengths.max()
    assert lengths.min() <= 4


def test_stops_early(kernels):
    """All rows end with the first token: the rest of the outputs is padding."""
    free, _, cross = searched(kernels, "tiny", torch.float16, 1, 3)
    first = free.token_ids[0, 1].item()
    search, _, _ = searched(kernels, "tiny", torch.float16, 1, 50, [first], cross)
    assert search.steps.item() == 1
    assert search.token_ids[0].tolist() == [START_ID, first] + [PAD_ID] * 49
    assert (search.log_probs[0, 1:] == 0).all()


@pytest.mark.parametrize("name", ("small", "base"))
def test_deterministic_and_independent_of_row(kernels, name):
    search, _, cross = searched(kernels, name, torch.float16, 24, 8)
    tokens, log_probs = search.token_ids.clone(), search.log_probs.clone()
    run(search, cross)
    assert torch.equal(search.token_ids, tokens) and torch.equal(search.log_probs, log_probs)
    order = torch.randperm(24, device="cuda")
    run(search, [[part[order].contiguous() for part in layers] for layers in cross])
    assert torch.equal(search.token_ids, tokens[order]) and torch.equal(search.log_probs, log_probs[order])


def test_graph_of_two_launches(kernels):
    """Capture, and one launch behind the other on the same workspace."""
    search, _, cross = searched(kernels, "small", torch.float16, 8, 6)
    expected = search.token_ids.clone()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(2):
            search(*cross, torch.cuda.current_stream().cuda_stream)
    for _ in range(3):
        poison(search)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(search.token_ids, expected)


def test_writes_nothing_else(kernels):
    search, _, cross = searched(kernels, "tiny", torch.float16, 5, 6)
    buffer = torch.full((search.workspace.numel() + 8192,), 0x5A, dtype=torch.uint8, device="cuda")
    expected = search.token_ids.clone()
    search.workspace = buffer[4096:-4096]
    search(*cross, torch.cuda.current_stream().cuda_stream)
    assert torch.equal(search.token_ids, expected)
    assert (buffer[:4096] == 0x5A).all() and (buffer[-4096:] == 0x5A).all()


def test_bundled_checkpoint(kernels):
    """The trained model on its encoder's states of random images."""
    model = load_model(load_spec(CHECKPOINT), torch.float16).cuda()
    spec = load_spec(CHECKPOINT)
    pixels = torch.rand(
        16, 3, spec.encoder.image_height, spec.encoder.image_width, device="cuda", dtype=torch.float16
    )
    with torch.no_grad():
        states = model.encoder(pixels * 2 - 1).last_hidden_state
        cross = CrossKeyValue(spec, model)(states)
    cross = [[part.contiguous() for part in cross[kind::2]] for kind in (0, 1)]
    shape = decoder_shape(model.decoder, states.shape[1])
    weights = pack_decoder(model.decoder, shape, plan(kernels, shape))
    ends, start, pad = list(spec.eos_token_ids), spec.decoder_start_token_id, spec.pad_token_id
    search = GreedyDecode(kernels, weights, 16, 40, start, pad, ends)
    run(search, cross)
    assert_right(search, GreedyReference(model.decoder.float(), cross, 40, start, pad, ends))


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"batch": 65}, "batch is not in 1 to 64"),
        ({"ffn_dim": 1000}, "ffn_dim is no multiple of 32"),
        ({"num_heads": 5}, "head size"),
        ({"dtype": "float32"}, "neither float16 nor bfloat16"),
        ({"max_steps": 0}, "max_steps"),
        ({"blocks": 7, "team_blocks": 2}, "plan"),
    ),
)
def test_refuses(kernels, change, message):
    _, weights = packed("tiny", torch.float16)
    arguments = {**vars(weights.shape), **vars(weights.plan), "batch": 1, "max_steps": 4}
    with pytest.raises(RuntimeError, match=message):
        kernels.greedy_decode_sizes(**(arguments | change))
