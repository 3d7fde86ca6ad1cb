"""Finding the extension module `trocr_kernels`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def load_kernels(name: str = "trocr_kernels") -> ModuleType:
    """The extension module of that name out of CMake's build folder (TROCR_BUILD_DIR, by default `build`).

    Raises:
        ImportError: it is not built there, or not for this Python; the message says where and what to do.
    """
    build = ROOT / os.environ.get("TROCR_BUILD_DIR", "build")
    if str(build) not in sys.path:
        sys.path.insert(0, str(build))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"no {name} for this Python in {build} ({error}); "
            "build it: cmake -S . -B build && cmake --build build"
        ) from error


@cache
def optional_kernels() -> ModuleType | None:
    """The module, or None after one warning: recognition on a GPU can do without it, slower."""
    try:
        return load_kernels()
    except ImportError as error:
        logging.getLogger(__name__).warning(
            "%s. Without it images are scaled on the CPU, and the host decodes step by step.", error
        )
        return None
