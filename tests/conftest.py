"""Fixtures that several test files share."""

import os
import platform
import sysconfig

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: its threads would fight for the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from build import build
from runtime.kernels import load_kernels
from tests.checkpoints import random_checkpoint

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "trocr-tiny-printed"


@pytest.fixture(autouse=True)
def give_gpu_memory_back():
    """The GPU is shared by the processes of a run: what one test's tensors took is not kept for the next."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The module trocr_kernels."""
    try:
        return load_kernels()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def hopper(kernels: ModuleType) -> ModuleType:
    """The module trocr_kernels, on a GPU that runs what is written for Hopper alone."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    torch.backends.cuda.matmul.allow_tf32 = False
    return kernels


@pytest.fixture(scope="session")
def cpu_kernels() -> ModuleType:
    """The decoders' kernels on the CPU (tests/cpu_cuda/README.md), which `make test` has built."""
    if platform.machine() != "x86_64":
        pytest.skip("the coroutines of tests/cpu_cuda are x86-64's")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python's headers are not here (python3-dev): CMake builds no module for it")
    return load_kernels("trocr_cpu_kernels")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random checkpoint of tests/checkpoints.py, by name, in fp32. Only to be read."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: random_checkpoint(name, root / name))


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """The graphs of a checkpoint with these --plugins, in fp32, as build.py writes them. Only to be read."""
    root = tmp_path_factory.mktemp("graphs")

    @cache
    def built(model: Path, plugins: str) -> Path:
        out = root / f"{model.parent.name}-{model.name}-{plugins}"
        return build(str(model), plugins, "fp32", out=out, onnx_only=True)

    return built
