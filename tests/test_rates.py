"""The bytes of a decode step, counted by hand and in weights; the GPU's rates, where there is one."""

import pytest
import torch

from profiling import rates
from profiling.device_decoder import (
    DECODERS,
    floor_microseconds,
    random_cross,
    random_weights,
    step_bytes,
)
from profiling.rates import COPIED_BYTES, Rates, copy_rate, decoder_bytes, matrix_rate, measure_rates, product


def test_bytes_of_a_step_by_hand():
    sizes = {"layers": 2, "width": 4, "inner": 8, "vocabulary": 10, "source": 5}
    # A layer: six matrices of 4 x 4 and two of 4 x 8, 160 numbers; the head: 40.
    weights = 2 * 160 + 40
    # A line, 5 states and on average 3 tokens: 8 keys and 8 values of 4 numbers in either layer.
    line = 2 * (8 + 8) * 4
    assert decoder_bytes(**sizes, lines=1, tokens=6) == 2 * (weights + line)
    assert decoder_bytes(**sizes, lines=3, tokens=6) == 2 * (weights + 3 * line)
    assert decoder_bytes(**sizes, lines=3, tokens=6, itemsize=4) == 4 * (weights + 3 * line)
    # Cross-attention's, 5 keys and 5 values of a line and layer, in one byte a number.
    cross = 2 * (5 + 5) * 4
    in_e4m3 = decoder_bytes(**sizes, lines=3, tokens=6, cross_itemsize=1)
    assert in_e4m3 == 2 * (weights + 3 * (line - cross)) + 3 * cross


@pytest.mark.parametrize("lines", [1, 3])
def test_bytes_of_a_step_are_those_of_the_decoders_tensors(lines: int):
    config = DECODERS["bundled"]
    read = [
        tensor
        for name, tensor in random_weights(config, torch.float16, "cpu").items()
        if name.endswith("_weight")
    ]
    for tensors in random_cross(config, lines, torch.float16, "cpu"):
        read += tensors
    assert sum(tensor.numel() * tensor.element_size() for tensor in read) == step_bytes(config, lines, 0)


@pytest.mark.parametrize(
    ("decoder", "lines", "floor"),
    [("small", 1, 10.5), ("small", 64, 61), ("base", 1, 108), ("base", 64, 512)],
)
def test_floors_are_the_reports(decoder: str, lines: int, floor: float):
    """The table of docs/report.md, section 1, at 4.5 TB/s."""
    assert floor_microseconds(DECODERS[decoder], lines, 20) == pytest.approx(floor, rel=0.01)


@pytest.mark.parametrize("dtype", rates.TYPES.values())
def test_product(dtype: torch.dtype):
    """In every type: finite, new values of that size."""
    y = product(dtype, 64, "cpu")()
    assert y.shape == (64, 64) and y.isfinite().all() and y.float().std() > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its rates would be measured")
@pytest.mark.parametrize("precision", rates.TYPES)
def test_no_rates_without_a_gpu(precision: str):
    assert measure_rates(precision, ["encoder", "decoder"]) == Rates()


def test_what_is_measured(monkeypatch):
    """Each rate once, and only where a part is held against it."""
    measured = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(rates, "matrix_rate", lambda dtype: measured.append(dtype) or 600.0)
    monkeypatch.setattr(rates, "copy_rate", lambda: measured.append("copy") or 3000.0)
    assert measure_rates("fp16", {"encoder"}) == Rates(matrix_tflops=600.0)
    assert measure_rates("bf16", {"decoder", "end_to_end"}) == Rates(copy_gb_per_s=3000.0)
    assert measure_rates("bf16", {"encoder", "decoder", "page"}) == Rates(600.0, 3000.0)
    assert measure_rates("fp16", {"page"}) == Rates()
    assert measure_rates("fp8", {"encoder"}) == Rates()  # no e4m3 products on compute capability 8.6
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert measure_rates("fp8", {"encoder"}) == Rates(matrix_tflops=600.0)
    assert measured == [torch.float16, "copy", torch.bfloat16, "copy", torch.float8_e4m3fn]


def test_rates_of_times(monkeypatch):
    monkeypatch.setattr(rates, "_milliseconds", lambda run: 2.0)
    monkeypatch.setattr(rates, "product", lambda dtype: None)
    assert matrix_rate(torch.float16) == pytest.approx(2 * 8192**3 / 2e-3 / 1e12)
    monkeypatch.setattr(torch, "randint", lambda *shape, **settings: torch.empty(0))
    assert copy_rate() == pytest.approx(2 * COPIED_BYTES / 2e-3 / 1e9)


def test_median_time(monkeypatch):
    """Of so many calls as fit into the time, within limits; the warm-up is not counted."""
    calls = []

    def times(run, count: int) -> list[float]:
        calls.append(count)
        return [40.0] if len(calls) == 1 else [1.0, 9.0, 2.0]

    monkeypatch.setattr(rates, "_times", times)
    runs = []
    assert rates._milliseconds(lambda: runs.append(None)) == 2.0
    assert (len(runs), calls) == (rates.WARMUPS, [1, rates.LEAST])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU can be used here")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_rates_of_this_gpu(precision: str):
    """Of a plausible size, whatever else runs on the GPU."""
    found = measure_rates(precision, {"encoder", "decoder"})
    if found.matrix_tflops is None:
        assert torch.cuda.get_device_capability() < rates.E4M3_COMPUTE_CAPABILITY and precision == "fp8"
    else:
        assert 1 < found.matrix_tflops < 20_000
    assert 10 < found.copy_gb_per_s < 50_000
