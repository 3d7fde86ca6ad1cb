"""Choosing and opening a backend."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from build import build, default_folder
from graph_surgery.checkpoint import load_spec
from graph_surgery.fused_ops import parse_plugins
from runtime.backends.base import Backend, BackendError
from runtime.generation import new_token_limit
from runtime.gpu import FP8_COMPUTE_CAPABILITY, current_gpu
from runtime.manifest import FILE_NAME as MANIFEST
from runtime.manifest import Manifest

NAMES = ("auto", "tensorrt", "onnxruntime", "torch")


def open_backend(
    model: str | Path,
    name: str = "auto",
    plugins: str = "fused",
    engines: str | Path | None = None,
    precision: str | None = None,
    max_new_tokens: int | None = None,
    e4m3_cross: bool = False,
) -> tuple[Backend, str]:
    """Open a backend; the arguments are those of `Recognizer`.

    Engines are taken from `engines`, or else from `model` if it is an engine folder, or else from where
    build.py puts them by default. ONNX graphs are taken from the first two, or else built.

    Returns:
        The backend, and its name together with the reason where "auto" did not choose TensorRT.

    Raises:
        BackendError: no such backend, or nothing that it could run.
        SurgeryError: no such plugins.
        ManifestError: the folder's manifest or graphs are damaged.
    """
    if name not in NAMES:
        raise BackendError(f"there is no backend {name!r}; choose one of {', '.join(NAMES)}")
    parse_plugins(plugins)  # a misspelled name is no less wrong where nothing is built
    given = _given_folder(model, engines, precision)
    choice = name
    if name == "auto":
        obstacle = _tensorrt_obstacle(given or default_folder(str(model), plugins, precision or "fp16"))
        name = "onnxruntime" if obstacle else "tensorrt"
        choice = f"{name} ({obstacle})" if obstacle else name
    if e4m3_cross and name != "tensorrt":
        raise BackendError(
            f"backend {choice} has no e4m3_cross, which is the CUDA decoder's; leave it out, or choose the "
            "backend tensorrt"
        )

    if name == "torch":
        if precision == "fp8":
            raise BackendError(
                "backend torch has no fp8, which is the fused encoder's; choose --precision fp16, or the "
                "backend tensorrt or onnxruntime"
            )
        from runtime.backends.torch_backend import TorchBackend

        return TorchBackend(load_spec(model), precision or "fp32"), choice
    if name == "tensorrt":
        from runtime.backends.tensorrt_backend import TensorRTBackend

        folder = given or default_folder(str(model), plugins, precision or "fp16")
        return TensorRTBackend(folder, e4m3_cross=e4m3_cross), choice

    from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

    folder = given
    if folder is None:
        with redirect_stdout(sys.stderr):  # where the caller's own output does not go
            folder = build(str(model), plugins, precision or "fp32", onnx_only=True)
    _check_graphs(folder)
    spec = load_spec(folder)
    return OnnxRuntimeBackend(folder, spec, new_token_limit(spec, max_new_tokens)), choice


def _given_folder(model: str | Path, engines: str | Path | None, precision: str | None) -> Path | None:
    """The engine folder that the caller named, if any."""
    if engines is None and not (Path(model) / MANIFEST).is_file():
        return None
    folder = Path(model if engines is None else engines)
    manifest = Manifest.read(folder)
    if precision not in (None, manifest.precision):
        raise BackendError(
            f"{folder / MANIFEST}: precision is {manifest.precision}, and {precision} was asked for; "
            f"build it: python build.py --precision {precision}"
        )
    return folder


def _check_graphs(folder: Path) -> None:
    """Hold the folder's graphs and their weights against the manifest.

    ONNX Runtime notices some damage, and not that of weights: it would read nonsense.
    """
    manifest = Manifest.read(folder)
    for name in manifest.files:
        if name.endswith((".onnx", ".onnx.data")):
            manifest.check_file(folder, name)


def _tensorrt_obstacle(folder: Path) -> str | None:
    """Why TensorRT cannot run the engines of `folder` here, in a few words."""
    gpu = current_gpu()
    if gpu is None:
        return "no NVIDIA GPU"
    from runtime.tensorrt_loader import TensorRTError, load_tensorrt

    try:
        load_tensorrt()
    except TensorRTError as error:
        return str(error)
    if not (folder / MANIFEST).is_file():
        return f"no engines in {folder}: python build.py makes them"
    manifest = Manifest.read(folder)
    if manifest.precision == "fp8" and not gpu.has_fp8:
        return f"fp8 is for compute capability {FP8_COMPUTE_CAPABILITY}, not {gpu.compute_capability}"
    if not manifest.engines:
        return f"no engines in {folder}, only graphs: python build.py makes them"
    return None
