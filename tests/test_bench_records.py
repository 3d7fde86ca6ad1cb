"""Bench records and their summary; the bench itself where there is no GPU."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint
from graph_surgery.checkpoint import load_spec
from profiling import accuracy
from profiling.gpu_check import Stage, collect, run_stage, stages, sweep
from profiling.gpu_check import main as gpu_check
from profiling.models import BUNDLED
from profiling.rates import Rates
from profiling.records import OPTIONAL, Record, RecordError, commit, read, usual_tokens, write
from profiling.summary import part_table, summary
from runtime.bench import (
    Case,
    CompileVariant,
    E4m3Variant,
    EngineVariant,
    Measurement,
    NaiveVariant,
    OnnxCudaVariant,
    Unavailable,
    _table,
    against_rates,
    encoder_flops,
    measure_case,
    open_variant,
    random_pixels,
)
from runtime.bench import main as bench
from runtime.bench import run as measure_all
from runtime.engine import EngineError
from runtime.gpu import Gpu, current_gpu

ROOT = Path(__file__).resolve().parent.parent


def record(**changes) -> Record:
    base = Record(
        part="encoder",
        model="trocr-small",
        batch=8,
        tokens=None,
        precision="fp16",
        variant="stock",
        median_ms=1.55,
        p99_ms=1.6,
        lines_per_s=5161.3,
        images_per_s=5161.3,
        tflops=160.0,
        rel_error=1e-3,
        command="python -m runtime.bench encoder",
        commit="abc",
        date="2026-11-22T20:00:00+00:00",
        gpu="NVIDIA H200",
        driver="580.1",
        cuda="13.0",
        tensorrt="10.6.0",
    )
    return dataclasses.replace(base, **changes)


def test_round_trip(tmp_path: Path):
    records = [record(), record(variant="fused", median_ms=0.9)]
    write(records, tmp_path / "results" / "bench.json")
    assert read(tmp_path / "results" / "bench.json") == records


def test_older_records_are_read(tmp_path: Path):
    path = tmp_path / "bench.json"
    write([record(matrix_tflops=640.0, of_matrix_rate=0.25)], path)
    content = json.loads(path.read_text())
    content[0] = {name: value for name, value in content[0].items() if name not in OPTIONAL}
    path.write_text(json.dumps(content))
    assert read(path) == [record()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.pop("median_ms"), "fields missing or unknown: median_ms"),
        (lambda entry: entry.update(extra=1), "fields missing or unknown: extra"),
        (lambda entry: entry.update(variant="magic"), "variant 'magic'"),
    ],
)
def test_wrong_records(tmp_path: Path, change, message: str):
    path = tmp_path / "bench.json"
    write([record()], path)
    content = json.loads(path.read_text())
    change(content[0])
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=rf"bench.json: record 0: .*{message}"):
        read(path)


def test_commit_of_a_copy(monkeypatch):
    monkeypatch.setenv("TROCR_COMMIT", "0123abc")
    assert commit() == "0123abc"


def test_summary_shows_wins_and_losses():
    records = [
        record(batch=1, median_ms=0.8),
        record(batch=1, variant="fused", median_ms=0.4, rel_error=2e-3),
        record(batch=16, median_ms=2.0),
        record(batch=16, variant="fused", median_ms=2.5),
        record(batch=64, median_ms=10.0),
    ]
    accuracies = [
        {
            "variant": "fused",
            "precision": "fp16",
            "lines": 1934,
            "cer": 0.0083,
            "exact_match": 0.91,
            "identical": 0.997,
            "lines_per_s": 4000.0,
        }
    ]
    stages = [{"name": "kernels", "status": "skipped", "seconds": 0, "reason": "3 s were left"}]
    text = summary(records, accuracies, stages)
    rows = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| fp16")}
    assert "2.00x" in rows["1"] and "0.80x" in rows["16"]
    assert rows["64"].split("|")[4].strip() == "-"
    assert "fused 2.0e-03" in text
    assert "0.83%" in text and "99.70%" in text
    assert "skipped" in text and "3 s were left" in text


def test_summary_of_several_numbers_of_tokens():
    """A row each, stock against fused at the same number; the headline has the usual number alone."""
    decoder = {"part": "decoder", "rel_error": None, "same_tokens": 1.0}
    records = [
        record(**decoder, tokens=tokens, variant=variant, median_ms=ms)
        for tokens, stock, fused in ((5, 4.0, 2.0), (20, 15.0, 5.0))
        for variant, ms in (("stock", stock), ("fused", fused))
    ]
    records.append(record(**decoder, tokens=20, batch=16))
    text = summary(records, [], [], ["tensorrt_rtx: not installed"])
    header, _, *rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    assert header[:3] == ["precision", "batch", "tokens"]
    assert [row[1:6] for row in rows] == [
        ["8", "5", "4", "2", "2.00x"],
        ["8", "20", "15", "5", "3.00x"],
        ["16", "20", "1.55", "-", "-"],
    ]
    assert "tokens a line." not in text
    assert "* tensorrt_rtx: not installed" in text
    usual = part_table([entry for entry in records if entry.tokens == usual_tokens(records)])
    assert "20 tokens a line." in usual and "2.00x" not in usual


def test_summary_of_pages_and_beams():
    page = {"part": "page", "batch": 32, "lines": 100, "rel_error": None}
    records = [
        record(**page, median_ms=400.0, page_s=0.4),
        record(**page, variant="fused", median_ms=200.0, page_s=0.2, lines_per_s=500.0),
        record(**page, num_beams=4, median_ms=900.0, page_s=0.9),
    ]
    header, _, greedy, beams = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in summary(records, [], []).splitlines()
        if line.startswith("|")
    ]
    assert header[:6] == ["precision", "batch", "beams", "lines", "stock s", "fused s"]
    assert greedy[2:8] == ["1", "100", "0.4", "0.2", "2.00x", "500"]
    assert beams[2:7] == ["4", "100", "0.9", "-", "-"]


def cells(text: str) -> list[list[str]]:
    """The rows of a text's tables, the line under the header left out."""
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not row[0].startswith("--")]


