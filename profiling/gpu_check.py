"""`make gpu-check`: everything that wants a GPU, in ten minutes, written to results/<gpu>/<model>/.

    python -m profiling.gpu_check --model bundled

Every stage is a command of its own: one that fails or takes too long is recorded, and the others go on.
Stages are in the order of their importance; those for which the time budget is too small are skipped, and
the summary says so.

Exit codes: 0 all stages passed; 1 one failed or was skipped; 2 no GPU, or no such model.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from build import default_folder
from profiling import records
from profiling.models import BUNDLED, find_model
from profiling.records import ROOT
from profiling.summary import summarize
from runtime.gpu import current_gpu

BATCHES = "1,8,16,64"
PROFILE = "1,16,64"
PRECISION = "fp16"


@dataclass(frozen=True)
class Stage:
    """A command, and the least seconds that make it worth starting."""

    name: str
    command: list[str]
    least_seconds: float


@dataclass
class Outcome:
    """What became of a stage. status: "ok", "failed" or "skipped"."""

    name: str
    command: str
    status: str
    seconds: float
    reason: str | None = None


def stages(folder: Path, name: str, scratch: Path, out: Path) -> list[Stage]:
    """The stages for the checkpoint in `folder`, called `name` on the command line, most important first."""
    python = [sys.executable]
    stock, fused = (default_folder(str(folder), plugins, PRECISION) for plugins in ("none", "fused"))

    def bench(file: str, parts: Sequence[str], variants: str, batches: str = BATCHES) -> list[str]:
        command = [*python, "-m", "runtime.bench", *parts, "--model", name, "--batch", batches]
        return [*command, "--variants", variants, "--json", str(scratch / file)]

    engines = [*python, "build.py", "--model", str(folder), "--plugins", "none", "--plugins", "fused"]
    engines += ["--precision", PRECISION, "--batch", PROFILE]
    accuracy = [*python, "-m", "profiling.accuracy", "--engines", str(fused), "--engines", str(stock)]
    accuracy += ["--json", str(out / "accuracy.json")]
    kernels = [*python, "-m", "profiling.kernels", "--out", str(out / "kernels.json")]
    load = [*python, "-m", "profiling.load", "--engines", str(fused), "--seconds", "3"]
    load += ["--model", name, "--backend", "tensorrt", "--json", str(out / "load.json")]
    layers = [*python, "-m", "profiling.layers", "--stock", str(stock), "--fused", str(fused)]
    layers += ["--batch", "1,64", "--out", str(out / "layers")]
    page = [*bench("page.json", ("page",), "stock,fused", "32"), "--lines", "100"]
    build = "CMAKE_GENERATOR=Ninja cmake -S . -B build && cmake --build build --parallel"
    parts = ("encoder", "decoder", "end_to_end")
    return [
        Stage("plugins", ["bash", "-c", build], 30),
        Stage("engines", engines, 30),
        # Random weights read nothing.
        *([Stage("accuracy", accuracy, 20)] if folder == BUNDLED else []),
        Stage("bench", bench("bench.json", parts, "stock,fused,fused_steps,torch"), 30),
        Stage("tests", [*python, "-m", "pytest", "-m", "gpu", "-q", "-n", "6"], 60),
        Stage("page", page, 30),
        *([Stage("load", load, 30)] if folder == BUNDLED else []),
        Stage("layers", layers, 30),
        Stage("compile", bench("compile.json", ("encoder",), "compile"), 30),
        Stage("kernels", kernels, 30),
        Stage(
            "greedy decoder",
            [*python, "-m", "profiling.greedy_decoder", "--out", str(out / "greedy_decoder.json")],
            30,
        ),
    ]


def run_stage(stage: Stage, deadline: float) -> Outcome:
    """Run one stage, its output on the terminal as it comes, until the budget ends."""
    command = shlex.join(stage.command).replace(sys.executable, "python")
    left = deadline - time.monotonic()
    if left < stage.least_seconds:
        return Outcome(stage.name, command, "skipped", 0, f"{max(left, 0):.0f} s were left")
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


def collect(scratch: Path, out: Path) -> None:
    """Put the benches' records into one bench.json, part by part."""
    found = [record for file in sorted(scratch.glob("*.json")) for record in records.read(file)]
    if found:
        records.write(sorted(found, key=lambda record: records.PARTS.index(record.part)), out / "bench.json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check and measure everything that wants a GPU.")
    parser.add_argument("--model", default="bundled", help="bundled, small, base, large (random) or a folder")
    parser.add_argument("--out", type=Path, help="default: results/<gpu>; a folder a model is made in it")
    parser.add_argument("--budget-minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument(
        "--stages", type=lambda text: text.split(","), help="only these, with commas (default: all)"
    )
    options = parser.parse_args(arguments)

    deadline = time.monotonic() + 60 * options.budget_minutes
    gpu = current_gpu()
    if gpu is None:
        print(
            "error: no NVIDIA GPU can be used here, and every stage of the check wants one", file=sys.stderr
        )
        return 2
    folder = find_model(options.model)
    if not folder.is_dir():
        print(f"error: {folder} does not exist: give bundled, an architecture or a folder", file=sys.stderr)
        return 2
    parent = options.out.resolve() if options.out else Path("results") / gpu.slug
    os.chdir(ROOT)  # so that the recorded commands have no path of this machine
    out = parent / folder.resolve().name
    out.mkdir(parents=True, exist_ok=True)
    for name in ("bench", "accuracy", "kernels", "load", "greedy_decoder"):  # of an earlier run
        (out / f"{name}.json").unlink(missing_ok=True)
    shutil.rmtree(out / "layers", ignore_errors=True)

    scratch = Path("build") / "gpu-check"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    plan = stages(folder, options.model, scratch, out)
    if unknown := set(options.stages or ()) - {stage.name for stage in plan}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in plan)}")
    outcomes = [
        run_stage(stage, deadline) for stage in plan if not options.stages or stage.name in options.stages
    ]
    collect(scratch, out)
    here = records.environment(
        shlex.join(["python", "-m", "profiling.gpu_check", *(arguments or sys.argv[1:])])
    )
    content = asdict(here) | {"stages": [asdict(outcome) for outcome in outcomes]}
    (out / "environment.json").write_text(json.dumps(content, indent=1) + "\n")
    text = summarize(out)
    (out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
