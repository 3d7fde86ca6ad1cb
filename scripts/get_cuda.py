#!/usr/bin/env python3
"""Makes sure that there is an nvcc: the one installed, else PyPI's, in the environment that runs this.

    .venv/bin/python scripts/get_cuda.py

Prints the nvcc that `cmake -S . -B build` will use (cmake/TrocrCuda.cmake looks in the same order). Does
nothing more when there is one. Exit code 2, with the reason, when none can be had.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements-cuda.txt"


class ToolchainError(Exception):
    """nvcc can be neither found nor installed; the message says what to do."""


def installed_nvcc() -> Path | None:
    """The nvcc of CUDACXX, the PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda, in this order."""
    if compiler := os.environ.get("CUDACXX"):
        if found := shutil.which(compiler):
            return Path(found)
        raise ToolchainError(f"CUDACXX is {compiler}, and there is no such program: correct or unset it")
    if found := shutil.which("nvcc"):
        return Path(found)
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(folder) / "bin" / "nvcc" for folder in folders if folder]
    return next((nvcc for nvcc in candidates if nvcc.is_file()), None)


def packaged_nvcc() -> Path | None:
    """The nvcc that PyPI's packages put into this environment."""
    return next(
        iter(sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"), reverse=True)), None
    )


def install() -> Path:
    """Installs the pinned packages (about 150 MB) into this environment."""
    print(f"no CUDA toolkit here: installing nvcc from {REQUIREMENTS.name} ...", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)]
    if subprocess.run(command).returncode != 0:
        raise ToolchainError(
            f"pip could not install {REQUIREMENTS.name} (its message is above), and nvcc was not found by "
            "CUDACXX, the PATH, CUDA_HOME, CUDA_PATH or in /usr/local/cuda: install a toolkit or set CUDACXX"
        )
    if (nvcc := packaged_nvcc()) is None:
        raise ToolchainError(
            f"{REQUIREMENTS.name} is installed, but nvidia/cu*/bin/nvcc is not in {sys.prefix}"
        )
    return nvcc


def complete(toolkit: Path) -> None:
    """Adds the two names that nvcc's own link step and CMake look for, and that the packages leave out."""
    runtime = max((toolkit / "lib").glob("libcudart.so.*"))
    for link, target in [(toolkit / "lib64", "lib"), (toolkit / "lib" / "libcudart.so", runtime.name)]:
        if not link.exists():
            link.symlink_to(target)


def main() -> int:
    try:
        nvcc = installed_nvcc()
        if nvcc is None:
            nvcc = packaged_nvcc() or install()
            complete(nvcc.parent.parent)
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (ToolchainError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    release = next((line for line in version.splitlines() if "release" in line), version.strip())
    print(f"nvcc: {nvcc} ({release})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