def test_summary_of_rates():
    """Columns only where something was measured, which it was not in older records."""
    encoder = [record(), record(variant="fused", tflops=320.0, matrix_tflops=640.0, of_matrix_rate=0.5)]
    header, row = cells(part_table(encoder))
    assert header[-4:] == ["stock TFLOP/s", "fused TFLOP/s", "stock of matrix rate", "fused of matrix rate"]
    assert row[-4:] == ["160", "320", "-", "50%"]
    assert cells(part_table([record()]))[0][-1] == "fused TFLOP/s"

    decoder = {"part": "decoder", "variant": "fused", "tokens": 20, "rel_error": None, "us_per_token": 25.0}
    measured = record(**decoder, floor_us=12.0, of_floor=0.48)
    header, row = cells(part_table([measured, record(**decoder, num_beams=4)]))[:2]
    assert header[-2:] == ["fused us/token", "fused of the floor"] and row[-2:] == ["25", "48%"]
    assert cells(part_table([record(**decoder)]))[0][-1] == "fused us/token"


def test_table_of_the_bench():
    measured = record(of_matrix_rate=0.25, matrix_tflops=640.0)
    lines = [line.split() for line in _table([measured, record()]).splitlines()]
    place = lines[0].index("of_matrix_rate")
    assert (lines[0][place - 1], lines[2][place - 1 : place + 1]) == ("tflops", ["160", "0.25"])
    assert lines[3][place - 1 : place + 1] == ["160", "-"]
    assert lines[2][lines[0].index("of_floor")] == "-"


