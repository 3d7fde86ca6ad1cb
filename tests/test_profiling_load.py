"""Arrivals, batches of what waits, and latencies."""

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from profiling.load import arrivals, main, serve
from tests.conftest import BUNDLED_MODEL


class Clock:
    """Time that passes only where somebody waits or works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_arrivals_are_a_poisson_process():
    moments = arrivals(50.0, 200.0, seed=3)
    gaps = [after - before for before, after in pairwise(moments)]
    assert moments == arrivals(50.0, 200.0, seed=3) != arrivals(50.0, 200.0, seed=4)
    assert moments[-1] < 200 and moments == sorted(moments)
    assert len(moments) == pytest.approx(10_000, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # exponential gaps


def test_batches_of_what_waits():
    """One batch takes a second, whatever its size."""
    clock = Clock()
    moments = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 5.0]
    latencies, batches = serve(lambda size: clock.sleep(1.0), moments, 4, clock, clock.sleep)
    # The first goes alone; of the five that wait then, a power of two, at most four; the last comes late.
    assert batches == [1, 4, 1, 1]
    assert latencies == pytest.approx([1.0, 1.9, 1.8, 1.7, 1.6, 2.5, 1.0])


def test_arrivals_do_not_wait_for_service():
    """An open loop: twice the capacity lets the latencies grow without bound."""
    clock = Clock()
    moments = [i * 0.5 for i in range(100)]
    latencies, batches = serve(lambda size: clock.sleep(float(size)), moments, 8, clock, clock.sleep)
    assert sum(batches) == len(latencies) == 100
    assert latencies[-1] > 40


def test_command_line(tmp_path: Path, monkeypatch, capsys):
    samples = Path("samples").resolve()
    monkeypatch.chdir(tmp_path)  # engines/ is made here
    out = tmp_path / "load.json"
    arguments = ["--backend", "onnxruntime", "--model", str(BUNDLED_MODEL), "--batch-size", "2"]
    assert (
        main([*arguments, "--loads", "50", "--seconds", "1", "--images", str(samples), "--json", str(out)])
        == 0
    )
    assert "Capacity" in capsys.readouterr().out
    content = json.loads(out.read_text())
    (load,) = content["loads"]
    assert 0 < load["p50_ms"] <= load["p95_ms"] <= load["p99_ms"]
    assert load["lines"] >= 10 and 1 <= load["mean_batch"] <= 2
    assert load["offered_lines_per_s"] == pytest.approx(content["capacity_lines_per_s"] / 2)


def test_errors(tmp_path: Path, capsys):
    assert main(["--images", str(tmp_path)]) == 2
    assert main(["--model", str(tmp_path), "--backend", "onnxruntime"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    with pytest.raises(SystemExit, match="2"):
        main(["--loads", "50,none"])
