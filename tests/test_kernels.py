"""The CUDA kernels against PyTorch, through the module `trocr_kernels`.

Tolerance by reference: the largest error against float64 may be twice that of PyTorch computing step by step
in the same type, plus 1e-5. Inputs are fresh every run (the seed is printed), outputs start as NaN, and every
tensor lies between NaN guards: reading outside shows as NaN in the result, writing outside as a lost guard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from profiling.kernel_calls import FusedOps, attention, merge_heads, split_qkv

DEVICE = "cuda"
TOKENS = (1, 59, 97, 257, 577, 578, 1025)
BATCH_HEADS = ((1, 16), (3, 8), (16, 6), (1, 3), (3, 12))
HEAD_DIMS = (32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 64  # elements: keeps the 16-byte alignment, and is more than any vector access could overrun

all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
all_head_dims = pytest.mark.parametrize("head_dim", HEAD_DIMS)
all_tokens = pytest.mark.parametrize("tokens", TOKENS)
all_batches = pytest.mark.parametrize(("batch", "heads"), BATCH_HEADS)


@pytest.fixture
def ops(kernels) -> Iterator[FusedOps]:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    print("seed", torch.seed())
    # Not the default stream: a kernel launched on the wrong one would race with the inputs' generation.
    with torch.cuda.stream(torch.cuda.Stream()):
        yield FusedOps()
    torch.cuda.synchronize()


class Guarded:
    """Tensors between NaN guards."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffers: list[torch.Tensor] = []

    def poisoned(self, *shape: int, offset: int = 0) -> torch.Tensor:
        """All NaN; `offset` elements past a 16-byte boundary."""
        size = math.prod(shape)
        buffer = torch.full((size + 2 * GUARD + offset,), math.nan, dtype=self.dtype, device=DEVICE)
        self.buffers.append(buffer[: GUARD + offset])
        self.buffers.append(buffer[GUARD + offset + size :])
        return buffer[GUARD + offset : GUARD + offset + size].view(shape)

    def random(self, *shape: int, offset: int = 0) -> torch.Tensor:
        return self.poisoned(*shape, offset=offset).normal_()

    def check(self) -> None:
        assert all(buffer.isnan().all() for buffer in self.buffers), "written outside of a tensor"


def assert_close(out: torch.Tensor, same_type: torch.Tensor, reference: torch.Tensor) -> None:
    assert out.shape == reference.shape
    error = (out.double() - reference).abs().max().item()
    allowed = 2 * (same_type.double() - reference).abs().max().item() + 1e-5
    assert error <= allowed, f"largest error {error:.3g}, allowed {allowed:.3g}"  # False for NaN too


