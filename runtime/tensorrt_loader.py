"""Finding TensorRT's Python module and libraries, and the plugin library.

Nothing is loaded on import. Each function looks once a process; what fails says what was looked for where.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLUGIN_LIBRARY = "libtrocr_plugins.so"
PLUGIN_NAMESPACE = "trocr"
PLUGIN_VERSION = "1"

# In the order in which one needs the other.
_LIBRARIES = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so")


class TensorRTError(RuntimeError):
    """TensorRT or the plugin library cannot be loaded; the message says what was looked for where."""


@functools.cache
def load_tensorrt() -> ModuleType:
    """TensorRT's Python module: `tensorrt` where it is installed, else `tensorrt_bindings`.

    `tensorrt_bindings` comes without libraries: those of its major version are loaded first, from
    TENSORRT_ROOT/lib, this project's .deps/tensorrt/lib (scripts/get_tensorrt.py) or the loader's own path.

    Raises:
        TensorRTError: no module, or a module without its libraries.
    """
    looked = []
    for name, prepare in [("tensorrt", lambda: None), ("tensorrt_bindings", _load_libraries)]:
        if importlib.util.find_spec(name) is None:
            looked.append(f"Python module {name}: not installed")
            continue
        try:
            prepare()
            return importlib.import_module(name)
        except (ImportError, OSError, TensorRTError) as error:
            looked.append(f"Python module {name}: {error}")
    raise TensorRTError(
        "TensorRT cannot be loaded.\n  "
        + "\n  ".join(looked)
        + "\nRemedy: `python scripts/get_tensorrt.py` fetches it; or `pip install tensorrt`; or set "
        "TENSORRT_ROOT to a folder that holds the libraries in `lib`"
    )


def _load_libraries() -> None:
    """Loads the libraries that `tensorrt_bindings` is made for, with global symbols."""
    major = _bindings_major()
    names = [f"{library}.{major}" for library in _LIBRARIES]
    folders = [ROOT / ".deps" / "tensorrt" / "lib"]
    if root := os.environ.get("TENSORRT_ROOT"):
        folders.insert(0, Path(root) / "lib")
    folder = next((folder for folder in folders if (folder / names[0]).is_file()), None)
    try:
        for name in names:
            ctypes.CDLL(str(folder / name) if folder else name, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TensorRTError(
            f"needs {', '.join(names)}: {error}; looked in "
            f"TENSORRT_ROOT/lib (TENSORRT_ROOT is {root or 'not set'}), {folders[-1]}, the loader's path"
        ) from error


def _bindings_major() -> str:
    """Major version of the installed `tensorrt_bindings`: loading another's libraries would crash it."""
    for distribution in importlib.metadata.packages_distributions()["tensorrt_bindings"]:
        return importlib.metadata.version(distribution).split(".")[0]
    raise TensorRTError("has no package metadata, so its version is unknown: install it with pip")


@functools.cache
def load_tensorrt_rtx() -> ModuleType:
    """TensorRT-RTX's Python module, a peer to measure against; not beside TensorRT, whose symbols it has.

    Raises:
        TensorRTError: not installed, or TensorRT is in this process already.
    """
    if loaded := [name for name in ("tensorrt", "tensorrt_bindings") if name in sys.modules]:
        raise TensorRTError(
            f"TensorRT-RTX cannot be loaded beside TensorRT ({loaded[0]}): measure it in a process of its own"
        )
    looked = []
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        if importlib.util.find_spec(name) is None:
            looked.append(f"Python module {name}: not installed")
            continue
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            looked.append(f"Python module {name}: {error}")
    raise TensorRTError(
        "TensorRT-RTX cannot be loaded.\n  "
        + "\n  ".join(looked)
        + "\nRemedy: pip install tensorrt-rtx-cu13-libs==1.6.1.120 tensorrt-rtx-cu13-bindings==1.6.1.120"
    )


@functools.cache
def tensorrt_logger(trt: ModuleType) -> Any:
    """The process's one `trt.Logger`, at warnings: TensorRT keeps the first that it is given."""
    return trt.Logger(trt.Logger.WARNING)


def find_plugin_library() -> Path:
    """The plugin library: TROCR_PLUGIN_LIBRARY, else the project's build folders.

    Raises:
        TensorRTError: none is there.
    """
    if chosen := os.environ.get("TROCR_PLUGIN_LIBRARY"):
        candidates = [Path(chosen)]
    else:
        candidates = [ROOT / folder / PLUGIN_LIBRARY for folder in ("build", "build-all-archs")]
    for library in candidates:
        if library.is_file():
            return library.resolve()
    raise TensorRTError(
        f"no plugin library. Looked for TROCR_PLUGIN_LIBRARY ({chosen or 'not set'})"
        + "".join(f", {library}" for library in candidates if not chosen)
        + ". Remedy: cmake -S . -B build && cmake --build build"
    )


def load_plugin_library(ops: Iterable[str]) -> Path:
    """Registers the plugins with TensorRT, once a process, and checks that these ops are among them.

    Args:
        ops: names of fused ops, as TrOCREncoderAttention.

    Returns:
        The library that was loaded.

    Raises:
        TensorRTError: no TensorRT, no library, one that cannot be loaded, or one that lacks one of the ops.
    """
    library = _register_plugins()
    registry = load_tensorrt().get_plugin_registry()
    missing = [op for op in ops if registry.get_creator(op, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None]
    if missing:
        raise TensorRTError(
            f"{library} has no plugin {', '.join(missing)} of namespace {PLUGIN_NAMESPACE} and version "
            f"{PLUGIN_VERSION}: it is of another version of this project. Remedy: cmake --build build"
        )
    return library


@functools.cache
def _register_plugins() -> Path:
    trt = load_tensorrt()
    library = find_plugin_library()
    try:
        ctypes.CDLL(str(library))  # TensorRT would not tell why
    except OSError as error:
        raise TensorRTError(f"{library} cannot be loaded: {error}. Remedy: cmake --build build") from error
    if trt.get_plugin_registry().load_library(str(library)) is None:
        raise TensorRTError(
            f"TensorRT {trt.__version__} refuses {library}: it exports no plugins (getCreators), or plugins "
            "of the same names are registered already"
        )
    return library
