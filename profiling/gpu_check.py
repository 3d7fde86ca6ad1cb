"""`make gpu-check`: everything that wants a GPU, in ten minutes, written to results/<gpu>/<model>/.

    python -m profiling.gpu_check --model bundled
    python -m profiling.gpu_check --model bundled --sweep     make gpu-sweep: what there is no time for
    python -m profiling.gpu_check --model bundled,small,base  one after the other, each on a GPU that is free

Every stage is a command of its own: one that fails or takes too long is recorded, and the others go on.
Stages are in the order of their importance; those for which the time budget is too small are skipped, and
the summary says so. Of several models each has the whole budget, and on several GPUs they are checked side by
side: they share the host's processors then, which shows in what is bound by them (torch, compile, stock's
loop).

Exit codes: 0 all stages passed; 1 one failed or was skipped; 2 no GPU, or no such model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from build import PRECISIONS, default_folder
from profiling import records
from profiling.models import BUNDLED, find_model
from profiling.records import ROOT
from profiling.summary import summarize
from runtime.gpu import FP8_COMPUTE_CAPABILITY, current_gpu, visible_gpus

BATCHES = "1,8,16,64"
PROFILE, SWEEP_PROFILE = "1,16,64", "1,16,128"
PRECISION = "fp16"
SEARCHED = ("encoder", "decoder", "end_to_end")
# One at a time, where several models are checked.
BUILD = (
    "mkdir -p build && exec flock build/.lock "
    "sh -c 'CMAKE_GENERATOR=Ninja cmake -S . -B build && cmake --build build --parallel'"
)
SCRATCH = Path("build") / "gpu-check"


@dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
        least_seconds: that make it worth starting.
        output: file or folder that it writes anew.
        obstacle: why it cannot be run here.
    """

    name: str
    command: list[str]
    least_seconds: float
    output: Path | None = None
    obstacle: str | None = None


@dataclass
class Outcome:
    """What became of a stage. status: "ok", "failed" or "skipped"."""

    name: str
    command: str
    status: str
    seconds: float
    reason: str | None = None


def stages(folder: Path, name: str, scratch: Path, out: Path, without: Collection[str] = ()) -> list[Stage]:
    """The check of the checkpoint in `folder`, `name` on the command line, most important stages first.

    `out` is the model's folder of results; what depends on no model goes into the one above. `without`:
    variants that are not measured, and whose engines are not built.
    """
    stock, fused = (default_folder(str(folder), plugins, PRECISION) for plugins in ("none", "fused"))
    accuracy = _accuracy(fused, stock)
    load = ["profiling.load", "--engines", str(fused), "--seconds", "3", "--model", name]
    load += ["--backend", "tensorrt"]
    layers = ["profiling.layers", "--stock", str(stock), "--fused", str(fused), "--batch", "1,64"]
    layers += ["--repeats", "120"]
    page = [*_bench(name, scratch / "page.json", "page", "stock,fused", "32,64,128"), "--lines", "100"]
    variants = ("stock", "fused", "fused_steps", "fused_e4m3", "torch", "stock_naive")
    bench = ",".join(variant for variant in variants if variant not in without)

    def if_it_reads(*stages: Stage) -> Sequence[Stage]:  # random weights do not
        return stages if folder == BUNDLED else ()

    return [
        Stage("plugins", ["bash", "-c", BUILD], 30),
        _module("engines", _engines(name, PRECISION, PROFILE, "stock_naive" not in without), 30),
        *if_it_reads(
            _module("accuracy", accuracy, 20, out / "accuracy.json", "--json"),
            *_accuracy_in_e4m3(out / "accuracy.json", fused),
        ),
        _module("bench", _bench(name, scratch / "bench.json", SEARCHED, bench), 30),
        *if_it_reads(_module("page", page, 30)),
        _module("layers", layers, 20, out / "layers", "--out"),
        *if_it_reads(
            _module("load", load, 30, out / "load.json", "--json"),
            _module("tests", ["pytest", "-m", "gpu", "-q", "-n", "6"], 60),  # once a GPU is enough
        ),
    ]


