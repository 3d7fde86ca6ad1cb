"""Encoder attention for Hopper against PyTorch in float32."""

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a GPU of compute capability 9.0", allow_module_level=True)

module = pytest.importorskip("trocr_attention_sm90")

from profiling.attention_sm90 import errors, run  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16)


def random_qkv(batch: int, length: int, heads: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(batch * 7919 + length * 31 + heads)
    return (scale * torch.randn(batch, length, 3, heads, 64, generator=generator, device="cuda")).to(dtype)


def context_like(qkv: torch.Tensor) -> torch.Tensor:
    return torch.full((*qkv.shape[:2], qkv.shape[3] * 64), torch.nan, dtype=qkv.dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", (3, 6, 12, 16))
@pytest.mark.parametrize("batch", (1, 3, 16))
@pytest.mark.parametrize("length", (1, 59, 97, 257, 577, 578, 1025))
def test_matches_float32(length, batch, heads, dtype):
    error, bound, _ = errors(module, random_qkv(batch, length, heads, dtype))
    assert error <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "length", (16, 63, 64, 65, 127, 128, 129, 208, 209, 384, 385, 576, 592, 593, 640, 641, 769)
)
def test_tile_borders(length, dtype):
    error, bound, _ = errors(module, random_qkv(3, length, 5, dtype))
    assert error <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_heads_a_block(dtype):
    error, bound, _ = errors(module, random_qkv(48, 578, 12, dtype))
    assert error <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (4.0, 16.0))
def test_large_logits(scale, dtype):
    """Logits in the thousands: every row's reference moves, in any key tile."""
    error, bound, _ = errors(module, random_qkv(2, 578, 6, dtype, scale))
    assert error <= bound


@pytest.mark.parametrize("rising", (True, False))
def test_rising_maximum(rising):
    """Scores that grow with the key's position rescale every tile's sums; falling ones, none."""
    qkv = random_qkv(2, 578, 3, torch.float16)
    ramp = torch.linspace(0, 8, 578, device="cuda")
    qkv[:, :, 0] = qkv[:, :, 0].abs()
    qkv[:, :, 1] = (ramp if rising else ramp.flip(0))[None, :, None, None].half()
    error, bound, _ = errors(module, qkv)
    assert error <= bound


def test_equal_scores_average_the_values():
    qkv = random_qkv(2, 578, 3, torch.float16)
    qkv[:, :, 0] = 0
    error, bound, _ = errors(module, qkv)
    assert error <= bound


def test_deterministic_and_independent_of_batch():
    qkv = random_qkv(16, 578, 6, torch.float16)
    _, _, first = errors(module, qkv)
    _, _, second = errors(module, qkv)
    _, _, alone = errors(module, qkv[5:6].contiguous())
    assert torch.equal(first, second)
    assert torch.equal(first[5:6], alone)


def test_writes_nothing_else():
    qkv = random_qkv(3, 97, 3, torch.float16)
    size = 3 * 97 * 3 * 64
    padded = torch.full((size + 4096,), 7.0, dtype=torch.float16, device="cuda")
    run(module, qkv, padded[2048 : 2048 + size])
    assert (padded[:2048] == 7).all() and (padded[2048 + size :] == 7).all()


def test_other_stream():
    qkv = random_qkv(3, 578, 6, torch.float16)
    _, _, expected = errors(module, qkv)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    context = context_like(qkv)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(module, qkv, context)
    stream.synchronize()
    assert torch.equal(context, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    (({"head_dim": 32}, "head size"), ({"batch": 0}, "positive"), ({"dtype": "float32"}, "dtype float32")),
)
def test_refuses(change, message):
    arguments = {
        "qkv": 0,
        "context": 0,
        "batch": 1,
        "sequence_length": 578,
        "num_heads": 6,
        "head_dim": 64,
        "dtype": "float16",
        "stream": 0,
    }
    with pytest.raises(ValueError, match=message):
        module.encoder_attention(**(arguments | change))


def test_null_pointers_are_an_error():
    with pytest.raises(RuntimeError, match="invalid argument"):
        module.encoder_attention(
            qkv=0, context=0, batch=1, sequence_length=9, num_heads=1, head_dim=64, dtype="float16", stream=0
        )