def test_against_rates(checkpoint):
    """What was achieved, divided by what the GPU reaches; nothing where there is nothing to divide by."""
    spec = load_spec(checkpoint("small"))
    rates = Rates(matrix_tflops=640.0, copy_gb_per_s=4000.0)
    encoder = against_rates(Case("encoder", 8, None), {"tflops": 160.0}, spec, "fp16", rates)
    assert encoder == {"matrix_tflops": 640.0, "of_matrix_rate": 0.25}

    published = dataclasses.replace(
        spec.decoder,
        num_hidden_layers=6,
        d_model=256,
        decoder_ffn_dim=1024,
        vocab_size=64044,
    )
    wide = dataclasses.replace(
        spec.encoder, image_height=384, image_width=384, patch_height=16, patch_width=16
    )
    spec = dataclasses.replace(spec, encoder=wide, decoder=published)
    time = {"us_per_token": 25.0}
    for part in ("decoder", "end_to_end"):
        found = against_rates(Case(part, 1, 20), time, spec, "fp8", rates)  # whose decoder is in float16
        # 43,800,576 bytes of weights, and 588 rows of 6,144 bytes of keys and values
        assert found["copy_gb_per_s"] == 4000.0
        assert found["floor_us"] == pytest.approx((43_800_576 + 588 * 6144) / 4000e9 * 1e6)
        assert found["of_floor"] == pytest.approx(found["floor_us"] / 25.0)
        of_float = against_rates(Case(part, 1, 20), time, spec, "fp32", rates)
        assert of_float["floor_us"] == pytest.approx(2 * found["floor_us"])
        assert against_rates(Case(part, 1, 20, num_beams=4), time, spec, "fp16", rates) == {}
        # In e4m3 the 578 rows of cross-attention have half of their bytes.
        in_e4m3 = against_rates(Case(part, 1, 20), time, spec, "fp16", rates, cross_itemsize=1)
        assert in_e4m3["floor_us"] == pytest.approx((43_800_576 + 299 * 6144) / 4000e9 * 1e6)
    for part, tokens in (("encoder", None), ("decoder", 20), ("end_to_end", 20), ("page", None)):
        fields = time | {"tflops": 160.0}
        assert against_rates(Case(part, 1, tokens), fields, spec, "fp16", Rates()) == {}
    assert against_rates(Case("page", 1, None), {}, spec, "fp16", rates) == {}


def test_stages_of_the_gpu_check(tmp_path: Path):
    """Most important first; what reads text is for the checkpoint that can read."""
    bundled = {stage.name: stage.command for stage in stages(BUNDLED, "bundled", tmp_path, tmp_path)}
    assert list(bundled) == [
        "plugins",
        "engines",
        "accuracy",
        "bench",
        "page",
        "layers",
        "load",
        "tests",
    ]
    assert "--variants stock,fused,fused_steps,fused_e4m3,torch,stock_naive" in " ".join(bundled["bench"])
    random = [stage.name for stage in stages(tmp_path, "small", tmp_path, tmp_path)]
    of_text = ("accuracy", "page", "load")
    assert random == [name for name in bundled if name not in (*of_text, "tests")]
    assert "--lines 100" in " ".join(bundled["page"]) and "--batch 32" in " ".join(bundled["page"])
    for make, stage in ((stages, "bench"), (sweep, "compile")):
        naive, without = (
            {stage.name: stage.command for stage in make(BUNDLED, "bundled", tmp_path, tmp_path, left_out)}
            for left_out in ((), ("stock_naive",))
        )
        assert "--no-naive" in without["engines"] and "--no-naive" not in naive["engines"]
        assert "naive" not in " ".join(without[stage])


def test_accuracy_in_e4m3_is_put_beside_the_other(tmp_path: Path, monkeypatch):
    """On Hopper, after it, and without deleting what it found."""
    monkeypatch.setattr("profiling.gpu_check.current_gpu", lambda: Gpu("NVIDIA H200", "9.0", "13.0"))
    for make, precisions in ((stages, ["fp16"]), (sweep, ["fp16", "fp8"])):
        plan = make(BUNDLED, "bundled", tmp_path, tmp_path)
        names = [stage.name for stage in plan]
        place = names.index("accuracy in e4m3")
        stage = plan[place]
        assert names[place - 1] == "accuracy" and stage.output is None and stage.obstacle is None
        assert "--e4m3-cross" in stage.command
        assert (
            stage.command[-2:] == plan[place - 1].command[-2:] == ["--json", str(tmp_path / "accuracy.json")]
        )
        engines = [word.split("printed-")[1] for word in stage.command if "printed-" in word]
        assert engines == [f"{precision}-fused" for precision in precisions]
        assert "accuracy in e4m3" not in [stage.name for stage in make(tmp_path, "small", tmp_path, tmp_path)]


