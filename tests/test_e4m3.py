"""The e4m3 variants of the encoder's kernels on a Hopper GPU, against PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from profiling.attention_sm90 import DIVIDED_LENGTH, HOPPER_PATHS

EPILOGUES = ("bias", "relu", "layernorm", "layernorm_gelu", "gelu", "residual", "residual_statistics")
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def linear(hopper):
    """profiling.linear, on a Hopper GPU."""
    return pytest.importorskip("profiling.linear")


def problem(linear, rows: int, inputs: int, outputs: int, epilogue: str, seed: int = 0):
    return linear.E4m3Linear(rows, inputs, outputs, epilogue, torch.float16, seed)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", (1, 63, 64, 65, 127, 577, 1154))
def test_epilogues_and_tails(linear, rows: int, epilogue: str) -> None:
    for hidden in (192, 384, 768, 1024):
        for inputs, outputs in ((hidden, 3 * hidden), (hidden, 4 * hidden), (4 * hidden, hidden)):
            this = problem(linear, rows, inputs, outputs, epilogue, rows)
            this.run()
            assert not this.errors(), str(this)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_tactic(linear, epilogue: str) -> None:
    ran = 0
    for tactic in range(1, linear.kernels.linear_tactic_count() + 1):
        for rows, inputs, outputs in ((1, 192, 192), (65, 320, 448), (577, 768, 768), (1154, 1024, 3072)):
            this = problem(linear, rows, inputs, outputs, epilogue)
            try:
                this.run(tactic)
            except RuntimeError as error:
                assert "invalid argument" in str(error)
                continue
            assert not this.errors(), f"tactic {tactic}: {this}"
            ran += 1
    assert ran >= 8


@pytest.mark.parametrize("epilogue", ["layernorm", "layernorm_gelu", "residual_statistics"])
def test_batch_64(linear, epilogue: str) -> None:
    for inputs, outputs in ((384, 1536), (768, 768), (1024, 4096)):
        this = problem(linear, 36992, inputs, outputs, epilogue)
        this.run()
        assert not this.errors(), str(this)


@pytest.mark.parametrize("epilogue", ["layernorm_gelu", "residual_statistics"])
def test_runs_are_bitwise_equal(linear, epilogue: str) -> None:
    this = problem(linear, 1154, 768, 768, epilogue)
    this.run()
    first = this.quantized.clone()
    for _ in range(3):
        this.poison()
        this.quantized.fill_(255)
        this.run(overlap=True)
        assert torch.equal(this.quantized, first)


def test_row_statistics_leave_a_copy(linear) -> None:
    x = (torch.randn(577, 768, device="cuda") * 3).half()
    statistics = torch.empty(577, 12, 2, device="cuda")
    quantized = torch.full((578, 768), 255, dtype=torch.uint8, device="cuda")
    linear.kernels.row_statistics(
        x=x.data_ptr(),
        statistics=statistics.data_ptr(),
        quantized=quantized.data_ptr(),
        scale=0.03,
        rows=577,
        width=768,
        dtype="float16",
        stream=torch.cuda.current_stream().cuda_stream,
    )
    torch.testing.assert_close(statistics, linear.partial_statistics(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(quantized[:577], linear.quantize(x, 0.03).view(torch.uint8))
    assert (quantized[577] == 255).all()


@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        (path, tokens)
        for path in (*HOPPER_PATHS, "auto")
        for tokens in (1, 64, 130, 257, 577, 578, 700)
        if path != "divided" or tokens <= DIVIDED_LENGTH  # others it refuses: test_attention_sm90.py
    ],
)
def test_attention(linear, tokens: int, path: str) -> None:
    batch, heads, scale = 3, 6, 0.004
    qkv = torch.randn(batch, tokens, 3, heads, 64, device="cuda").half()
    context = torch.full((batch * tokens + 1, heads * 64), 255, dtype=torch.uint8, device="cuda")
    linear.kernels.encoder_attention(
        qkv=qkv.data_ptr(),
        context=context.data_ptr(),
        batch=batch,
        sequence_length=tokens,
        num_heads=heads,
        head_dim=64,
        dtype="float16",
        output_scale=scale,
        path=path,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    query, key, value = qkv.float().permute(2, 0, 3, 1, 4)
    exact = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2).flatten(0, 1)
    got = linear.dequantize(context[:-1].view(torch.float8_e4m3fn), scale)
    reference = exact.clamp(-448 * scale, 448 * scale)
    # Half of the last of four bits, of subnormals half of 2^-9, and what float16 probabilities cost.
    allowed = (reference.abs() / 16).clamp(min=scale / 1024) + 2e-3 * exact.abs().max()
    assert ((got - reference).abs() <= allowed).all()
    assert (context[-1] == 255).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "bfloat16"}, "of half"),
        ({"inputs": 72}, "multiples of 16"),
        ({"product_scale": 0.0}, "scales"),
        ({"activation": "gelu"}, "GELU"),
        ({"quantized": 16}, "scales"),
        ({"e4m3": False, "quantized": 16, "output_scale": 1.0}, "e4m3 inputs"),
    ],
)
def test_refusals(linear, change: dict, reason: str) -> None:
    x = torch.zeros(64, 128, dtype=torch.float16, device="cuda")
    arguments = {name: x.data_ptr() for name in ("x", "weight", "y")}
    arguments |= {
        "rows": 64,
        "outputs": 64,
        "inputs": 64,
        "dtype": "float16",
        "e4m3": True,
        "product_scale": 1.0,
    }
    with pytest.raises(RuntimeError, match=reason):
        linear.kernels.linear(**(arguments | change))
