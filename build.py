#!/usr/bin/env python3
"""Checkpoint -> engine folder: stock ONNX, fused ONNX, TensorRT engines and a manifest.

    python build.py --plugins fused
    python build.py --model DIR --plugins none --precision fp16 --batch 1,8,16 --out engines/DIR-fp16-none
    python build.py --model DIR --precision fp8 --calibration lines/

The folder appears complete or not at all, and a second build from equal inputs does nothing. Without an
NVIDIA GPU only the graphs are written, which ONNX Runtime runs.

Exit codes: 0 built or up to date; 2 wrong use or input; 3 graphs written, but no GPU or TensorRT for engines.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graph_surgery.fused_ops import (
    DOMAIN,
    FP8_PLUGINS,
    FUSED_OPS,
    GROUPS,
    VERSION,
    SurgeryError,
    parse_plugins,
)
from runtime.gpu import FP8_COMPUTE_CAPABILITY, Gpu, current_gpu
from runtime.manifest import FusedOp, Manifest, ManifestError, sha256
from runtime.tensorrt_loader import (
    TensorRTError,
    find_plugin_library,
    load_plugin_library,
    load_tensorrt,
    tensorrt_logger,
)

# torch and the exporter are imported where they are used: a build that is up to date takes no second.
if TYPE_CHECKING:
    import onnx

    from graph_surgery.checkpoint import ModelSpec

ROOT = Path(__file__).resolve().parent
DEFAULT_MODEL = "models/trocr-tiny-printed"
GRAPHS = ("encoder", "cross_kv", "decoder")
PRECISIONS = ("fp32", "fp16", "bf16", "fp8")
CACHE_MULTIPLE = 32  # a fixed cache's capacity is rounded up to it: aligned rows, few different engines
CHECKPOINT_FILES = {".bin", ".json", ".model", ".safetensors", ".txt"}
# Of a build's inputs, those that decide the graphs; the others are the engines' affair.
GRAPH_INPUTS = ("checkpoint", "precision", "plugins", "sources", "packages", "calibration")
PACKAGES = ("onnx", "onnx-graphsurgeon", "torch", "transformers")  # whose versions change the graphs

Range = tuple[int, int, int]
"""(min, opt, max) of a dynamic dimension."""


class BuildError(RuntimeError):
    """The folder cannot be built as asked; the message names the value and the remedy."""


class NoEngines(BuildError):
    """The graphs are written, but there is nothing here to build engines with."""


def build(
    model: str = DEFAULT_MODEL,
    plugins: str = "fused",
    precision: str = "fp16",
    batch: Range = (1, 8, 16),
    out: Path | None = None,
    *,
    max_length: int | None = None,
    num_beams: int = 1,
    calibration: Sequence[str] = (),
    timing_cache: Path | None = None,
    onnx_only: bool = False,
    force: bool = False,
) -> Path:
    """Build an engine folder; returns it. The parameters are the command line's, see `main`.

    Raises:
        BuildError, SurgeryError, TensorRTError: wrong or unusable input; fp8 where it cannot be.
        NoEngines: graphs written, no GPU or TensorRT.
    """
    chosen = sorted(parse_plugins(plugins))
    out = out or default_folder(model, plugins, precision)
    command = _command(model, plugins, precision, batch, out, max_length, num_beams, calibration)
    gpu = None if onnx_only else current_gpu()
    _check_fp8(precision, plugins, chosen, calibration, gpu)
    trt, why_no_engines = None, "no NVIDIA GPU can be used here"
    if gpu:
        try:
            trt = load_tensorrt()
        except TensorRTError as error:
            why_no_engines = str(error)
    library = find_plugin_library() if trt and chosen else None

    inputs = _graph_inputs(model, chosen, precision, batch, max_length) | {"num_beams": num_beams}
    images = _calibration_images(calibration) if precision == "fp8" else []
    if images:
        inputs |= {"calibration": _calibration_inputs(images)}
    if trt:
        inputs |= {
            "tensorrt": trt.__version__,
            "gpu": [gpu.name, gpu.compute_capability],
            "plugin library": sha256(library) if library else None,
        }
    built = _built_before(out)
    if force or not (built and _up_to_date(out, built, inputs)):
        reusable = None if force else _graphs_of_equal_inputs(out, inputs)
        gpu = gpu if trt else None
        try:
            _build_folder(out, inputs, command, model, chosen, images, gpu, trt, timing_cache, reusable)
        except OSError as error:
            raise BuildError(
                f"{out}: cannot be built ({error}); see to the disk, or give another --out"
            ) from error
    if not (trt or onnx_only):
        raise NoEngines(
            f"engines not built: {why_no_engines}; the graphs in {out} run on ONNX Runtime "
            "(--onnx-only asks for just that)"
        )
    return out


def default_folder(model: str, plugins: str, precision: str) -> Path:
    """engines/<model>-<precision>-<plugins>"""
    return Path("engines") / f"{Path(model).resolve().name}-{precision}-{plugins.replace(',', '+')}"


def _command(
    model: str,
    plugins: str,
    precision: str,
    batch: Range,
    out: Path,
    max_length: int | None,
    num_beams: int,
    calibration: Sequence[str],
) -> str:
    parts = ["python", "build.py", "--model", model, "--plugins", plugins, "--precision", precision]
    parts += ["--batch", ",".join(map(str, batch)), "--out", str(out)]
    parts += ["--max-length", str(max_length)] if max_length else []
    parts += ["--num-beams", str(num_beams)] if num_beams > 1 else []
    parts += ["--calibration", *calibration] if calibration else []
    return shlex.join(parts)


def _check_fp8(
    precision: str, plugins: str, chosen: Sequence[str], calibration: Sequence[str], gpu: Gpu | None
) -> None:
    """Refuse fp8 where it cannot be, and a calibration without fp8."""
    if precision != "fp8":
        if calibration:
            raise BuildError(f"--calibration: precision {precision} needs none; leave it out")
        return
    if missing := set(FP8_PLUGINS) - set(chosen):
        raise BuildError(
            f"--precision fp8 is of the plugins {' and '.join(FP8_PLUGINS)}, and --plugins {plugins} "
            f"leaves out {' and '.join(sorted(missing))}; add them (--plugins fused), or choose "
            "--precision fp16"
        )
    if gpu and not gpu.has_fp8:
        raise BuildError(
            f"--precision fp8 runs on GPUs of compute capability {FP8_COMPUTE_CAPABILITY} alone, this GPU is "
            f"{gpu.name} ({gpu.compute_capability}); choose --precision fp16, or --onnx-only for the graphs"
        )


def _calibration_images(calibration: Sequence[str]) -> list[Path]:
    from runtime.calibration import CalibrationError, calibration_images

    try:
        return calibration_images(calibration)
    except CalibrationError as error:
        raise BuildError(str(error)) from error


def _calibration_inputs(images: Sequence[Path]) -> dict[str, Any]:
    from runtime.calibration import inputs

    return inputs(images) | {"onnxruntime": importlib.metadata.version("onnxruntime")}


def _graph_inputs(
    model: str, plugins: Sequence[str], precision: str, batch: Range, max_length: int | None
) -> dict[str, Any]:
    """Everything that the graphs and their manifest depend on."""
    # load_spec downloads a hub id, or says what is wrong with the name.
    folder = Path(model) if Path(model).is_dir() else _load_spec(model).source
    checkpoint = sorted(path for path in folder.iterdir() if path.suffix in CHECKPOINT_FILES)
    runtime = ROOT / "runtime"
    sources = [ROOT / "build.py", runtime / "calibration.py", runtime / "decoder_weights.py"]
    sources += sorted((ROOT / "graph_surgery").rglob("*.py"))
    return {
        "checkpoint": {path.name: sha256(path) for path in checkpoint},
        "precision": precision,
        "plugins": list(plugins),
        "batch": list(batch),
        "max_length": max_length,
        "sources": hashlib.sha256("".join(map(sha256, sources)).encode()).hexdigest(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _built_before(out: Path) -> Manifest | None:
    """The manifest of the folder that a build would replace; None where there is none, or an empty one.

    Only a folder of ours may be replaced, with --force as well: --out may name anything.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise BuildError(f"{out}: a file; give another --out, of a folder")
    try:
        return Manifest.read(out)
    except ManifestError as error:
        if any(out.iterdir()):
            raise BuildError(
                f"{error}; this one may be another's, and is kept: remove it, or give another --out"
            ) from None
        return None


