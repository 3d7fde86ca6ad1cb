"""Encoder attention for Hopper, each compiled variant of it, against PyTorch in float32."""

import pytest
import torch

from profiling.attention_sm90 import DIVIDED_LENGTH, HOPPER_PATHS, attend, errors

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=HOPPER_PATHS)
def path(request) -> str:
    return request.param


def random_qkv(batch: int, length: int, heads: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(batch * 7919 + length * 31 + heads)
    return (scale * torch.randn(batch, length, 3, heads, 64, generator=generator, device="cuda")).to(dtype)


def check(path: str, qkv: torch.Tensor) -> None:
    if path == "divided" and qkv.shape[1] > DIVIDED_LENGTH:
        with pytest.raises(RuntimeError, match=f"up to {DIVIDED_LENGTH}"):
            attend(path, qkv, context_like(qkv))
        return
    error, bound, _ = errors(path, qkv)
    assert error <= bound


def context_like(qkv: torch.Tensor) -> torch.Tensor:
    return torch.full((*qkv.shape[:2], qkv.shape[3] * 64), torch.nan, dtype=qkv.dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", (3, 6, 12, 16))
@pytest.mark.parametrize("batch", (1, 3, 16))
@pytest.mark.parametrize("length", (1, 59, 97, 257, 577, 578, 1025))
def test_matches_float32(path, length, batch, heads, dtype):
    check(path, random_qkv(batch, length, heads, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "length", (16, 63, 64, 65, 127, 128, 129, 208, 209, 384, 385, 576, 592, 593, 640, 641, 769)
)
def test_tile_borders(path, length, dtype):
    check(path, random_qkv(3, length, 5, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_heads_a_block(path, dtype):
    check(path, random_qkv(48, 578, 12, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (4.0, 16.0))
def test_large_logits(path, scale, dtype):
    """Logits in the thousands: every row's reference moves, in any key tile."""
    check(path, random_qkv(2, 578, 6, dtype, scale))


@pytest.mark.parametrize("rising", (True, False))
def test_rising_maximum(path, rising):
    """Scores that grow with the key's position rescale every tile's sums; falling ones, none."""
    qkv = random_qkv(2, 578, 3, torch.float16)
    ramp = torch.linspace(0, 8, 578, device="cuda")
    qkv[:, :, 0] = qkv[:, :, 0].abs()
    qkv[:, :, 1] = (ramp if rising else ramp.flip(0))[None, :, None, None].half()
    check(path, qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rise", (2.0, 5.0, 5.6, 6.0, 12.0, 40.0, 120.0))
def test_late_peak(path, rise, dtype):
    """A key behind the first tile scores `rise` more: below, about at, above where references move."""
    qkv = random_qkv(2, 578, 3, dtype)
    qkv[:, :, 0, :, 0] = 8
    qkv[:, :, 1, :, 0] = 0
    qkv[:, 300, 1, :, 0] = rise
    check(path, qkv)


def test_equal_scores_average_the_values(path):
    qkv = random_qkv(2, 578, 3, torch.float16)
    qkv[:, :, 0] = 0
    error, bound, _ = errors(path, qkv)
    assert error <= bound


def test_deterministic_and_independent_of_batch(path):
    qkv = random_qkv(16, 578, 6, torch.float16)
    _, _, first = errors(path, qkv)
    _, _, second = errors(path, qkv)
    _, _, alone = errors(path, qkv[5:6].contiguous())
    assert torch.equal(first, second)
    assert torch.equal(first[5:6], alone)


def test_writes_nothing_else(path):
    qkv = random_qkv(3, 97, 3, torch.float16)
    size = 3 * 97 * 3 * 64
    padded = torch.full((size + 4096,), 7.0, dtype=torch.float16, device="cuda")
    attend(path, qkv, padded[2048 : 2048 + size])
    assert (padded[:2048] == 7).all() and (padded[2048 + size :] == 7).all()


def test_other_stream(path):
    qkv = random_qkv(3, 578, 6, torch.float16)
    _, _, expected = errors(path, qkv)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    context = context_like(qkv)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend(path, qkv, context)
    stream.synchronize()
    assert torch.equal(context, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    (({"head_dim": 32}, "head size 64 only"), ({"dtype": "float32"}, "float16 and bfloat16 only")),
)
def test_forcing_refuses_what_only_other_paths_do(kernels, path, change, message):
    sizes = {"batch": 1, "sequence_length": 578, "num_heads": 6, "head_dim": 64, "dtype": "float16"}
    with pytest.raises(RuntimeError, match=message):
        kernels.encoder_attention(4096, 4096, path=path, **(sizes | change))


def test_auto_is_hopper():
    qkv = random_qkv(8, 578, 6, torch.float16)
    assert torch.equal(errors("auto", qkv)[2], errors("hopper", qkv)[2])
