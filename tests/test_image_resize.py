"""Scaling on the GPU: the algorithm against the checkpoints' own processors, and the kernel against both."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from runtime.device_resize import DeviceResize
from runtime.images import load_image
from runtime.kernels import optional_kernels
from tests.conftest import BUNDLED_MODEL

SAMPLES = sorted((BUNDLED_MODEL.parents[1] / "samples").glob("*.jpg"))[:6]
SIZES = ((64, 1200), (31, 90), (384, 384), (700, 500), (8, 16), (4, 9), (50, 3000))
FILTERS = {"bilinear": 2, "bicubic": 3}


def processor(filter: str, height: int = 384, width: int = 384):
    """The bundled checkpoint's image processor with this filter and size."""
    size = {"height": height, "width": width}
    return AutoImageProcessor.from_pretrained(BUNDLED_MODEL, resample=FILTERS[filter], size=size)


def by_processor(processor, images: list[np.ndarray]) -> torch.Tensor:
    settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    return torch.cat([processor(image, **settings).pixel_values for image in images])


def weights(filter: str, out: int, size: int) -> tuple[int, list[tuple[int, np.ndarray]]]:
    """Fraction bits, and each output's first source pixel and integer weights: the README's formula."""
    ratio = size / out
    stretch = max(ratio, 1.0)
    support = (1 if filter == "bilinear" else 2) * stretch
    found = []
    for output in range(out):
        center = ratio * (output + 0.5)
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), size)
        x = np.abs(np.arange(first, last) - center + 0.5) * (1 / stretch)
        if filter == "bilinear":
            w = np.maximum(1 - x, 0)
        else:
            inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
            w = np.where(x < 1, inner, np.where(x < 2, outer, 0))
        found.append((first, w / w.sum()))
    bits, largest = 0, max(w.max() for _, w in found)
    while bits < 22 and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    rounded = [(first, np.trunc(w * 2**bits + np.copysign(0.5, w))) for first, w in found]
    return bits, [(first, w.astype(np.int64)) for first, w in rounded]


def along(values: np.ndarray, axis: int, out: int, filter: str) -> np.ndarray:
    moved = np.moveaxis(values.astype(np.int64), axis, 0)
    bits, table = weights(filter, out, len(moved))
    sums = [np.tensordot(w, moved[first : first + len(w)], 1) for first, w in table]
    return np.clip((np.moveaxis(np.stack(sums), 0, axis) + (1 << bits >> 1)) >> bits, 0, 255)


def by_formula(image: np.ndarray, height: int, width: int, filter: str) -> torch.Tensor:
    """uint8 [3, height, width] of uint8 [H, W, 3]."""
    scaled = along(along(image, 1, width, filter), 0, height, filter)
    return torch.from_numpy(scaled.astype(np.uint8)).permute(2, 0, 1)


def random_images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.mark.parametrize("filter", FILTERS)
def test_the_formula_is_the_processors(filter: str):
    images = [np.asarray(load_image(path)) for path in SAMPLES[:2]] + random_images()[:3]
    expected = by_processor(processor(filter), images)
    for image, wanted in zip(images, expected, strict=True):
        assert torch.equal(by_formula(image, 384, 384, filter), wanted)


@pytest.fixture(scope="module")
def kernels(kernels):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return kernels


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "width"), ((384, 384), (64, 640)))
@pytest.mark.parametrize("filter", FILTERS)
def test_the_kernel_is_the_processors(kernels, filter: str, height: int, width: int):
    images = [np.asarray(load_image(path)) for path in SAMPLES] + random_images()
    resize = DeviceResize.like(processor(filter, height, width), torch.device("cuda"))
    found = resize(images)
    assert found.shape == (len(images), 3, height, width) and found.dtype == torch.uint8
    assert torch.equal(found.cpu(), by_processor(processor(filter, height, width), images))
    assert torch.equal(found, resize(images))


@pytest.mark.gpu
def test_the_kernel_refuses(kernels):
    buffer = torch.zeros(4096, dtype=torch.uint8, device="cuda").data_ptr()
    arguments = {"count": 1, "max_height": 4, "out_height": 8, "out_width": 8, "filter": "bilinear"}
    for change, message in (
        ({"out_width": 6}, "multiple of 4"),
        ({"count": 0}, "number of images"),
        ({"filter": "nearest"}, "neither"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.image_resize(*[buffer] * 5, **(arguments | change))


def test_only_what_is_the_same_is_done_on_the_device(monkeypatch):
    """The processor decides: anything but scaling to a fixed size stays with it, and so does a CPU."""
    monkeypatch.setattr("runtime.device_resize.optional_kernels", SimpleNamespace)
    like, device = processor("bicubic"), torch.device("cuda")
    resize = DeviceResize.like(like, device)
    assert (resize.height, resize.width, resize.filter) == (384, 384, "bicubic")
    assert DeviceResize.like(like, torch.device("cpu")) is None
    for change in ({"do_center_crop": True}, {"do_resize": False}, {"resample": 0}):
        other = AutoImageProcessor.from_pretrained(BUNDLED_MODEL, **change)
        assert DeviceResize.like(other, device) is None, change


def test_without_the_kernels_there_is_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TROCR_BUILD_DIR", str(tmp_path))
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if "build" not in entry])
    monkeypatch.delitem(sys.modules, "trocr_kernels", raising=False)
    optional_kernels.cache_clear()
    try:
        assert DeviceResize.like(processor("bicubic"), torch.device("cuda")) is None
        assert optional_kernels() is None
    finally:
        optional_kernels.cache_clear()
    assert len(caplog.records) == 1 and "scaled on the CPU" in caplog.text