def assert_attends(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> None:
    """`out` [B, S, D] is the attention of query, key and value [B, H, S, d]."""
    assert_close(
        out,
        merge_heads(attention(query, key, value, visible)),
        merge_heads(attention(query.double(), key.double(), value.double(), visible)),
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers: comparing and moving them treats NaN as any other value."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


# --- encoder attention --------------------------------------------------------------------------------------


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@all_tokens
@all_batches
def test_encoder_attention(ops, dtype, head_dim, tokens, batch, heads):
    guarded = Guarded(dtype)
    qkv = guarded.random(batch, tokens, 3 * heads * head_dim)
    out = guarded.poisoned(batch, tokens, heads * head_dim)
    ops.encoder_attention(qkv, out, heads)
    assert_attends(out, *split_qkv(qkv, heads))

    again = guarded.poisoned(*out.shape)
    ops.encoder_attention(qkv, again, heads)
    assert same_bits(out, again)

    order = torch.randperm(batch, device=DEVICE)
    ops.encoder_attention(qkv[order].contiguous(), again, heads)
    assert same_bits(out[order], again)
    guarded.check()


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@pytest.mark.parametrize("growth", [1.0, -1.0])
def test_encoder_attention_with_scores_that_grow_along_the_keys(ops, dtype, head_dim, growth):
    """The running maximum rises (or never rises again) from one tile of keys to the next."""
    batch, tokens, heads = 2, 577, 4
    guarded = Guarded(dtype)
    qkv = guarded.random(batch, tokens, 3 * heads * head_dim)
    query, key, _ = split_qkv(qkv, heads)
    ramp = torch.linspace(-4, 4, tokens, device=DEVICE) * growth
    query.abs_()
    key.mul_(0.1).add_(ramp.to(dtype)[:, None])
    out = guarded.poisoned(batch, tokens, heads * head_dim)
    ops.encoder_attention(qkv, out, heads)
    assert_attends(out, *split_qkv(qkv, heads))
    guarded.check()


# --- decoder self-attention ---------------------------------------------------------------------------------


def decoder_inputs(guarded: Guarded, batch: int, heads: int, capacity: int, head_dim: int):
    """qkv, the cache (key, value), NaN from each row's position on, and the positions: last, first, any."""
    qkv = guarded.random(batch, 1, 3 * heads * head_dim)
    positions = torch.randint(0, capacity, (batch, 1), device=DEVICE)
    positions[0] = capacity - 1
    if batch > 1:
        positions[1] = 0
    unwritten = torch.arange(capacity, device=DEVICE) >= positions  # [B, C]
    cache = tuple(guarded.random(batch, heads, capacity, head_dim) for _ in range(2))
    for tensor in cache:
        tensor.masked_fill_(unwritten[:, None, :, None], math.nan)
    return qkv, cache, positions


def appended(cache: torch.Tensor, new: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """cache [B, H, C, d] with new [B, H, 1, d] in row positions[b]."""
    index = positions[:, :, None, None].expand_as(new)
    return bits(cache).clone().scatter_(2, index, bits(new)).view(cache.dtype)


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@pytest.mark.parametrize("capacity", TOKENS)
@all_batches
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_decoder_self_attention(ops, dtype, head_dim, capacity, batch, heads, in_place):
    guarded = Guarded(dtype)
    qkv, past, positions = decoder_inputs(guarded, batch, heads, capacity, head_dim)
    query, new_key, new_value = split_qkv(qkv, heads)
    expected = appended(past[0], new_key, positions), appended(past[1], new_value, positions)
    present = past if in_place else tuple(guarded.poisoned(*tensor.shape) for tensor in past)
    out = guarded.poisoned(batch, 1, heads * head_dim)
    ops.decoder_self_attention(qkv, past, positions, out, present)

    for tensor, want in zip(present, expected, strict=True):
        assert same_bits(tensor, want)
    visible = (torch.arange(capacity, device=DEVICE) <= positions)[:, None, None, :]  # [B, 1, 1, C]
    key, value = (tensor.nan_to_num() for tensor in expected)
    assert_attends(out, query, key, value, visible)

    # Appending the same token to the same row again changes nothing.
    again = guarded.poisoned(*out.shape)
    ops.decoder_self_attention(qkv, past, positions, again, present)
    assert same_bits(out, again)

    order = torch.randperm(batch, device=DEVICE)
    permuted = tuple(tensor[order].contiguous() for tensor in past)
    ops.decoder_self_attention(qkv[order].contiguous(), permuted, positions[order], again, permuted)
    assert same_bits(out[order], again)
    guarded.check()


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "apart"])
def test_decoder_self_attention_position_outside_of_the_cache(ops, dtype, head_dim, in_place):
    heads, capacity = 3, 16
    outside = (-1, capacity, capacity + 1, 2**40, -(2**40), 2**32)
    guarded = Guarded(dtype)
    qkv, past, positions = decoder_inputs(guarded, len(outside) + 1, heads, capacity, head_dim)
    positions[: len(outside), 0] = torch.tensor(outside, device=DEVICE)
    before = tuple(tensor.clone() for tensor in past)
    present = past if in_place else tuple(guarded.poisoned(*tensor.shape) for tensor in past)
    out = guarded.poisoned(len(outside) + 1, 1, heads * head_dim)
    ops.decoder_self_attention(qkv, past, positions, out, present)

    for tensor, want in zip(present, before, strict=True):
        assert same_bits(tensor[: len(outside)], want[: len(outside)])
    assert (out[: len(outside)] == 0).all()
    assert not out[-1].isnan().any()
    guarded.check()


# --- cross-attention ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@all_tokens
@all_batches
def test_cross_attention(ops, dtype, head_dim, tokens, batch, heads):
    guarded = Guarded(dtype)
    query = guarded.random(batch, 1, heads * head_dim).mul_(4)  # a peaked softmax, as trained models have
    key, value = (guarded.random(batch, heads, tokens, head_dim) for _ in range(2))
    out = guarded.poisoned(batch, 1, heads * head_dim)
    ops.cross_attention(query, key, value, out)
    assert_attends(out, query.view(batch, 1, heads, head_dim).transpose(1, 2), key, value)

    again = guarded.poisoned(*out.shape)
    ops.cross_attention(query, key, value, again)
    assert same_bits(out, again)

    order = torch.randperm(batch, device=DEVICE)
    ops.cross_attention(*(tensor[order].contiguous() for tensor in (query, key, value)), again)
    assert same_bits(out[order], again)
    guarded.check()


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@pytest.mark.parametrize(("images", "beams", "heads"), [(1, 4, 8), (3, 5, 6), (16, 2, 16), (40, 4, 8)])
def test_rows_that_share_an_image(ops, dtype, head_dim, images, beams, heads):
    """The result is that of the same keys and values repeated for every row, bit for bit."""
    tokens, rows = 578, images * beams
    guarded = Guarded(dtype)
    query = guarded.random(rows, 1, heads * head_dim).mul_(4)
    key, value = (guarded.random(images, heads, tokens, head_dim) for _ in range(2))
    out, repeated = (guarded.poisoned(rows, 1, heads * head_dim) for _ in range(2))
    ops.cross_attention(query, key, value, out)
    ops.cross_attention(query, *(tensor.repeat_interleave(beams, dim=0) for tensor in (key, value)), repeated)
    assert not out.isnan().any()
    assert same_bits(out, repeated)
    guarded.check()


# --- keys and values of cross-attention ---------------------------------------------------------------------


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@all_tokens
@all_batches
def test_cross_key_value(ops, dtype, head_dim, tokens, batch, heads):
    """As PyTorch's products, split into heads; and the bits are those of y [M, N] without the split."""
    inputs, width = 192, heads * head_dim
    guarded, wide = Guarded(dtype), Guarded(torch.float32)
    x, weight = guarded.random(batch, tokens, inputs), guarded.random(2 * width, inputs).mul_(inputs**-0.5)
    bias = wide.random(2 * width)
    key, value = (guarded.poisoned(batch, heads, tokens, head_dim) for _ in range(2))
    ops.cross_key_value(x, weight, bias, key, value)

    def split(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(batch, tokens, 2, heads, head_dim).permute(2, 0, 3, 1, 4)

    found = torch.stack((key, value))
    reference = split(F.linear(x.double(), weight.double(), bias.double()))
    assert_close(found, split(F.linear(x, weight, bias.to(dtype))), reference)

    rows = guarded.poisoned(batch, tokens, 2 * width)
    common = {"rows": batch * tokens, "outputs": 2 * width, "inputs": inputs}
    common |= {"dtype": str(dtype).removeprefix("torch."), "stream": torch.cuda.current_stream().cuda_stream}
    ops.kernels.linear(x.data_ptr(), weight.data_ptr(), rows.data_ptr(), bias=bias.data_ptr(), **common)
    assert same_bits(found, split(rows))
    guarded.check()
    wide.check()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cross_key_value_with_every_tactic(ops, head_dim):
    batch, tokens, inputs, heads = 3, 97, 384, 8
    guarded = Guarded(torch.float16)
    x, weight = guarded.random(batch, tokens, inputs), guarded.random(2 * heads * head_dim, inputs)
    bias = torch.randn(2 * heads * head_dim, device=DEVICE)
    first = [guarded.poisoned(batch, heads, tokens, head_dim) for _ in range(2)]
    ops.cross_key_value(x, weight, bias, *first)
    ran = 0
    for tactic in range(1, ops.kernels.linear_tactic_count() + 1):
        found = [guarded.poisoned(batch, heads, tokens, head_dim) for _ in range(2)]
        try:
            ops.cross_key_value(x, weight, bias, *found, tactic=tactic)
        except RuntimeError:
            continue  # not for this device or problem
        ran += 1
        for tensor, expected in zip(found, first, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=2e-3, atol=0.05)
    assert ran >= 2
    guarded.check()


# --- cache reorder ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@all_dtypes
@all_head_dims
@pytest.mark.parametrize(
    ("images", "beams", "heads"), [(1, 1, 3), (3, 2, 8), (5, 4, 6), (2, 7, 3), (64, 4, 8)]
)
def test_cache_reorder(ops, kernels, dtype, head_dim, images, beams, heads):
    """In place, up to each image's position, and nothing else is written."""
    tensors, capacity, rows = 4, 32, images * beams
    guarded = Guarded(dtype)
    memory = guarded.random(tensors, rows + 1, heads, capacity, head_dim)  # a row more than are in use
    before = memory.clone()
    first = torch.arange(images, device=DEVICE)[:, None] * beams
    chosen = (torch.randint(beams, (images, beams), device=DEVICE) + first).flatten()
    positions = torch.randint(capacity + 1, (images, 1), device=DEVICE).expand(images, beams)
    positions = positions.reshape(rows, 1).contiguous()
    kernels.reorder_cache(
        memory.data_ptr(),
        chosen.data_ptr(),
        positions.data_ptr(),
        tensor_bytes=memory[0].nbytes,
        tensors=tensors,
        batch=rows,
        beams=beams,
        num_heads=heads,
        capacity=capacity,
        row_bytes=head_dim * memory.element_size(),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    expected = before.clone()
    seen = (torch.arange(capacity, device=DEVICE) < positions)[None, :, None, :, None]
    expected[:, :rows] = torch.where(seen, before[:, chosen], before[:, :rows])
    assert same_bits(memory, expected)
    guarded.check()


# --- residual + LayerNorm -----------------------------------------------------------------------------------


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("width", [1, 7, 59, 256, 384, 768, 1000, 1001, 1024, 1032, 2049, 4096])
@pytest.mark.parametrize("rows", [1, 3, 577])
@pytest.mark.parametrize(("emit_sum", "epsilon"), [(True, 1e-12), (False, 1e-5)], ids=["sum", "no sum"])
def test_residual_layernorm(ops, dtype, width, rows, emit_sum, epsilon):
    guarded = Guarded(dtype)
    x, residual = guarded.random(rows, width), guarded.random(rows, width).add_(8)  # a mean away from 0
    gamma, beta = guarded.random(width), guarded.random(width)
    normed = guarded.poisoned(rows, width)
    total = guarded.poisoned(rows, width) if emit_sum else None
    ops.residual_layernorm(x, residual, gamma, beta, normed, total, epsilon)

    expected = x + residual
    if emit_sum:
        assert same_bits(total, expected)
    assert_close(
        normed,
        F.layer_norm(expected, (width,), gamma, beta, epsilon),
        F.layer_norm(expected.double(), (width,), gamma.double(), beta.double(), epsilon),
    )

    again = guarded.poisoned(rows, width)
    order = torch.randperm(rows, device=DEVICE)
    ops.residual_layernorm(
        x[order].contiguous(), residual[order].contiguous(), gamma, beta, again, None, epsilon
    )
    assert same_bits(normed[order], again)

    # Outputs in place of the inputs.
    ops.residual_layernorm(x, residual, gamma, beta, residual, x if emit_sum else None, epsilon)
    assert same_bits(residual, normed)
    assert not emit_sum or same_bits(x, total)
    guarded.check()


@pytest.mark.gpu
@all_dtypes
def test_residual_layernorm_unaligned(ops, dtype):
    guarded = Guarded(dtype)
    aligned = [guarded.random(5, 256), guarded.random(5, 256), guarded.random(256), guarded.random(256)]
    shifted = [guarded.random(*tensor.shape, offset=1).copy_(tensor) for tensor in aligned]
    normed, total = (guarded.poisoned(5, 256, offset=1) for _ in range(2))
    ops.residual_layernorm(*shifted, normed, total)
    assert same_bits(total, aligned[0] + aligned[1])
    parameters = (256,), *aligned[2:]
    reference = F.layer_norm(total.double(), (256,), *(tensor.double() for tensor in aligned[2:]), 1e-5)
    assert_close(normed, F.layer_norm(total, *parameters, 1e-5), reference)
    guarded.check()


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("width", [1, 59, 192, 384, 768, 1024, 1536])
@pytest.mark.parametrize("rows", [1, 5, 577])
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_layernorm(ops, dtype, width, rows, overlap):
    guarded = Guarded(dtype)
    x, gamma, beta = guarded.random(rows, width).add_(8), guarded.random(width), guarded.random(width)
    normed = guarded.poisoned(rows, width)
    ops.layernorm(x, gamma, beta, normed, 1e-12, overlap)
    wide = F.layer_norm(x.double(), (width,), gamma.double(), beta.double(), 1e-12)
    assert_close(normed, F.layer_norm(x, (width,), gamma, beta, 1e-12), wide)
    ops.layernorm(x, gamma, beta, x, 1e-12, overlap)
    assert same_bits(x, normed)
    guarded.check()


# --- bias + activation --------------------------------------------------------------------------------------

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu}


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 7, 59, 1000, 1001, 1024, 1536, 3072, 4096])
@pytest.mark.parametrize("rows", [1, 3, 577])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_bias_activation(ops, dtype, activation, width, rows, offset):
    guarded = Guarded(dtype)
    x, bias = guarded.random(rows, width, offset=offset).mul_(2), guarded.random(width)
    y = guarded.poisoned(rows, width, offset=offset)
    ops.bias_activation(x, bias, y, activation)
    activate = ACTIVATIONS[activation]
    assert_close(y, activate(x + bias), activate(x.double() + bias.double()))

    again = guarded.poisoned(rows, width)
    order = torch.randperm(rows, device=DEVICE)
    ops.bias_activation(x[order].contiguous(), bias, again, activation)
    assert same_bits(y[order], again)

    ops.bias_activation(x, bias, x, activation)  # in place
    assert same_bits(x, y)
    guarded.check()


