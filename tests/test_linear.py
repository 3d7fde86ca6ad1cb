"""The fused linear kernel on a GPU: every epilogue, type, tail and tactic against PyTorch."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path

import pytest
import torch

POLYNOMIAL = (  # of gelu() in plugins/common/device.cuh, from degree 5 down
    -0.00030645227525383234,
    0.0056864055804908276,
    -0.04774897173047066,
    -0.4648023247718811,
    -1.1488468647003174,
    -1.0001472234725952,
)

TYPES = (torch.float16, torch.bfloat16)
SHAPES = [
    (inputs, outputs)
    for hidden in (192, 384, 768, 1024)
    for inputs, outputs in (
        (hidden, 3 * hidden),
        (hidden, hidden),
        (hidden, 4 * hidden),
        (4 * hidden, hidden),
    )
]
ROWS = (1, 63, 64, 65, 127, 577, 578, 1154)
EPILOGUES = (
    "plain",
    "bias",
    "relu",
    "gelu",
    "layernorm",
    "layernorm_gelu",
    "residual",
    "residual_statistics",
)


@pytest.fixture(scope="module")
def linear():
    """profiling.linear with the built module."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return pytest.importorskip("profiling.linear", reason="trocr_kernels is not built", exc_type=ImportError)


def test_gelu_polynomial_is_within_a_quarter_of_half_an_ulp() -> None:
    """The kernel's formula in float32, on the CPU: as accurate as its comment says, and as written there."""
    source = (Path(__file__).parents[1] / "plugins/common/device.cuh").read_text()
    for coefficient in POLYNOMIAL:
        assert f"{coefficient!r}F" in source
    x = torch.linspace(-40, 40, 400_001)
    p = torch.full_like(x, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = p * x.abs() + coefficient
    gelu = x.clamp(min=0) - x.abs() * torch.exp2(p.clamp(min=-126))
    exact = x.double() * 0.5 * torch.erfc(-x.double() / math.sqrt(2))
    half_ulp = torch.clamp(exact.abs() * 2**-11, min=2**-25)
    assert ((gelu.double() - exact).abs() / half_ulp).max() < 0.25


@pytest.mark.parametrize(
    ("name", "most", "mean"), [("tactics-h100.csv", 1.1, 1.008), ("tactics-h100-e4m3.csv", 1.08, 1.004)]
)
def test_tactics_are_nearly_the_best_of_those_measured(kernels, name: str, most: float, mean: float) -> None:
    """The choice among Hopper's tactics, against times on an H100 (132 multiprocessors)."""
    table = Path(__file__).parents[1] / "plugins" / "linear" / name
    ratios = []
    for row in csv.DictReader(table.open()):
        sizes = {name: int(row[name]) for name in ("rows", "inputs", "outputs")}
        residual = row["product"] in ("projection", "fc2")
        chosen = kernels.linear_tactic_on_hopper(
            **sizes, residual=residual, e4m3="e4m3" in name, multiprocessors=132
        )
        times = {name: float(row[name]) for name in row if name.startswith("tactic") and row[name]}
        ratios.append(times[f"tactic {chosen}"] / min(times.values()))
    assert len(ratios) >= 64
    assert max(ratios) < most
    assert statistics.mean(ratios) < mean


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("rows", ROWS)
def test_epilogues_and_tails(linear, rows: int, epilogue: str, dtype: torch.dtype) -> None:
    for inputs, outputs in SHAPES[:8]:
        problem = linear.Linear(rows, inputs, outputs, epilogue, dtype, seed=rows)
        problem.run()
        assert not problem.errors(), str(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_float32(linear, epilogue: str) -> None:
    for rows, inputs, outputs in ((1, 64, 64), (63, 192, 768), (577, 768, 192), (130, 1024, 320)):
        problem = linear.Linear(rows, inputs, outputs, epilogue, torch.float32, seed=rows)
        problem.run()
        assert not problem.errors(), str(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_encoder_products_at_batch_64(linear, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    epilogue = "residual_statistics"
    if outputs > inputs:
        epilogue = "layernorm_gelu" if outputs == 4 * inputs else "layernorm"
    problem = linear.Linear(36992, inputs, outputs, epilogue, dtype)
    problem.run()
    assert not problem.errors(), str(problem)


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_tactic(linear, epilogue: str) -> None:
    ran = 0
    for tactic in range(1, linear.kernels.linear_tactic_count() + 1):
        for rows, inputs, outputs in ((1, 192, 192), (65, 320, 448), (577, 768, 768), (1154, 1024, 3072)):
            problem = linear.Linear(rows, inputs, outputs, epilogue, torch.float16)
            try:
                problem.run(tactic)
            except RuntimeError as error:
                assert "invalid argument" in str(error)
                continue
            assert not problem.errors(), f"tactic {tactic}: {problem}"
            ran += 1
    assert ran >= 8


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", ["plain", "gelu", "residual"])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (72, 40), (200, 72), (1000, 1016)])
def test_sizes_that_fit_no_tile(linear, inputs: int, outputs: int, epilogue: str) -> None:
    for tactic in range(linear.kernels.linear_tactic_count() + 1):
        problem = linear.Linear(100, inputs, outputs, epilogue, torch.float16)
        try:
            problem.run(tactic)
        except RuntimeError as error:
            assert tactic > 0 and "invalid argument" in str(error)
            continue
        assert not problem.errors(), f"tactic {tactic}: {problem}"


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", ["layernorm_gelu", "residual_statistics"])
def test_runs_are_bitwise_equal_on_any_stream_and_overlapped(linear, epilogue: str) -> None:
    for tactic in range(linear.kernels.linear_tactic_count() + 1):
        problem = linear.Linear(1154, 768, 768, epilogue, torch.float16)
        try:
            problem.run(tactic)
        except RuntimeError:
            continue
        first = problem.y.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for overlap in (False, True, True):
            with torch.cuda.stream(stream):
                problem.poison()
                problem.run(tactic, overlap=overlap)
            stream.synchronize()
            assert torch.equal(problem.y[:1154], first[:1154]), f"tactic {tactic}"
        assert not problem.errors()


@pytest.mark.gpu
def test_residual_in_place(linear) -> None:
    for tactic in range(linear.kernels.linear_tactic_count() + 1):
        problem = linear.Linear(578, 1536, 384, "residual_statistics", torch.float16)
        try:
            problem.run(tactic)
        except RuntimeError:
            continue
        expected = problem.y[:578].clone()
        problem.residual = problem.y[:578].copy_(problem.residual)
        problem.run(tactic)
        assert torch.equal(problem.y[:578], expected), f"tactic {tactic}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (*TYPES, torch.float32), ids=str)
def test_row_statistics(linear, dtype: torch.dtype) -> None:
    x = (torch.randn(577, 768, device="cuda") * 3 + 10).to(dtype)
    got = torch.full((578, 12, 2), torch.nan, device="cuda")
    linear.kernels.row_statistics(
        x=x.data_ptr(),
        statistics=got.data_ptr(),
        rows=577,
        width=768,
        dtype=linear.name_of(dtype),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    torch.testing.assert_close(got[:577], linear.partial_statistics(x), rtol=1e-4, atol=1e-5)
    assert got[577].isnan().all()


@pytest.mark.gpu
def test_statistics_carry_from_product_to_product(linear) -> None:
    """Projection, then QKV with its LayerNorm folded in, on the projection's own statistics."""
    first = linear.Linear(577, 768, 768, "residual_statistics", torch.float16)
    first.run()
    second = linear.Linear(577, 768, 2304, "layernorm", torch.float16)
    second.x = first.y[:577]
    second.input_statistics = first.output_statistics
    second.run()
    assert not first.errors() and not second.errors()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": 12}, "multiples of 8"),
        ({"outputs": 4}, "multiples of 8"),
        ({"rows": 0}, "at least 1"),
        ({"tactic": 999}, "invalid argument"),
        ({"y": 2}, "pointer 'y' is not a multiple of 16 bytes"),
        ({"bias": 4}, "invalid argument"),
        ({"weight_sum": 8}, "input statistics"),
        ({"output_statistics": 8}, "output statistics"),
    ],
)
def test_refuses_what_it_cannot_do(linear, change: dict, reason: str) -> None:
    x = torch.zeros(64, 64, dtype=torch.float16, device="cuda")
    arguments = {
        "x": x.data_ptr(),
        "weight": x.data_ptr(),
        "y": x.data_ptr(),
        "rows": 64,
        "outputs": 64,
        "inputs": 64,
        "dtype": "float16",
    }
    with pytest.raises(RuntimeError, match=reason):
        linear.kernels.linear(**(arguments | change))