def _once_a_gpu(out: Path) -> list[Stage]:
    """What depends on no checkpoint."""
    return [
        _module("kernels", ["profiling.kernels"], 30, out / "kernels.json", "--out"),
        _module("device decoder", ["profiling.device_decoder"], 30, out / "device_decoder.json", "--out"),
    ]


def sweep(folder: Path, name: str, scratch: Path, out: Path, without: Collection[str] = ()) -> list[Stage]:
    """What the check has no time for: more batches and tokens, more peers, fp8, errors tensor by tensor."""
    naive = "stock_naive" not in without
    peers = _bench(name, scratch / "compile.json", "encoder", "compile,onnxruntime")
    compiled = _bench(name, scratch / "compiled.json", SEARCHED[1:], "compile", "1,16")
    batches = _bench(name, scratch / "batches.json", SEARCHED, "stock,fused,torch", "2,4,32,128")
    tokens = _bench(name, scratch / "tokens.json", SEARCHED[1:], "stock,fused,torch", "1,16")
    beams = _bench(name, scratch / "beams.json", SEARCHED[1:], "stock,fused", "1,16")
    rtx = _bench(name, scratch / "rtx.json", SEARCHED, "tensorrt_rtx")
    fp8 = _bench(name, scratch / "fp8.json", ("encoder", "end_to_end"), "fused,fused_e4m3", precision="fp8")
    no_fp8 = None if _has_fp8() else f"fp8 is for compute capability {FP8_COMPUTE_CAPABILITY}"
    reason = None
    if not any(importlib.util.find_spec(module) for module in ("tensorrt_rtx", "tensorrt_rtx_bindings")):
        reason = (
            "TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
        )
    once = []
    if folder == BUNDLED:
        once = [*_of_trained_weights(folder, name, scratch, out), *_once_a_gpu(out.parent)]
    return [
        Stage("plugins", ["bash", "-c", BUILD], 30),
        _module("engines", _engines(name, PRECISION, SWEEP_PROFILE, naive), 30),
        _module("compile", peers, 30),
        _module("compiled search", compiled, 60),
        _module("batches", batches, 30),
        _module("tokens", [*tokens, "--tokens", "5,10,40,60"], 30),
        _module("beams", [*beams, "--num-beams", "4"], 30),
        replace(_module("tensorrt_rtx", rtx, 30), obstacle=reason),
        replace(_module("fp8 engines", _engines(name, "fp8", SWEEP_PROFILE), 30), obstacle=no_fp8),
        replace(_module("fp8", fp8, 30), obstacle=no_fp8),
        *once,
    ]


def _of_trained_weights(folder: Path, name: str, scratch: Path, out: Path) -> list[Stage]:
    """Hugging Face's page, the timeline, accuracy in every precision, and errors tensor by tensor."""
    page = [*_bench(name, scratch / "page.json", "page", "torch", "32"), "--lines", "100"]
    timeline = ["profiling.nsys", "--cupti", "--model", name, "--backend", "tensorrt", "--batch-size", "16"]
    built = [
        default_folder(str(folder), plugins, precision)
        for precision in PRECISIONS
        for plugins in ("fused", "none")
        if precision != "fp8" or (plugins == "fused" and _has_fp8())
    ]
    mixed = ["profiling.mixed_page"]
    in_e4m3 = [default_folder(str(folder), "fused", precision) for precision in ("fp16", "fp8")]
    tensors = ["profiling.tensors", "--backend", "tensorrt", "--model", name]
    return [
        _module("torch's page", page, 30),
        _module("mixed page", mixed, 20, out / "mixed_page.json", "--json"),
        _module("timeline", timeline, 20, out / "timeline.json", "--json"),
        _module("engines of all precisions", _engines(name, "fp16,bf16,fp32", SWEEP_PROFILE), 60),
        _module("accuracy", _accuracy(*built), 30, out / "accuracy.json", "--json"),
        *_accuracy_in_e4m3(out / "accuracy.json", *in_e4m3),
        _module("tensors", tensors, 60, out / "tensors", "--out"),
    ]