def test_accuracy_in_e4m3_is_a_variant_of_its_own(tmp_path: Path, monkeypatch, capsys):
    opened = []

    def recognizer(folder: Path, **options):
        opened.append(options["e4m3_cross"])
        return SimpleNamespace(batch_size=64, backend=SimpleNamespace(reads_e4m3=lambda images: reads))

    found = {"lines": 10, "cer": 0.0, "exact_match": 1.0, "identical": 1.0, "lines_per_s": 5.0}
    manifest = SimpleNamespace(model="models/m", plugins=("layernorm",), precision="fp16")
    monkeypatch.setattr(accuracy, "Recognizer", recognizer)
    monkeypatch.setattr(accuracy, "compare", lambda *arguments: found)
    monkeypatch.setattr(accuracy.Manifest, "read", lambda folder: manifest)
    file, reads = tmp_path / "accuracy.json", True
    command = ["--engines", "engines/m", "--most", "1", "--json", str(file)]
    for option in ([], ["--e4m3-cross"], ["--e4m3-cross"]):
        assert accuracy.main([*command, *option]) == 0
    assert opened == [False, True, True]
    assert [entry["variant"] for entry in json.loads(file.read_text())] == ["fused", "fused_e4m3"]
    reads = False
    assert accuracy.main([*command, "--e4m3-cross"]) == 2
    assert "error: engines/m: searches of 64 lines read no e4m3" in capsys.readouterr().err


