"""The same checkpoint by other means, to measure against: TensorRT from a naive export, and TensorRT-RTX.

    python -m profiling.peers --model bundled --precision fp16 --batch 1,16,64

builds the engines that the bench compares: stock, fused, and the encoder of the naive export. In one process,
because TensorRT compiles the attention of stock encoders for a minute and more, once a process, precision and
width. TensorRT-RTX's engines are built where they are measured: it takes seconds, and it cannot be in one
process with TensorRT.

Exit codes: those of build.py.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

from build import (
    PRECISIONS,
    BuildError,
    Range,
    batch_range,
    build,
    build_engines,
    default_folder,
    dynamic_sizes,
)
from graph_surgery.checkpoint import DTYPES, CheckpointError, ModelSpec, load_model, load_spec
from graph_surgery.fuse import load
from graph_surgery.fused_ops import SurgeryError
from profiling.models import find_model
from runtime.engine import Engine
from runtime.manifest import Manifest
from runtime.tensorrt_loader import TensorRTError, load_tensorrt, load_tensorrt_rtx

NAIVE_OPSET = 18  # the exporter's own


class _LastHiddenState(torch.nn.Module):
    """Hugging Face's encoder with one input and one output."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values=pixel_values).last_hidden_state


def naive_encoder(spec: ModelSpec, precision: str) -> onnx.ModelProto:
    """The encoder as PyTorch's exporter (dynamo) writes Hugging Face's module with its default attention
    (sdpa).

    Raises:
        BuildError: the exporter's package onnxscript is missing.
    """
    model = load_model(spec, DTYPES[precision])
    model.encoder.set_attn_implementation("sdpa")
    size = (2, 3, spec.encoder.image_height, spec.encoder.image_width)
    try:
        program = torch.onnx.export(
            _LastHiddenState(model.encoder).eval(),
            (torch.zeros(size, dtype=DTYPES[precision]),),
            input_names=["pixel_values"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            opset_version=NAIVE_OPSET,
            dynamo=True,
            verbose=False,
        )
    except ModuleNotFoundError as error:
        raise BuildError(f"the naive export needs a package more: {error}; pip install onnxscript") from None
    return program.model_proto


def naive_folder(model: str, precision: str) -> Path:
    """Where the naive export's engine is, beside the folders of build.py."""
    return default_folder(model, "naive", precision)


def build_naive(model: str, precision: str, batch: Range, out: Path) -> Path:
    """Write encoder.onnx and encoder.engine of the naive export into `out`, unless they are there."""
    if (out / "encoder.engine").is_file():
        print(f"{out}: up to date")
        return out
    graph = naive_encoder(load_spec(model), precision)
    out.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, out / "encoder.onnx")
    build_engines(
        load_tensorrt(), {"encoder": graph}, out, {"batch": batch}, 1, [], out.parent / "timing.cache"
    )
    return out


def naive_engine(folder: Path, model: str) -> Engine:
    """The engine of `build_naive`, loaded."""
    path = folder / "encoder.engine"
    return Engine(
        load_tensorrt(), path.read_bytes(), path, f"rm -r {folder}; python -m profiling.peers --model {model}"
    )


def rtx_engines(folder: Path) -> tuple[Engine, Engine, Engine]:
    """The stock graphs of a folder of build.py, as engines of TensorRT-RTX: encoder, cross_kv, decoder.

    Raises:
        TensorRTError: it is not installed, or not alone in the process.
        BuildError: it cannot build an engine.
    """
    trt = load_tensorrt_rtx()
    manifest = Manifest.read(folder)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        graphs = load(folder)
        sizes = dynamic_sizes(manifest.batch, manifest.max_length)
        build_engines(trt, graphs, out, sizes, 1, [], out / "timing.cache")
        plans = [out / f"{name}.engine" for name in graphs]
        return tuple(Engine(trt, plan.read_bytes(), plan, "measure again") for plan in plans)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build every engine that the bench compares.")
    parser.add_argument(
        "--model",
        type=lambda text: text.split(","),
        default=["bundled"],
        help="bundled, small, base, large (random) or folders (default: bundled)",
    )
    parser.add_argument(
        "--precision",
        type=lambda text: text.split(","),
        default=["fp16"],
        help=f"of {', '.join(PRECISIONS)}; the naive export in the first, unless that is fp8 (default: fp16)",
    )
    parser.add_argument("--batch", type=batch_range, default=(1, 16, 64), help="default: 1,16,64")
    parser.add_argument("--no-naive", action="store_true", help="without the naive export's engine")
    options = parser.parse_args(arguments)
    if unknown := set(options.precision) - set(PRECISIONS):
        parser.error(f"no precision {', '.join(sorted(unknown))}; there are {', '.join(PRECISIONS)}")
    try:
        for model in [str(find_model(name)) for name in options.model]:
            for precision, plugins in itertools.product(options.precision, ("none", "fused")):
                if (precision, plugins) != ("fp8", "none"):  # only fused encoders have fp8
                    build(model, plugins, precision, options.batch)
            first = options.precision[0]
            if first != "fp8" and not options.no_naive:
                build_naive(model, first, options.batch, naive_folder(model, first))
    except (BuildError, CheckpointError, SurgeryError, TensorRTError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