@pytest.mark.gpu
@all_dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bias_activation_special_values(ops, dtype, activation):
    guarded = Guarded(dtype)
    x = guarded.poisoned(1, 8)
    x.copy_(torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e4, -1e4, 1e-7]))
    bias, y = guarded.poisoned(8).zero_(), guarded.poisoned(1, 8)
    ops.bias_activation(x, bias, y, activation)
    torch.testing.assert_close(y, ACTIVATIONS[activation](x), equal_nan=True)


# --- streams and graphs -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_all_ops_in_a_cuda_graph(ops):
    """Launchers neither synchronise nor allocate, and read their inputs at replay, not at capture."""
    dtype, batch, heads, head_dim, tokens, capacity = torch.float16, 2, 4, 64, 97, 32
    width = heads * head_dim
    guarded = Guarded(dtype)
    qkv, query = guarded.random(batch, tokens, 3 * width), guarded.random(batch, 1, width)
    key, value = (guarded.random(batch, heads, tokens, head_dim) for _ in range(2))
    cache = tuple(guarded.random(batch, heads, capacity, head_dim) for _ in range(2))
    positions = torch.zeros(batch, 1, dtype=torch.int64, device=DEVICE)
    x, residual, vector = guarded.random(batch, width), guarded.random(batch, width), guarded.random(width)
    outputs = [guarded.poisoned(batch, tokens, width), *(guarded.poisoned(batch, 1, width) for _ in range(2))]
    outputs += [guarded.poisoned(batch, width) for _ in range(2)]

    def run() -> None:
        ops.encoder_attention(qkv, outputs[0], heads)
        ops.decoder_self_attention(qkv[:, :1].contiguous(), cache, positions, outputs[1], cache)
        ops.cross_attention(query, key, value, outputs[2])
        ops.residual_layernorm(x, residual, vector, vector, outputs[3])
        ops.bias_activation(x, vector, outputs[4], "gelu")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for tensor in (qkv, query, key, value, x, residual):
        tensor.normal_()
    positions += 1
    for tensor in outputs:
        tensor.fill_(math.nan)
    graph.replay()
    replayed = [tensor.clone() for tensor in outputs]
    run()
    for tensor, want in zip(replayed, outputs, strict=True):
        assert not want.isnan().any()
        assert same_bits(tensor, want)


