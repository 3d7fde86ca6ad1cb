"""The whole family at full size: engines of every architecture, their tokens against PyTorch, their times.

    python -m profiling.family                      into results/<gpu>/family.json
    python -m profiling.family --only base,large    these again, the others' entries stay

The published checkpoints have six configurations (`PUBLISHED` in graph_surgery/architectures.py); the weights
are random, drawn on the GPU. The bundled checkpoint, which is trained, is measured beside them. Weights and
graphs are written by processes of their own, some at a time, while this one builds the engines of those that
are done. A stock encoder's build has TensorRT compile its attention for a minute and more, a fused one's
does not.

For each: seconds to build and bytes of the stock and the fused engines; milliseconds of the encoder and
microseconds a token, at batch 1; the encoder's largest error and the share of the tokens that are those of
PyTorch in float32.

Exit codes: 0 all measured; 1 some were not, the file says why; 2 no GPU, TensorRT or such configuration.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from build import build
from graph_surgery.architectures import PUBLISHED, random_checkpoint
from graph_surgery.checkpoint import load_model, load_spec
from profiling.models import BUNDLED
from profiling.records import ROOT, environment, update
from runtime.bench import Case, EngineVariant, Reference, measure_case
from runtime.gpu import current_gpu
from runtime.manifest import Manifest
from runtime.tensorrt_loader import TensorRTError, load_tensorrt

VARIANTS = {"stock": "none", "fused": "fused"}
PRECISION = "fp16"
PROFILE = (1, 4, 16)
TOKENS = 20
# Smallest first: what comes later is prepared meanwhile.
CONFIGURATIONS = ("bundled", "chinese", "small", "base", "base-stage1", "large", "large-printed")
SCRATCH = Path("engines/family")


def checkpoints_of(configuration: str) -> list[str]:
    """The names of the checkpoints that have it."""
    if configuration == "bundled":
        return [str(BUNDLED)]
    return [name for name, architecture in PUBLISHED.items() if architecture == configuration]


def prepare(configuration: str, folder: Path, device: str = "cuda") -> None:
    """Write the checkpoint and both kinds of graphs into `folder`."""
    model = BUNDLED
    if configuration != "bundled":
        model = random_checkpoint(configuration, folder / "model", device=device)
    for variant, plugins in VARIANTS.items():
        build(str(model), plugins, PRECISION, PROFILE, folder / variant, onnx_only=True)


def prepare_in_a_process(configuration: str, folder: Path) -> None:
    """`prepare`, elsewhere. Raises RuntimeError with the end of what it printed."""
    command = [sys.executable, "-m", "profiling.family", "--prepare", configuration, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-6:]))


def measure(configuration: str, folder: Path) -> dict[str, Any]:
    """Build the engines of prepared graphs, and time them; see the module's beginning."""
    model = BUNDLED if configuration == "bundled" else folder / "model"
    spec = load_spec(model)
    engines: dict[str, Any] = {}
    for variant, plugins in VARIANTS.items():
        build(str(model), plugins, PRECISION, PROFILE, folder / variant)
        manifest = Manifest.read(folder / variant)
        plans = [folder / variant / f"{graph}.engine" for graph in manifest.engines]
        engines[variant] = {
            "build_s": round(sum(manifest.engines.values()), 1),
            "engine_bytes": sum(plan.stat().st_size for plan in plans),
            "fused_nodes": sum(op.count for op in manifest.fused_ops),
        }
    reference = Reference(spec)
    parameters = sum(weight.numel() for weight in load_model(spec, torch.float16).parameters())
    with torch.inference_mode():
        for variant in VARIANTS:
            opened = EngineVariant(folder / variant, cuda_graphs=True, device_decoder=True)
            encoder = measure_case(opened, Case("encoder", 1, None), spec, reference)
            decoder = measure_case(opened, Case("decoder", 1, TOKENS), spec, reference)
            engines[variant] |= {
                "encoder_ms": encoder["median_ms"],
                "encoder_rel_error": encoder["rel_error"],
                "us_per_token": decoder["us_per_token"],
                "same_tokens": decoder["same_tokens"],
            }
            del opened
            torch.cuda.empty_cache()
    return {
        "configuration": configuration,
        "checkpoints": checkpoints_of(configuration),
        "weights": "trained" if configuration == "bundled" else "random",
        "precision": PRECISION,
        "parameters": parameters,
        "encoder_layers": spec.encoder.num_hidden_layers,
        "decoder_layers": spec.decoder.num_hidden_layers,
        "tokens": TOKENS,
        "engines": engines,
    }


def run(
    configurations: Sequence[str],
    scratch: Path,
    jobs: int,
    save: Callable[[Mapping[str, Any]], None],
) -> list[str]:
    """Measure the configurations one after the other; returns a line for each that could not be.

    Args:
        jobs: processes that prepare checkpoints and graphs.
        save: is given each entry as soon as it is there.
    """
    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        prepared: dict[str, Future] = {
            name: pool.submit(prepare_in_a_process, name, scratch / name) for name in configurations
        }
        for name, future in prepared.items():
            folder = scratch / name
            try:
                future.result()
                began = time.monotonic()
                save(measure(name, folder))
                print(f"{name}: measured in {time.monotonic() - began:.0f} s", flush=True)
            except Exception as error:  # the others are still worth measuring
                failed.append(f"{name}: {type(error).__name__}: {error}")
                print(f"error: {failed[-1]}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            torch.cuda.empty_cache()
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and measure every TrOCR configuration at full size.")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--out", type=Path, help="default: results/<gpu>/family.json")
    parser.add_argument("--jobs", type=int, default=4, help="processes that export (default: %(default)s)")
    parser.add_argument("--prepare", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.prepare:
        name, folder = options.prepare
        prepare(name, Path(folder))
        return 0
    names = options.only or list(CONFIGURATIONS)
    if unknown := set(names) - set(CONFIGURATIONS):
        parser.error(f"no configuration {', '.join(sorted(unknown))}; there are {', '.join(CONFIGURATIONS)}")
    gpu = current_gpu()
    try:
        if gpu is None:
            raise TensorRTError("no NVIDIA GPU can be used here")
        load_tensorrt()
    except TensorRTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    out = options.out or ROOT / "results" / gpu.slug / "family.json"
    command = shlex.join(["python", "-m", "profiling.family", *(arguments or sys.argv[1:])])
    here = asdict(environment(command))

    def save(entry: Mapping[str, Any]) -> None:
        update(out, [{**entry, **here}], ["configuration"], [(name,) for name in CONFIGURATIONS])

    scratch = ROOT / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    failed = run([name for name in CONFIGURATIONS if name in names], scratch, options.jobs, save)
    shutil.rmtree(scratch, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