def _accuracy(*engines: Path) -> list[str]:
    return ["profiling.accuracy", *(word for folder in engines for word in ("--engines", str(folder)))]


def _accuracy_in_e4m3(file: Path, *engines: Path) -> list[Stage]:
    """Accuracy with keys and values in e4m3, where this GPU reads them, beside what is in `file` already."""
    command = [*_accuracy(*engines), "--e4m3-cross", "--json", str(file)]
    return [_module("accuracy in e4m3", command, 20)] if _has_fp8() else []


def _has_fp8() -> bool:
    gpu = current_gpu()
    return gpu is not None and gpu.has_fp8


def _engines(name: str, precision: str, profile: str, naive: bool = True) -> list[str]:
    command = ["profiling.peers", "--model", name, "--batch", profile]
    return [*command, *([] if naive else ["--no-naive"]), "--precision", precision]


def _module(
    name: str, command: Sequence[str], least_seconds: float, output: Path | None = None, option: str = ""
) -> Stage:
    """A stage that runs a module with this Python; `option` tells it where its output goes."""
    arguments = [option, str(output)] if output else []
    return Stage(name, [sys.executable, "-m", *command, *arguments], least_seconds, output)


def _bench(
    model: str,
    file: Path,
    parts: str | Sequence[str],
    variants: str,
    batches: str = BATCHES,
    precision: str = PRECISION,
) -> list[str]:
    parts = [parts] if isinstance(parts, str) else parts
    command = ["runtime.bench", *parts, "--model", model, "--batch", batches, "--precision", precision]
    return [*command, "--variants", variants, "--json", str(file)]