# --- what is refused: no GPU needed -------------------------------------------------------------------------

POINTER = 4096  # never read: every call below is refused before the launch
ENCODER = {"batch": 1, "sequence_length": 577, "num_heads": 6, "head_dim": 64, "dtype": "float16"}
DECODER = {"batch": 1, "capacity": 64, "num_heads": 6, "head_dim": 64, "dtype": "float16"}
LAYERNORM = {"rows": 3, "width": 256, "epsilon": 1e-5, "dtype": "float16"}
ACTIVATION = {"rows": 3, "width": 256, "activation": "gelu", "dtype": "float16"}
CALLS = {
    "encoder_attention": (2, ENCODER),
    "decoder_self_attention": (7, DECODER),
    "cross_attention": (4, ENCODER),
    "residual_layernorm": (6, LAYERNORM),
    "bias_activation": (3, ACTIVATION),
}
ATTENTIONS = ("encoder_attention", "decoder_self_attention", "cross_attention")
TOKEN_OPS = ("encoder_attention", "cross_attention")
ROW_OPS = ("residual_layernorm", "bias_activation")
REFUSED = [
    *((op, {"dtype": "int8"}, "dtype 'int8' is none of") for op in CALLS),
    *(
        (op, {"head_dim": size}, "head size is neither 32 nor 64")
        for op in ATTENTIONS
        for size in (0, 48, 128)
    ),
    *((op, {"batch": size}, "must be at least 1") for op in ATTENTIONS for size in (0, -1)),
    *((op, {"num_heads": size}, "must be at least 1") for op in ATTENTIONS for size in (0, -1)),
    *((op, {"batch": 65536}, "at most 65535") for op in ATTENTIONS),
    *((op, {"num_heads": 65536}, "at most 65535") for op in ATTENTIONS),
    *((op, {"sequence_length": size}, "must be at least 1") for op in TOKEN_OPS for size in (0, -577)),
    *(
        ("cross_attention", {"batch": 4, "images": size}, "not a multiple of the images")
        for size in (-1, 3, 8)
    ),
    ("cross_attention", {"batch": 65535, "images": 1}, "rows of an image times heads must be at most"),
    ("decoder_self_attention", {"capacity": 0}, "must be at least 1"),
    *(
        (op, {name: size}, "must be at least 1")
        for op in ROW_OPS
        for name in ("rows", "width")
        for size in (0, -3)
    ),
    *((op, {"rows": 2**31}, "rows are above") for op in ROW_OPS),
    *((op, {"width": 2**30 + 1}, "width is above") for op in ROW_OPS),
    ("residual_layernorm", {"epsilon": -1e-5}, "epsilon must not be negative"),
    ("residual_layernorm", {"epsilon": math.nan}, "epsilon must not be negative"),
    ("bias_activation", {"activation": "tanh"}, "activation 'tanh' is neither"),
]


