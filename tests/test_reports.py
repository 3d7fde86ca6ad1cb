"""The reports' tables are those of results/, in both languages, and what they name is there."""

import json
import re
import shutil

import pytest

from profiling.records import ROOT, RecordError
from profiling.summary import MARK, REPORTS, filled

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in REPORTS}
FOLDER = "nvidia-h200/trocr-small-random"


@pytest.mark.parametrize("name", REPORTS)
def test_tables_are_the_committed_ones(name: str):
    expected = filled(TEXTS[name], ROOT / "results", REPORTS[name])
    assert expected == TEXTS[name], "run: python -m profiling.summary --docs"


def test_both_languages_show_the_same_results():
    english, chinese = ([mark["place"] for mark in MARK.finditer(text)] for text in TEXTS.values())
    assert english == chinese
    assert len(english) > 10


@pytest.mark.parametrize(
    ("name", "target"),
    sorted({(name, target) for name in TEXTS for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[name])}),
)
def test_links_lead_somewhere(name: str, target: str):
    assert (ROOT / name).parent.joinpath(target).exists()


def test_a_new_measurement_shows(tmp_path):
    shutil.copytree(ROOT / "results" / FOLDER, tmp_path / FOLDER)
    bench = tmp_path / FOLDER / "bench.json"
    records = json.loads(bench.read_text())
    changed = next(r for r in records if (r["part"], r["variant"], r["batch"]) == ("encoder", "fused", 8))
    changed["median_ms"] = 123.0
    bench.write_text(json.dumps(records))
    text = filled(place(f"encoder {FOLDER}"), tmp_path, "en")
    assert re.search(r"\| fp16 +\| +8 \|.*\| +123 \|", text)
    assert filled(text, tmp_path, "en") == text


def test_languages_have_the_same_figures():
    english, chinese = (
        filled(place(f"decoder {FOLDER}"), ROOT / "results", language) for language in ("en", "zh")
    )
    figures = [re.findall(r"\d+(?:\.\d+)?", text.split("|\n", 1)[1]) for text in (english, chinese)]
    assert figures[0] == figures[1]
    assert "batch" in english and "批大小" in chinese


def test_layers_and_device_decoder(tmp_path):
    (tmp_path / "gpu" / "layers").mkdir(parents=True)
    whole = {"layers": 3, "sum_ms": 0.5, "replay_ms": 0.25}
    op = {"op": "MatMul", "units": 2, "stock_ms": 0.5, "stock_shared_ms": 0.1, "fused_ms": 0.25}
    comparison = {"graph": "encoder", "batch": 1, "whole": {"stock": whole, "fused": whole}, "ops": [op]}
    (tmp_path / "gpu" / "layers" / "layers.json").write_text(json.dumps({"comparisons": [comparison]}))
    row = {
        "decoder": "small",
        "attends_to": "states",
        "batch": 1,
        "us_per_token": 20.4,
        "floor_us": 10.2,
        "of_floor": 0.5,
    }
    (tmp_path / "gpu" / "device_decoder.json").write_text(json.dumps([row]))
    layers = re.sub(" +", " ", filled(place("layers gpu encoder 1"), tmp_path, "en"))
    assert "| stock | 3 | 0.500 | 0.250 |" in layers
    assert "| MatMul | 2 | 0.5000 | 20% | 0.2500 | 2.00x |" in layers
    assert "| total | | 0.5000 | | 0.2500 | 2.00x |" in layers
    decoder = re.sub(" +", " ", filled(place("device_decoder gpu"), tmp_path, "zh"))
    assert "| small | 编码器状态 | 1 | 20 | 10 | 50% |" in decoder
    assert "`results/gpu/layers/layers.json`" in filled(place("layers gpu encoder 64"), tmp_path, "en")


def test_load_and_tensors(tmp_path):
    (tmp_path / "gpu" / "tensors").mkdir(parents=True)
    row = {"load": 0.8, "offered_lines_per_s": 80.0, "lines_per_s": 79.6, "mean_batch": 3.25}
    row |= {"p50_ms": 1.25, "p95_ms": 2.0, "p99_ms": 4.0}
    load = {"capacity_lines_per_s": 100.2, "batch_size": 64, "loads": [row]}
    (tmp_path / "gpu" / "load.json").write_text(json.dumps(load))
    shown = re.sub(" +", " ", filled(place("load gpu"), tmp_path, "en"))
    assert "| 80% | 80 | 80 | 1.2 | 2.0 | 4.0 | 3.2 |" in shown
    assert "Capacity: 100 lines a second, batches up to 64." in shown
    errors = [
        {"precision": "fp16", "variant": "fused", "tensor": tensor, "relative": {"p99": p99}}
        for tensor, p99 in (
            ("encoder layer 0", 9.0),
            ("encoder states", 1e-3),
            ("cross key 0", 2e-3),
            ("cross value 1", 3e-3),
            ("logits, step 0", 4e-3),
        )
    ]
    (tmp_path / "gpu" / "tensors" / "tensors.json").write_text(json.dumps({"errors": errors}))
    shown = re.sub(" +", " ", filled(place("tensors gpu"), tmp_path, "en"))
    assert "| fp16 | fused | 1.0e-03 | 3.0e-03 | 4.0e-03 | 5 |" in shown
    missing = filled(place("tensors none"), tmp_path, "zh")
    assert "`results/none/tensors/tensors.json`" in missing and "`make gpu-sweep`" in missing


@pytest.mark.parametrize(
    "text",
    [
        "<!-- results: encoder -->\n<!-- end of results -->\n",
        "<!-- results: speed nvidia-h200 -->\n<!-- end of results -->\n",
        f"<!-- results: encoder {FOLDER} -->\n",
        f"<!-- results: encoder {FOLDER} -->\n<!-- results: decoder {FOLDER} -->\n<!-- end of results -->\n",
        "<!-- end of results -->\n",
    ],
)
def test_a_wrong_place_is_refused(text: str):
    with pytest.raises(RecordError, match="<!-- "):
        filled(text, ROOT / "results", "en")


def place(what: str) -> str:
    return f"# Title\n\n<!-- results: {what} -->\n<!-- end of results -->\n\nMore.\n"
