"""Which GPU and driver are here, asked of the CUDA driver alone: in a fraction of a second, without torch."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

FP8_COMPUTE_CAPABILITY = "9.0"  # the kernels of `--precision fp8` are written for Hopper alone


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: as the driver tells it, "NVIDIA H200".
        compute_capability: "9.0".
        cuda: the newest CUDA version that the driver supports, "13.0".
    """

    name: str
    compute_capability: str
    cuda: str

    @property
    def has_fp8(self) -> bool:
        """Whether engines of `--precision fp8` run on it."""
        return self.compute_capability == FP8_COMPUTE_CAPABILITY

    @property
    def slug(self) -> str:
        """The name fit for a folder: "nvidia-h200"."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())


def current_gpu() -> Gpu | None:
    """The first visible GPU (CUDA_VISIBLE_DEVICES counts), or None where no GPU can be used."""
    from cuda.bindings import driver

    def checked(result: tuple):
        status, *values = result
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(status.name)
        return values[0] if values else None

    try:
        checked(driver.cuInit(0))  # raises RuntimeError where libcuda.so.1 is missing
        device = checked(driver.cuDeviceGet(0))
        # A C string in a buffer of 128 bytes, whose rest may be anything.
        name = checked(driver.cuDeviceGetName(128, device)).split(b"\0", 1)[0].decode()
        attribute = driver.CUdevice_attribute
        major, minor = (
            checked(driver.cuDeviceGetAttribute(which, device))
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        version = checked(driver.cuDriverGetVersion())  # 13000 is 13.0
    except RuntimeError:
        return None
    return Gpu(name, f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would be for each GPU that can be used."""
    from cuda.bindings import driver

    if current_gpu() is None:
        return []
    _, count = driver.cuDeviceGetCount()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:count] or [str(number) for number in range(count)]


def driver_version() -> str | None:
    """The kernel driver's version, "580.159.04", as nvidia-smi tells it; None without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return (
            subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
            or None
        )
    except (OSError, subprocess.SubprocessError):
        return None