CACHE = {
    "tensor_bytes": 1 << 20,
    "tensors": 4,
    "batch": 8,
    "beams": 4,
    "num_heads": 8,
    "capacity": 32,
    "row_bytes": 64,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beams": 17}, "beams must be 1 to 16"),
        ({"beams": 0}, "beams must be 1 to 16"),
        ({"beams": 3}, "not a multiple of the beams"),
        ({"num_heads": 0}, "heads and tensors must be 1 to 65535"),
        ({"tensors": 65536}, "heads and tensors must be 1 to 65535"),
        ({"capacity": 0}, "capacity must be at least 1"),
        ({"row_bytes": 24}, "multiples of 16 bytes"),
    ],
)
def test_refuses_what_it_cannot_reorder(kernels, change, reason):
    with pytest.raises(RuntimeError, match=f"cannot implement reorder_cache because.*{reason}"):
        kernels.reorder_cache(POINTER, POINTER, POINTER, **(CACHE | change))


@pytest.mark.parametrize(("op", "change", "reason"), REFUSED)
def test_refuses_what_it_cannot_implement(kernels, op, change, reason):
    pointers, arguments = CALLS[op]
    with pytest.raises(RuntimeError, match=f"cannot implement {op} because.*{reason}"):
        getattr(kernels, op)(*[POINTER] * pointers, **(arguments | change))


@pytest.mark.parametrize("op", CALLS)
def test_refuses_null_and_misaligned_pointers(kernels, op):
    pointers, arguments = CALLS[op]
    if op == "residual_layernorm":
        pointers -= 1  # the last, sum, may be null
        arguments = arguments | {"sum": POINTER}
    for index in range(pointers):
        for address, reason in ((0, "is null"), (POINTER + 1, "is not a multiple of")):
            addresses = [POINTER] * pointers
            addresses[index] = address
            with pytest.raises(RuntimeError, match=f"cannot implement {op} because pointer '.*' {reason}"):
                getattr(kernels, op)(*addresses, **arguments)


def test_documents_every_op(kernels):
    for op in CALLS:
        assert len(getattr(kernels, op).__doc__.splitlines()) > 1