def test_stages_of_the_sweep(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("profiling.gpu_check.current_gpu", lambda: None)
    plan = {stage.name: stage for stage in sweep(BUNDLED, "bundled", tmp_path, tmp_path)}
    of_all = ["plugins", "engines", "compile", "compiled search", "batches", "tokens", "beams"]
    of_all += ["tensorrt_rtx", "fp8 engines", "fp8"]
    of_trained_weights = ["torch's page", "mixed page", "timeline"]
    of_trained_weights += ["engines of all precisions", "accuracy", "tensors"]
    once_a_gpu = ["kernels", "device decoder"]
    assert list(plan) == [*of_all, *of_trained_weights, *once_a_gpu]
    assert plan["engines of all precisions"].command[-1] == "fp16,bf16,fp32"
    assert [word.split("printed-")[1] for word in plan["accuracy"].command if "printed-" in word][:4] == [
        "fp32-fused",
        "fp32-none",
        "fp16-fused",
        "fp16-none",
    ]
    assert "--tokens 5,10,40,60" in " ".join(plan["tokens"].command)
    assert "--batch 2,4,32,128" in " ".join(plan["batches"].command)
    outcome = run_stage(plan["tensorrt_rtx"], time.monotonic() + 100)
    assert (outcome.status, outcome.reason) == ("skipped", plan["tensorrt_rtx"].obstacle)
    outcome = run_stage(plan["fp8"], time.monotonic() + 100)
    assert (outcome.status, outcome.reason) == ("skipped", "fp8 is for compute capability 9.0")
    assert [stage.name for stage in sweep(tmp_path, "small", tmp_path, tmp_path)] == of_all


def test_fp8_in_the_sweep_of_a_gpu_that_has_it(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("profiling.gpu_check.current_gpu", lambda: Gpu("NVIDIA H100", "9.0", "13.0"))
    plan = {stage.name: stage for stage in sweep(BUNDLED, "bundled", tmp_path, tmp_path)}
    command = " ".join(plan["fp8"].command)
    assert plan["fp8"].obstacle is None and "--precision fp8 --variants fused,fused_e4m3" in command
    engines = [word.split("printed-")[1] for word in plan["accuracy"].command if "printed-" in word]
    assert engines[-1] == "fp8-fused" and "fp8-none" not in engines


def test_collected_records_take_the_place_of_earlier_ones(tmp_path: Path):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    write([record(batch=1), record(batch=8, median_ms=9.0)], out / "bench.json")
    write([record(batch=8, median_ms=5.0), record(batch=128)], scratch / "batches.json")
    write([record(part="decoder", tokens=5)], scratch / "tokens.json")
    (scratch / "rtx-unavailable.txt").write_text("tensorrt_rtx: not installed\n")
    collect(scratch, out, fresh=False)
    found = [(entry.part, entry.batch, entry.tokens, entry.median_ms) for entry in read(out / "bench.json")]
    assert found == [
        ("encoder", 1, None, 1.55),
        ("encoder", 8, None, 5.0),
        ("encoder", 128, None, 1.55),
        ("decoder", 8, 5, 1.55),
    ]
    assert json.loads((out / "unavailable.json").read_text()) == ["tensorrt_rtx: not installed"]
    (scratch / "rtx-unavailable.txt").unlink()
    collect(scratch, out, fresh=True)
    assert [entry.batch for entry in read(out / "bench.json")] == [8, 128, 8]
    assert json.loads((out / "unavailable.json").read_text()) == []


def test_a_stage_writes_its_output_anew(tmp_path: Path):
    for name, old in (("file.json", False), ("folder", True)):
        output = tmp_path / name
        if old:
            output.mkdir()
            (output / "old").touch()
        else:
            output.touch()
        outcome = run_stage(Stage(name, [sys.executable, "-c", ""], 0, output), time.monotonic() + 60)
        assert outcome.status == "ok" and not output.exists()


@pytest.mark.parametrize(("name", "gflop"), [("small", 31.0), ("base", 111.0), ("large", 382.0)])
def test_encoder_flops(tmp_path: Path, name: str, gflop: float):
    """The figures known for the published encoders."""
    encoder, decoder = ARCHITECTURES[name]
    tiny = {"d_model": 64, "decoder_layers": 1, "decoder_attention_heads": 1, "decoder_ffn_dim": 64}
    # One layer has all the weights that the description needs; the formula is linear in the layers.
    write_random_checkpoint(
        encoder | {"num_hidden_layers": 1}, decoder | tiny | {"vocab_size": 120}, tmp_path
    )
    spec = dataclasses.replace(load_spec(tmp_path).encoder, num_hidden_layers=encoder["num_hidden_layers"])
    assert encoder_flops(spec) / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU can be used here")
def test_bench_against_rates(checkpoint, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["encoder", "decoder", "end_to_end", "--model", str(checkpoint("small")), "--batch", "2"]
    command += ["--tokens", "4", "--variants", "torch", "--precision", "fp16", "--json", "bench.json"]
    assert bench(command) == 0
    encoder, decoder, whole = read(Path("bench.json"))
    assert encoder.of_matrix_rate == encoder.tflops / encoder.matrix_tflops
    assert 0 < encoder.of_matrix_rate < 1
    assert encoder.of_floor is None and decoder.of_matrix_rate is None
    assert decoder.copy_gb_per_s == whole.copy_gb_per_s and decoder.floor_us == whole.floor_us
    for entry in (decoder, whole):
        assert 0 < entry.of_floor == entry.floor_us / entry.us_per_token < 1


@pytest.mark.slow
def test_bench_on_a_cpu(checkpoint, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # engines/ is made here
    model = str(checkpoint("small"))
    variants = ["--variants", "onnxruntime,torch", "--batch", "2", "--tokens", "4", "--precision", "fp32"]
    for part in ("encoder", "decoder", "end_to_end"):
        assert bench([part, "--model", model, *variants, "--json", f"{part}.json"]) == 0
        records = read(tmp_path / f"{part}.json")
        assert [(entry.part, entry.variant, entry.batch) for entry in records] == [
            (part, "onnxruntime", 2),
            (part, "torch", 2),
        ]
        for entry in records:
            assert 0 < entry.median_ms <= entry.p99_ms
            assert entry.lines_per_s == pytest.approx(2e3 / entry.median_ms)
            if part == "encoder":
                assert entry.rel_error < 1e-4
            else:
                assert entry.same_tokens == 1
                assert entry.us_per_token == pytest.approx(1e3 * entry.median_ms / 4)
            if not torch.cuda.is_available():
                assert (entry.of_matrix_rate, entry.of_floor) == (None, None)


@pytest.mark.slow
@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: other variants would be measured")
def test_bench_of_fp8(checkpoint, tmp_path: Path, monkeypatch, capsys):
    """The fused graphs alone have it; of the others the bench says so."""
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(checkpoint("small")), "--batch", "2", "--precision", "fp8"]
    variants = ["--variants", "onnxruntime,torch,stock"]
    assert bench(["encoder", *options, *variants, "--json", "encoder.json"]) == 0
    (found,) = read(tmp_path / "encoder.json")
    assert (found.variant, found.precision) == ("onnxruntime", "fp8")
    assert 1e-4 < found.rel_error < 0.3
    printed = capsys.readouterr().out
    for variant in ("torch", "stock"):
        assert f"not measured: {variant}: fp8 is the fused encoder's alone" in printed


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: they would be measured")
def test_bench_says_what_it_cannot_measure(checkpoint, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    variants = ["fused", "fused_steps", "fused_e4m3", "stock", "stock_naive"]
    options = ["--model", str(checkpoint("small")), "--batch", "1", "--variants", ",".join(variants)]
    assert bench(["decoder", *options, "--json", "out/decoder.json"]) == 2
    printed = capsys.readouterr().out.splitlines()
    reasons = (tmp_path / "out" / "decoder-unavailable.txt").read_text().splitlines()
    assert [f"not measured: {reason}" for reason in reasons] == printed[-len(variants) :]
    assert [reason.split(":")[0] for reason in reasons] == variants


def test_a_bench_that_is_stopped_leaves_what_it_has(checkpoint, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = []

    def measure_and_stop(*arguments):
        if measured:
            raise KeyboardInterrupt
        measured.append(measure_case(*arguments))
        return measured[0]

    monkeypatch.setattr("runtime.bench.measure_case", measure_and_stop)
    command = ["encoder", "--model", str(checkpoint("small")), "--variants", "torch", "--batch", "1,2"]
    with pytest.raises(KeyboardInterrupt):
        bench([*command, "--json", "bench.json"])
    assert [record.batch for record in read(Path("bench.json"))] == [1]
    assert not list(tmp_path.glob("*.partial"))


def test_a_peer_that_fails_does_not_stop_the_bench(checkpoint, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def broken(*arguments):
        raise RuntimeError("cannot compile")

    monkeypatch.setattr("runtime.bench.CompileVariant.encoder", broken)
    options = ["encoder", "--model", str(checkpoint("small")), "--batch", "1", "--precision", "fp32"]
    assert bench([*options, "--variants", "compile,torch", "--json", "encoder.json"]) == 0
    assert [entry.variant for entry in read(tmp_path / "encoder.json")] == ["torch"]
    assert "not measured: compile encoder batch 1: cannot compile" in capsys.readouterr().out
    monkeypatch.setattr("runtime.bench.TorchVariant.encoder", broken)
    with pytest.raises(RuntimeError, match="cannot compile"):
        bench([*options, "--variants", "torch"])


def test_compiled_steps_choose_the_same_tokens(checkpoint, tmp_path: Path, monkeypatch):
    """The encoder's and `generate`'s steps, compiled anew for each of two batch sizes."""
    compiled, compile_ = [], torch.compile

    def counting(function, **settings):
        compiled.append(function.__self__)
        return compile_(function, **settings)

    monkeypatch.setattr(torch, "compile", counting)
    options = ["decoder", "--model", str(checkpoint("small")), "--batch", "1,2", "--precision", "fp32"]
    file = tmp_path / "decoder.json"
    assert bench([*options, "--tokens", "3", "--variants", "compile", "--json", str(file)]) == 0
    assert [(entry.batch, entry.same_tokens) for entry in read(file)] == [(1, 1.0), (2, 1.0)]
    encoder, model = compiled[:2]
    assert encoder is model.encoder and compiled == [encoder, model] * 2


def test_the_compiled_encoder_attends_without_a_mask(checkpoint):
    """With one, of ones only, PyTorch would have no flash attention for it: three times slower than eager."""
    spec = load_spec(checkpoint("small"))
    variant = CompileVariant(spec, "fp32")
    masks = []

    def look(module: torch.fx.GraphModule, inputs):
        attention = [n for n in module.graph.nodes if n.target is F.scaled_dot_product_attention]
        masks.extend(node.kwargs["attn_mask"] for node in attention)
        return module.forward

    torch.compiler.reset()
    pixels = variant.normalise(random_pixels(spec, 1))
    with torch.inference_mode():
        torch.compile(variant.model.encoder.forward, backend=look)(pixel_values=pixels)
    torch.compiler.reset()
    assert masks == [None] * spec.encoder.num_hidden_layers


def test_bench_measures_tensorrt_rtx_alone(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench(["encoder", "--variants", "tensorrt_rtx,stock"])
    assert "tensorrt_rtx and TensorRT cannot be in one process" in capsys.readouterr().err


def test_what_a_variant_does_not_measure():
    """Nothing is claimed for a variant that another one's code would run."""

    def variant(kind: type, **fields):
        made = object.__new__(kind)
        vars(made).update(fields)
        return made

    backend = SimpleNamespace(
        max_batch=16, max_steps=96, searches=lambda settings: True, largest_batch=lambda beams, whole: 16
    )
    steps = variant(EngineVariant, backend=backend, folder=Path("engines/x"), steps_only=True)
    fused = variant(EngineVariant, backend=backend, folder=Path("engines/x"), steps_only=False)
    for part in ("encoder", "page"):
        with pytest.raises(Unavailable, match=f"the {part} is that of `fused`"):
            steps.check(Case(part, 8, None))
        fused.check(Case(part, 8, None))
    steps.check(Case("decoder", 8, 20))
    with pytest.raises(Unavailable, match="built for tokens up to 96"):
        steps.check(Case("decoder", 8, 97))
    few = SimpleNamespace(**vars(backend), reads_e4m3=lambda images: images <= 12)
    in_e4m3 = variant(E4m3Variant, backend=few, folder=Path("engines/x"), steps_only=False)
    for case in (Case("decoder", 8, 20), Case("end_to_end", 12, 20), Case("page", 8, None, lines=100)):
        in_e4m3.check(case)
    for case, reason in (
        (Case("encoder", 8, None), "the encoder is that of `fused`"),
        (Case("decoder", 8, 20, num_beams=4), "beam search reads no e4m3: it is that of `fused`"),
        (Case("page", 13, None), "a search of 13 lines reads no e4m3 .*: it is that of `fused`"),
        (Case("decoder", 8, 97), "built for tokens up to 96"),
    ):
        with pytest.raises(Unavailable, match=reason):
            in_e4m3.check(case)
    naive = variant(NaiveVariant, engine=SimpleNamespace(max_batch=16, path="x"))
    naive.check(Case("encoder", 16, None))
    for case in (Case("encoder", 17, None), Case("decoder", 1, 20), Case("page", 1, None)):
        with pytest.raises(Unavailable):
            naive.check(case)
    with pytest.raises(Unavailable, match="encoder only"):
        variant(OnnxCudaVariant).check(Case("end_to_end", 1, 20))


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_e4m3_is_unavailable_where_no_search_reads_it(precision: str, tmp_path: Path, monkeypatch):
    """Its reason is the engines'; in fp8 too it is not refused out of hand."""
    made = []

    def backend(folder: Path, *arguments, **options):
        made.append((folder, options))
        raise EngineError(f"{folder}: no search here")

    monkeypatch.setattr("runtime.bench.ON_GPU", True)
    monkeypatch.setattr("runtime.bench.TensorRTBackend", backend)
    target = tmp_path / f"m-{precision}-fused"
    target.mkdir()
    with pytest.raises(Unavailable, match="no search here"):
        open_variant("fused_e4m3", tmp_path / "m", None, precision, tmp_path)
    assert made == [(target, {"e4m3_cross": True})]


def test_the_floor_of_e4m3_has_fewer_bytes(checkpoint, monkeypatch):
    """Of the records of that variant alone."""
    spec = load_spec(checkpoint("small"))
    variant = SimpleNamespace(
        check=lambda case: None,
        decoder=lambda pixels, tokens, beams: Measurement([1.0], torch.zeros(2, tokens, dtype=torch.int64)),
    )
    monkeypatch.setattr("runtime.bench.open_variant", lambda *arguments: variant)
    monkeypatch.setattr("runtime.bench.measure_rates", lambda *arguments: Rates(None, 1000.0))
    variants = ["fused", "fused_e4m3", "fused_steps"]
    found, _ = measure_all([Case("decoder", 2, 4)], variants, spec.source, "fp16", Path("engines"), "command")
    fused, in_e4m3, steps = (entry.floor_us for entry in found)
    numbers = 2 * 2 * spec.decoder.num_hidden_layers * spec.decoder.d_model * spec.encoder.num_tokens
    assert fused == steps and fused - in_e4m3 == pytest.approx(numbers / 1e6)


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: the check would run")
def test_gpu_check_without_gpu(capsys):
    assert gpu_check([]) == 2
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU")


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: the checks would run")
def test_gpu_check_of_several_models(monkeypatch, capfd):
    """Each in a process of its own, with the same options, on a GPU of its own; the worst code counts."""
    options = ["--sweep", "--budget-minutes", "0.5", "--stages", "bench,page", "--without", "stock_naive"]
    monkeypatch.setattr("profiling.gpu_check.visible_gpus", lambda: ["3", "GPU-7"])
    monkeypatch.setattr("profiling.gpu_check.current_gpu", lambda: Gpu("NVIDIA H200", "9.0", "13.0"))
    assert gpu_check(["--model", "bundled,no/such/folder", *options]) == 2
    output = capfd.readouterr().out
    assert output.count("exit status 2") == 2 and "on GPU 3" in output and "on GPU GPU-7" in output
    for log in ("bundled.log", "no-such-folder.log"):
        text = (ROOT / "build" / "gpu-check" / log).read_text()
        assert text.startswith("error: no NVIDIA GPU can be used here")
    monkeypatch.setattr("profiling.gpu_check.visible_gpus", lambda: ["0"])
    assert gpu_check(["--model", "bundled,small", *options]) == 2
    assert capfd.readouterr().err.count("error: no NVIDIA GPU can be used here") == 2
    with pytest.raises(SystemExit):
        gpu_check(["--without", "naive"])
    assert "no variant naive" in capfd.readouterr().err


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: the checks would run")
@pytest.mark.parametrize("gpus", [["0"], ["0", "1"]])
def test_gpu_check_that_a_signal_ends(gpus: list[str], monkeypatch, capfd):
    """As where memory runs out: its status, -9, is less than that of success. Logs have the whole names."""
    logs = []

    def killed(command: list[str], **options) -> subprocess.CompletedProcess:
        logs.append(getattr(options.get("stdout"), "name", None))
        return subprocess.CompletedProcess(command, -9 if "trocr-1.5" in command else 0)

    monkeypatch.setattr("profiling.gpu_check.visible_gpus", lambda: gpus)
    monkeypatch.setattr("profiling.gpu_check.current_gpu", lambda: Gpu("NVIDIA H200", "9.0", "13.0"))
    monkeypatch.setattr("profiling.gpu_check.subprocess.run", killed)
    assert gpu_check(["--model", "trocr-1.5,trocr-1.6"]) == 1
    if len(gpus) > 1:
        assert sorted(Path(log).name for log in logs) == ["trocr-1.5.log", "trocr-1.6.log"]


@pytest.mark.parametrize("models", ["", "bundled,", "small,bundled,small"])
def test_gpu_check_of_wrong_models(models: str, capsys):
    """An empty name would be the current folder; twice the same would write the same files at once."""
    with pytest.raises(SystemExit) as caught:
        gpu_check(["--model", models])
    assert caught.value.code == 2
    assert f"--model {models}: names with commas between them, each once" in capsys.readouterr().err


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: it would be measured")
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("profiling.device_decoder", [], "error: no CUDA GPU; the decoder runs on one only"),
        (
            "profiling.summary",
            ["no/such/folder"],
            "error: no/such/folder: no such folder; name one of results",
        ),
    ],
)
def test_one_error_and_no_traceback(module: str, arguments: list[str], message: str):
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1


def test_gpu_check_records_every_kind_of_stage(capfd):
    def stage(name: str, code: str, least_seconds: float = 0) -> Stage:
        return Stage(name, [sys.executable, "-c", code], least_seconds)

    deadline = time.monotonic() + 3
    good = run_stage(stage("good", "print('hello')"), deadline)
    bad = run_stage(stage("bad", "raise SystemExit(7)"), deadline)
    slow = run_stage(stage("slow", "import time; time.sleep(60)"), deadline)
    late = run_stage(stage("late", "print('never')", 5), deadline)
    assert [outcome.status for outcome in (good, bad, slow, late)] == ["ok", "failed", "failed", "skipped"]
    assert (good.reason, bad.reason) == (None, "exit status 7")
    assert "time budget" in slow.reason and "were left" in late.reason
    output = capfd.readouterr().out
    assert "hello" in output and "never" not in output


def test_bench_is_executable():
    """`nsys profile runtime/bench.py` starts it as a program."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["runtime/bench.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "end_to_end" in result.stdout