def _up_to_date(out: Path, manifest: Manifest, inputs: Mapping[str, Any]) -> bool:
    """Whether the folder was built from these inputs and is complete. Says so, or what differs."""
    changed = [name for name, value in inputs.items() if manifest.inputs.get(name) != value]
    changed += [name for name in manifest.files if not (out / name).is_file()]
    if changed:
        print(f"{out}: building again, changed: {', '.join(changed)}")
        return False
    print(f"{out}: up to date")
    return True


def _graphs_of_equal_inputs(out: Path, inputs: Mapping[str, Any]) -> list[str] | None:
    """The files of `out` but its engines, where a build from these inputs would write the same; else None."""
    try:
        manifest = Manifest.read(out)
        files = [name for name in manifest.files if not name.endswith(".engine")]
        for name in files:
            manifest.check_file(out, name)
    except ManifestError:
        return None
    same = all(manifest.inputs.get(name) == inputs.get(name) for name in GRAPH_INPUTS)
    return files if same else None


def _build_folder(
    out: Path,
    inputs: Mapping[str, Any],
    command: str,
    model: str,
    plugins: Sequence[str],
    images: Sequence[Path],
    gpu: Gpu | None,
    trt: Any,
    timing_cache: Path | None,
    reusable: Sequence[str] | None,
) -> None:
    """Build in a temporary folder beside `out` and exchange the two at the end.

    `images` are what fp8 is calibrated with, `reusable` files of `out` to take in place of exporting again.
    """
    from graph_surgery.checkpoint import copy_processor_files
    from graph_surgery.fuse import load

    spec = _load_spec(model)
    precision, batch = inputs["precision"], tuple(inputs["batch"])
    max_length = _check_max_length(spec, inputs["max_length"])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        if reusable:
            print(f"{out}: graphs are up to date")
            for name in reusable:
                os.link(out / name, folder / name)
            graphs = load(folder)
        else:
            graphs = _write_graphs(spec, precision, plugins, images, folder)
            copy_processor_files(spec, folder)

        properties = {entry.key: entry.value for entry in graphs["decoder"].metadata_props}
        cache = properties["trocr.cache"]
        capacity = -(-(max_length - 1) // CACHE_MULTIPLE) * CACHE_MULTIPLE if cache == "fixed" else None
        manifest = Manifest(
            model=model,
            weights_sha256=_weights_hash(inputs["checkpoint"]),
            precision=precision,
            plugins=list(plugins),
            fused_ops=_count_fused_ops(graphs),
            cache=cache,
            cache_capacity=capacity,
            batch=batch,
            num_beams=inputs["num_beams"],
            max_length=max_length,
            inputs=dict(inputs),
            command=command,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if trt:
            manifest.tensorrt = trt.__version__
            manifest.gpu, manifest.compute_capability, manifest.cuda = (
                gpu.name,
                gpu.compute_capability,
                gpu.cuda,
            )
            manifest.plugin_library_sha256 = inputs["plugin library"]
            manifest.engines = build_engines(
                trt,
                graphs,
                folder,
                dynamic_sizes(batch, max_length) | {"capacity": (capacity,) * 3},
                inputs["num_beams"],
                [op.op for op in manifest.fused_ops],
                timing_cache or out.parent / "timing.cache",
            )
        manifest.write(folder)
        _exchange(folder, out, Path(scratch))
    what = f"engines for {gpu.name}" if trt else "graphs, no engines"
    print(f"{out}: built ({what})")


def _exchange(folder: Path, out: Path, scratch: Path) -> None:
    """Put `folder` in the place of `out`, which goes to `scratch`."""
    for attempt in itertools.count():
        if out.exists():
            out.rename(scratch / f"replaced-{attempt}")
        try:
            folder.rename(out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process has built the same folder, and was first by a moment: replace that one.


def _load_spec(model: str) -> ModelSpec:
    from graph_surgery.checkpoint import CheckpointError, load_spec

    try:
        return load_spec(model)
    except CheckpointError as error:
        raise BuildError(str(error)) from error


def _check_max_length(spec: ModelSpec, max_length: int | None) -> int:
    if max_length is None:
        return spec.max_length
    positions = spec.decoder.max_position_embeddings
    if not 2 <= max_length <= positions:
        raise BuildError(
            f"--max-length {max_length}: {spec.source} has {positions} positions; choose 2 to {positions}"
        )
    return max_length


def _write_graphs(
    spec: ModelSpec, precision: str, plugins: Sequence[str], images: Sequence[Path], folder: Path
) -> dict[str, onnx.ModelProto]:
    """Export the checkpoint, fuse the graphs, and save them with the definitions that ONNX Runtime needs.

    A fully fused folder also gets the weights of the device decoder, where that can run the checkpoint.
    """
    from graph_surgery.checkpoint import BASE_PRECISION, DTYPES, CheckpointError, load_model
    from graph_surgery.export import export_graphs
    from graph_surgery.fuse import fuse, save
    from runtime import decoder_weights

    base = BASE_PRECISION[precision]
    try:
        weights = load_model(spec, DTYPES[base])
    except CheckpointError as error:
        raise BuildError(str(error)) from error
    graphs = fuse(export_graphs(spec, weights, base), spec, plugins)
    if precision == "fp8":
        graphs["encoder"] = _quantized(graphs["encoder"], spec, images)
    for name, graph in graphs.items():
        save(graph, folder / f"{name}.onnx")
    if GROUPS["fused"] <= set(plugins) and decoder_weights.obstacle(spec, weights.dtype) is None:
        packed = decoder_weights.pack_decoder(weights)
        decoder_weights.save_decoder(packed, decoder_weights.decoder_config(spec, weights), folder)
    return graphs


def _quantized(encoder: onnx.ModelProto, spec: ModelSpec, images: Sequence[Path]) -> onnx.ModelProto:
    """The fused float16 encoder in fp8, calibrated with these images."""
    from graph_surgery.checkpoint import CheckpointError
    from graph_surgery.fp8 import quantize_encoder
    from runtime.calibration import CalibrationError, calibrate

    try:
        ranges = calibrate(encoder, spec, images)
    except (CalibrationError, CheckpointError) as error:
        raise BuildError(str(error)) from error
    return quantize_encoder(encoder, spec, ranges)


def _weights_hash(checkpoint: Mapping[str, str]) -> str:
    """The hash of the weight file; of the hashes where there are several. `.bin` only without others."""
    hashes = [value for name, value in checkpoint.items() if name.endswith(".safetensors")]
    hashes = hashes or [value for name, value in checkpoint.items() if name.endswith(".bin")]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _count_fused_ops(graphs: Mapping[str, onnx.ModelProto]) -> list[FusedOp]:
    nodes = [node.op_type for graph in graphs.values() for node in graph.graph.node if node.domain == DOMAIN]
    return [FusedOp(op.name, VERSION, nodes.count(op.name)) for op in FUSED_OPS.values() if op.name in nodes]


def dynamic_sizes(batch: Range, max_length: int) -> dict[str, Range]:
    """The ranges of the stock graphs' dynamic dimensions, by name."""
    # Of a growing cache: empty at the first step; all tokens but the last two at the last one.
    past = (0, min(CACHE_MULTIPLE, max_length - 2), max_length - 2)
    return {"batch": batch, "images": batch, "past_length": past}


def build_engines(
    trt: Any,
    graphs: Mapping[str, onnx.ModelProto],
    folder: Path,
    sizes: Mapping[str, Range],
    num_beams: int,
    fused_ops: Sequence[str],
    timing_cache: Path,
) -> dict[str, float]:
    """Write an engine for every graph; returns the seconds each took. `trt` may be TensorRT-RTX."""
    from graph_surgery.fuse import strip_functions

    if fused_ops:
        load_plugin_library(fused_ops)
    builder = _builder(trt)
    seconds = {}
    for name in graphs:
        began = time.monotonic()
        network = builder.create_network(_network_flags(trt))
        network.name = f"{folder.name}/{name}"
        parser = trt.OnnxParser(network, tensorrt_logger(trt))
        graph = strip_functions(graphs[name])
        if not parser.parse(graph.SerializeToString()):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise BuildError(f"{name}.onnx: TensorRT {trt.__version__} cannot parse it: {errors}")
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
        low, opt, high = sizes["batch"]
        rows = (low, opt * num_beams, high * num_beams) if name == "decoder" else sizes["batch"]
        _add_profile(builder, network, config, graph, {**sizes, "batch": rows})
        _use_timing_cache(config, timing_cache)
        progress = _progress_monitor(trt, network.name)
        config.progress_monitor = progress
        plan = builder.build_serialized_network(network, config)
        progress.close()
        if plan is None:
            raise BuildError(
                f"{name}.onnx: TensorRT {trt.__version__} cannot build an engine for batch {sizes['batch']} "
                "(its log is above); try a smaller --batch"
            )
        (folder / f"{name}.engine").write_bytes(plan)
        _replace_file(timing_cache, config.get_timing_cache().serialize())
        seconds[name] = round(time.monotonic() - began, 1)
        print(f"{network.name}: {plan.nbytes / 2**20:.1f} MiB in {seconds[name]:.1f} s", flush=True)
    return seconds


@functools.cache
def _builder(trt: Any) -> Any:
    """One builder a process: what TensorRT has loaded and compiled for one engine serves the next."""
    return trt.Builder(tensorrt_logger(trt))


def _network_flags(trt: Any) -> int:
    """Types follow the graph. TensorRT 11 knows nothing else and may have dropped the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _add_profile(
    builder: Any, network: Any, config: Any, graph: onnx.ModelProto, sizes: Mapping[str, Range]
) -> None:
    """One optimisation profile: every dynamic dimension by its name in the graph."""
    profile = builder.create_optimization_profile()
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        ranges = [sizes[dim.dim_param] if dim.dim_param else (dim.dim_value,) * 3 for dim in dims]
        profile.set_shape(value.name, *zip(*ranges, strict=True))
    config.add_optimization_profile(profile)


def _use_timing_cache(config: Any, path: Path) -> None:
    """Take the kernels' times of earlier builds; those of another GPU or TensorRT are of no use."""
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        print(f"{path}: of another GPU or TensorRT, or damaged: starting a new timing cache")
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _replace_file(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def _progress_monitor(trt: Any, title: str) -> Any:
    """TensorRT's building phases as one tqdm bar: the outermost phase, with the innermost one's name."""
    from tqdm import tqdm

    class Progress(trt.IProgressMonitor):
        """Called from TensorRT's threads."""

        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()
            self.outer: str | None = None
            self.bar = tqdm(desc=title, unit="step", leave=False, disable=None)
            self.interrupted = False

        def phase_start(self, phase_name, parent_phase, num_steps):
            with self.lock:
                if parent_phase is None:
                    self.outer = phase_name
                    self.bar.reset(num_steps)
                self.bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name, step):
            try:
                with self.lock:
                    if phase_name == self.outer:
                        self.bar.update()
            except KeyboardInterrupt:  # must not pass through TensorRT
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name):
            pass

        def close(self):
            self.bar.close()
            if self.interrupted:
                raise KeyboardInterrupt

    return Progress()


def batch_range(text: str) -> Range:
    """Parse --batch."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not min,opt,max with 1 <= min <= opt <= max, such as 1,8,16"
        )
    return sizes


def _positive(text: str) -> int:
    """Parse --num-beams."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Build the ONNX graphs and TensorRT engines of a TrOCR checkpoint."
    )
    parser.add_argument(
        "--model",
        action="append",
        help=f"checkpoint folder or hub id (default: {DEFAULT_MODEL}); several --model are built in turn, "
        "by one process, which loads TensorRT's kernels once",
    )
    parser.add_argument(
        "--plugins",
        action="append",
        help="fused (default), none, all, or names and groups with commas; a folder for each --plugins given",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default: %(default)s")
    parser.add_argument(
        "--batch", type=batch_range, default=(1, 16, 64), metavar="MIN,OPT,MAX", help="default: 1,16,64"
    )
    parser.add_argument("--out", type=Path, help="default: engines/<model>-<precision>-<plugins>")
    parser.add_argument(
        "--max-length",
        type=int,
        help="most tokens of a line, the start token included (default: the checkpoint's)",
    )
    parser.add_argument(
        "--num-beams",
        type=_positive,
        default=1,
        help="beam search with so many beams is to work for the largest batch too (default: 1, greedy)",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="PATH",
        help="for fp8: images, folders or globs of the lines that the encoder's ranges are taken of "
        "(default: 16 of the bundled samples)",
    )
    parser.add_argument("--timing-cache", type=Path, help="default: timing.cache beside the folder")
    parser.add_argument("--onnx-only", action="store_true", help="stop after the fused ONNX")
    parser.add_argument("--force", action="store_true", help="build even if up to date")
    options = parser.parse_args(arguments)
    models = options.model or [DEFAULT_MODEL]
    plugins = options.plugins or ["fused"]
    if options.out and len(models) * len(plugins) > 1:
        parser.error("--out names one folder, --model and --plugins ask for several: leave out --out")

    status = 0
    for model, names in itertools.product(models, plugins):
        try:
            build(
                model,
                names,
                options.precision,
                options.batch,
                options.out,
                max_length=options.max_length,
                num_beams=options.num_beams,
                calibration=options.calibration,
                timing_cache=options.timing_cache,
                onnx_only=options.onnx_only,
                force=options.force,
            )
        except NoEngines as error:
            print(f"error: {error}", file=sys.stderr)
            status = 3
        except (BuildError, SurgeryError, TensorRTError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
