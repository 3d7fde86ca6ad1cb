"""The committed charts are those of the committed results."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="no matplotlib here: make setup")

from profiling import records
from profiling.charts import charts, main, numbered
from profiling.records import ROOT
from profiling.summary import headline, overview, summary
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
        for variant in ("fused", "fused_e4m3", "stock")
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
    in_e4m3 = "TensorRT, fused, keys in e4m3 (fp16)"
    assert {"tokens a line", "batch 8", in_e4m3} <= texts(out / "gpu/model/end_to_end-tokens.svg")


def test_load_and_tensors_are_drawn(tmp_path: Path):
    folder = tmp_path / "results" / "gpu" / "model"
    records.write([record()], folder / "bench.json")
    load = {"load": 0.5, "lines_per_s": 90.0, "p50_ms": 3.0, "p95_ms": 5.0, "p99_ms": 7.0}
    content = {"model": "M", "gpu": "G", "capacity_lines_per_s": 200.0, "loads": [load]}
    (folder / "load.json").write_text(json.dumps(content))
    errors = [
        {"precision": precision, "variant": "fused", "tensor": tensor, "relative": {"p99": 1e-3}}
        for precision in ("fp16", "bf16")
        for tensor in ("encoder.0", "logits.0")
    ]
    (folder / "tensors").mkdir()
    (folder / "tensors" / "tensors.json").write_text(json.dumps(content | {"errors": errors}))
    out = tmp_path / "charts"
    assert main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 0
    assert {"p99", "50%", "capacity", "90"} <= texts(out / "gpu/model/load.svg")
    drawn = texts(out / "gpu/model/tensors.svg")
    assert {"encoder.0", "logits.0", "TensorRT, fused (bf16)"} <= drawn
    (folder / "load.json").write_text("{")
    with pytest.raises(records.RecordError, match=r"load\.json: no JSON"):
        charts(tmp_path / "results")


def test_layers_are_drawn_in_their_order(tmp_path: Path):
    folder = tmp_path / "results" / "gpu" / "model" / "layers"
    folder.mkdir(parents=True)
    layers = [{"name": "a", "ms": 0.5, "op": "Attention"}, {"name": "b", "ms": 0.0, "op": "nothing"}]
    timelines = {"stock": [*layers, {"name": "c", "ms": 0.25, "op": "Linear"}], "fused": layers}
    entry = {"graph": "encoder", "batch": 8, "timelines": timelines}
    content = {"environment": {"gpu": "G"}, "comparisons": [entry, entry | {"batch": 16}]}
    (folder / "layers.json").write_text(json.dumps(content))
    figure = charts(tmp_path / "results")["gpu/model/encoder-timeline.svg"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["batch 8", "batch 16"]
    assert figure.legends[0].get_texts()[0].get_text() == "Attention"
    spans = {
        collection.get_label(): [
            path.get_extents().extents[[0, 2]].tolist() for path in collection.get_paths()
        ]
        for collection in figure.axes[0].collections
        if collection.get_paths()
    }
    assert [0.5, 0.75] in [span for found in spans.values() for span in found]  # behind the first
    assert not any("nothing" in text.get_text() for text in figure.legends[0].get_texts())


def test_speedups_are_of_the_same_precision(tmp_path: Path):
    measured = [record(variant="fused"), dataclasses.replace(record(variant="onnxruntime"), precision="fp32")]
    records.write(measured, tmp_path / "gpu" / "model" / "bench.json")
    assert set(charts(tmp_path)) == {"headline.svg", "gpu/model/encoder.svg"}


def test_fp8_is_a_precision_of_its_own(tmp_path: Path):
    folder = tmp_path / "results" / "gpu" / "model"
    measured = [
        record(variant=variant, precision=precision, lines_per_s=rate, rel_error=error)
        for variant, precision, rate, error in (
            ("stock", "fp16", 1000.0, 1e-3),
            ("fused", "fp16", 2000.0, 2e-3),
            ("fused", "fp8", 3000.0, 5e-2),
            ("fused", "bf16", 2100.0, 1e-2),
            ("fused", "fp32", 500.0, 1e-5),
        )
    ]
    records.write(measured, folder / "bench.json")
    errors = [
        {"precision": entry.precision, "variant": entry.variant, "tensor": "a", "relative": {"p99": 1e-3}}
        for entry in measured
    ]
    (folder / "tensors").mkdir()
    content = {"model": "M", "gpu": "G", "errors": errors}
    (folder / "tensors" / "tensors.json").write_text(json.dumps(content))
    out = tmp_path / "charts"
    assert main(["--results", str(tmp_path / "results"), "--out", str(out)]) == 0
    for chart in ("encoder.svg", "tensors.svg"):
        drawn = texts(out / "gpu/model" / chart)
        assert {f"TensorRT, fused ({name})" for name in ("fp32", "fp16", "bf16", "fp8")} <= drawn
    assert {"TensorRT", "TensorRT, fused (fp16)", "TensorRT, fused (fp8)", "3,000"} <= texts(
        out / "headline.svg"
    )
    text = summary(measured, [], [])
    assert "fused (fp16) 2.0e-03" in text and "fused (fp8) 5.0e-02" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| fp8"))
    assert [cell.strip() for cell in row.split("|")][3:6] == ["-", "1.55", "-"]


def test_errors(tmp_path: Path, capsys):
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no <gpu>/<model>/bench.json" in capsys.readouterr().err
    (tmp_path / "gpu" / "model").mkdir(parents=True)
    (tmp_path / "gpu" / "model" / "bench.json").write_text("{")
    assert main(["--results", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "bench.json: unreadable" in capsys.readouterr().err


def test_the_headline_has_each_model_where_it_was_measured_last(tmp_path: Path):
    for gpu, model, date in (
        ("old", "m", "2026-11-23"),
        ("new", "m", "2026-11-26"),
        ("old", "n", "2026-11-01"),
    ):
        dated = dataclasses.replace(record(), model=model, gpu=gpu, date=date)
        records.write([dated], tmp_path / gpu / model / "bench.json")
    assert [file.relative_to(tmp_path).parts[:2] for file in records.latest(records.read_all(tmp_path))] == [
        ("new", "m"),
        ("old", "n"),
    ]
    text = headline(tmp_path)
    assert "<summary>m on new," in text and "<summary>n on old," in text
    assert "<summary>m on old," not in text
    assert f"Earlier, on other GPUs: [{tmp_path.name}/old/m]" in text


def test_the_overview_has_the_best_page_and_the_usual_tokens(tmp_path: Path):
    def timed(part: str, variant: str, ms: float, **fields):
        return record(part=part, variant=variant, median_ms=ms, **fields)

    ends = {"tokens": 20, "batch": 1}
    measured = [
        timed("end_to_end", "fused", 2.0, **ends),
        timed("end_to_end", "stock", 5.0, **ends),
        timed("end_to_end", "fused", 9.0, **ends, num_beams=4),
        timed("end_to_end", "fused", 7.0, **ends, precision="bf16"),
        *(timed("page", "fused", s, batch=b, lines=100, page_s=s) for b, s in ((32, 0.05), (64, 0.04))),
        timed("page", "torch", 1.0, batch=32, lines=100, page_s=1.0),
    ]
    records.write(measured, tmp_path / "gpu" / "m" / "bench.json")
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in overview(tmp_path).splitlines()[4:]]
    assert rows == [
        ["1e+03", "-", "40", "25.0", "-", "2500"],
        ["-", "5", "2", "-", "2.5", "500"],
    ]