def run_stage(stage: Stage, deadline: float) -> Outcome:
    """Run one stage, its output on the terminal as it comes, until the budget ends."""
    command = shlex.join(stage.command).replace(sys.executable, "python")
    if stage.obstacle:
        return Outcome(stage.name, command, "skipped", 0, stage.obstacle)
    left = deadline - time.monotonic()
    if left < stage.least_seconds:
        return Outcome(stage.name, command, "skipped", 0, f"{max(left, 0):.0f} s were left")
    if stage.output is not None:  # of an earlier run
        stage.output.unlink() if stage.output.is_file() else shutil.rmtree(stage.output, ignore_errors=True)
    print(f"== {stage.name}: {command}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(stage.command, start_new_session=True)
    try:
        status = process.wait(timeout=left)
        reason = f"exit status {status}" if status else None
    except subprocess.TimeoutExpired:
        reason = f"stopped after {left:.0f} s, the end of the time budget"
    finally:
        _end(process)
    seconds = round(time.monotonic() - began, 1)
    outcome = Outcome(stage.name, command, "failed" if reason else "ok", seconds, reason)
    print(f"== {stage.name}: {outcome.status} in {outcome.seconds:.0f} s", flush=True)
    return outcome


def _end(process: subprocess.Popen) -> None:
    """Stop a stage that still runs, with the compilers and tests it started."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def collect(scratch: Path, out: Path, fresh: bool) -> None:
    """Put the benches' records into bench.json, and what they could not measure into unavailable.json.

    They take the place of earlier records of the same cases; `fresh` drops all earlier ones.
    """
    bench, unavailable = out / "bench.json", out / "unavailable.json"
    found = [record for file in sorted(scratch.glob("*.json")) for record in records.read(file)]
    known = records.read(bench) if bench.is_file() and not fresh else []
    if found:
        records.write(records.merged(known, found), bench)
    elif fresh:
        bench.unlink(missing_ok=True)
    lines = [] if fresh or not unavailable.is_file() else json.loads(unavailable.read_text(encoding="utf-8"))
    for file in sorted(scratch.glob("*-unavailable.txt")):
        lines += file.read_text(encoding="utf-8").splitlines()
    unavailable.write_text(json.dumps(list(dict.fromkeys(lines)), indent=1) + "\n", encoding="utf-8")


def _same(options: argparse.Namespace) -> list[str]:
    """The command line of these options but for --model."""
    words = ["--sweep"] if options.sweep else []
    for name in ("out", "budget_minutes"):
        if (value := getattr(options, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    for name in ("stages", "without"):
        if values := getattr(options, name):
            words += [f"--{name}", ",".join(values)]
    return words


def check_all(models: Sequence[str], options: Sequence[str]) -> int:
    """Check every model in a process of its own with these options: as many at once as there are GPUs.

    With one GPU their output is on the terminal, with several in SCRATCH/<model>.log.

    Returns:
        The largest of their exit codes; 1 for a process that a signal ended.
    """
    gpus = visible_gpus()
    free: SimpleQueue[str] = SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def exit_code(status: int) -> int:
        return status if status >= 0 else 1  # minus a signal's number would be less than success

    def check(model: str) -> int:
        gpu = free.get()
        command = [sys.executable, "-m", "profiling.gpu_check", "--model", model, *options]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        try:
            if len(gpus) == 1:
                return exit_code(subprocess.run(command, env=environment).returncode)
            log = ROOT / SCRATCH / f"{model.replace('/', '-')}.log"
            print(f"== {model}: on GPU {gpu}, see {log.relative_to(ROOT)}", flush=True)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as file:
                status = subprocess.run(command, env=environment, stdout=file, stderr=file).returncode
            print(f"== {model}: exit status {status}", flush=True)
            return exit_code(status)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(max_workers=len(gpus)) as pool:
        return max(pool.map(check, models))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure everything that wants a GPU.")
    parser.add_argument(
        "--model",
        type=lambda text: text.split(","),
        default=["bundled"],
        help="bundled, small, base, large (random) or folders, with commas (default: bundled)",
    )
    parser.add_argument("--out", type=Path, help="default: results/<gpu>; a folder a model is made in it")
    parser.add_argument("--sweep", action="store_true", help="more batches and tokens, peers, fp8, tensors")
    parser.add_argument("--budget-minutes", type=float, help="default: 10, for the sweep 30")
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), help="only these, with commas (default: all)"
    )
    parser.add_argument(
        "--without",
        type=lambda text: text.split(","),
        default=[],
        help="variants that the stages engines and bench leave out, for want of time: stock_naive",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.without) - set(records.VARIANTS):
        parser.error(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(records.VARIANTS)}")
    if "" in options.model or len(set(options.model)) < len(options.model):
        parser.error(f"--model {','.join(options.model)}: names with commas between them, each once")

    deadline = time.monotonic() + 60 * (options.budget_minutes or (30 if options.sweep else 10))
    gpu = current_gpu()
    if gpu is None:
        print(
            "error: no NVIDIA GPU can be used here, and every stage of the check wants one", file=sys.stderr
        )
        return 2
    if len(options.model) > 1:
        return check_all(options.model, _same(options))
    name = options.model[0]
    folder = find_model(name)
    if not folder.is_dir():
        print(f"error: {folder} does not exist: give bundled, an architecture or a folder", file=sys.stderr)
        return 2
    parent = options.out.resolve() if options.out else Path("results") / gpu.slug
    os.chdir(ROOT)  # so that the recorded commands have no path of this machine
    out = parent / folder.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    scratch = SCRATCH / out.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    plan = (sweep if options.sweep else stages)(folder, name, scratch, out, options.without)
    if unknown := set(options.stages or ()) - {stage.name for stage in plan}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in plan)}")
    outcomes = [
        run_stage(stage, deadline) for stage in plan if not options.stages or stage.name in options.stages
    ]
    collect(scratch, out, fresh=not (options.sweep or options.stages))
    here = records.environment(
        shlex.join(["python", "-m", "profiling.gpu_check", *(arguments or sys.argv[1:])])
    )
    file = out / "environment.json"
    kept = []  # of the check, where these were only some stages, or the sweep's
    if file.is_file() and (options.sweep or options.stages):
        run_now = {outcome.name for outcome in outcomes}
        kept = [s for s in json.loads(file.read_text())["stages"] if s["name"] not in run_now]
    content = asdict(here) | {"stages": kept + [asdict(outcome) for outcome in outcomes]}
    file.write_text(json.dumps(content, indent=1) + "\n")
    text = summarize(out)
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
