"""The committed charts are those of the committed results."""

import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="no matplotlib here: make setup")

from profiling import records
from profiling.charts import charts, main, numbered
from profiling.records import ROOT
from tests.test_bench_records import record

COMMITTED = ROOT / "docs" / "charts"


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.svg")}


def test_committed_charts_are_those_of_the_results(tmp_path: Path):
    """After new results: python -m profiling.charts"""
    assert main(["--out", str(tmp_path)]) == 0
    assert files(tmp_path) == files(COMMITTED)


def test_ids_do_not_depend_on_the_last_bit():
    """Two hashes that differ between processors give the same file; what refers to an id still does."""
    one = '<clipPath id="p0123456789"/><use href="#m00000000ab"/><g clip-path="url(#p0123456789)"/>'
    other = one.replace("p0123456789", "pabcdef0123")
    assert numbered(one) == numbered(other)
    assert numbered(one) == '<clipPath id="id0"/><use href="#id1"/><g clip-path="url(#id0)"/>'


def texts(path: Path) -> set[str]:
    return {
        element.text for element in ElementTree.parse(path).iter() if element.text and element.text.strip()
    }


def test_what_was_measured_is_drawn_and_nothing_else(tmp_path: Path):
    timed = [record(variant="fused", median_ms=1.0), record(variant="compile", median_ms=2.5)]
    end_to_end = [
        record(part="end_to_end", variant=variant, tokens=tokens, median_ms=tokens / 4)
        for variant in ("fused", "stock")
        for tokens in (5, 20, 60)
    ]
    records.write(timed + end_to_end, tmp_path / "results" / "gpu" / "model" / "bench.json")
    out = tmp_path / "charts"
    out.mkdir()
    (out / "gone.svg").write_text("of a model that is not measured any more")
    assert main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 0
    assert set(files(out)) == {"headline.svg"} | {
        f"gpu/model/{name}.svg"
        for name in ("encoder", "encoder-speedup", "end_to_end", "end_to_end-speedup", "end_to_end-tokens")
    }
    assert {"torch.compile (fp16)", "TensorRT, fused (fp16)"} <= texts(out / "gpu/model/encoder.svg")
    assert "2.50" in texts(out / "gpu/model/encoder-speedup.svg")
    assert "PyTorch eager (fp16)" not in texts(out / "gpu/model/encoder.svg")
    assert {"tokens a line", "batch 8"} <= texts(out / "gpu/model/end_to_end-tokens.svg")


def test_speedups_are_of_the_same_precision(tmp_path: Path):
    measured = [record(variant="fused"), dataclasses.replace(record(variant="onnxruntime"), precision="fp32")]
    records.write(measured, tmp_path / "gpu" / "model" / "bench.json")
    assert set(charts(tmp_path)) == {"headline.svg", "gpu/model/encoder.svg"}


def test_errors(tmp_path: Path, capsys):
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no <gpu>/<model>/bench.json" in capsys.readouterr().err
    (tmp_path / "gpu" / "model").mkdir(parents=True)
    (tmp_path / "gpu" / "model" / "bench.json").write_text("{")
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "bench.json: unreadable" in capsys.readouterr().err
