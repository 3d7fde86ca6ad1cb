"""Scaling images on the GPU (plugins/image_resize) as the checkpoint's image processor does it on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL.Image import Resampling

from runtime.kernels import optional_kernels

FILTERS = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}
SUPPORT = {"bilinear": 1, "bicubic": 2}

# As ResizeSource in plugins/image_resize/kernel.h.
SOURCE = np.dtype(
    [("pixels", "<i8"), ("intermediate", "<i8"), ("weights", "<i8"), ("height", "<i4"), ("width", "<i4")]
)


class DeviceResize:
    """Crops of any size -> the encoder's input, on the GPU.

    Attributes:
        height, width: of the result.
        filter: "bilinear" or "bicubic".
    """

    def __init__(self, kernels: ModuleType, height: int, width: int, filter: str, device: torch.device):
        self.kernels, self.height, self.width, self.filter, self.device = (
            kernels,
            height,
            width,
            filter,
            device,
        )

    @classmethod
    def like(cls, processor: Any, device: torch.device) -> DeviceResize | None:
        """What scales on `device` as the processor does; None where the processor does more, or no GPU."""
        if device.type != "cuda":
            return None
        size, resample = processor.size, FILTERS.get(getattr(processor, "resample", None))
        height, width = getattr(size, "height", None), getattr(size, "width", None)
        crops = bool(getattr(processor, "do_center_crop", False)) or bool(getattr(processor, "do_pad", False))
        if not processor.do_resize or crops or resample is None or not height or not width or width % 4:
            return None
        kernels = optional_kernels()
        return None if kernels is None else cls(kernels, height, width, resample, device)

    def __call__(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 [images, 3, height, width] on the device, of uint8 [H, W, 3] RGB; asynchronous."""
        table = np.zeros(len(images), SOURCE)
        table["height"] = [image.shape[0] for image in images]
        table["width"] = [image.shape[1] for image in images]
        sizes = 3 * table["height"].astype(np.int64) * table["width"]
        table["pixels"] = table.nbytes + np.cumsum(sizes) - sizes
        rows = 3 * table["height"].astype(np.int64) * self.width
        table["intermediate"] = np.cumsum(rows) - rows
        weights = self._table_sizes(table["width"], self.width) + self._table_sizes(
            table["height"], self.height
        )
        table["weights"] = np.cumsum(weights) - weights

        # One transfer: the table, and the images behind it. PyTorch keeps the buffer until it is done.
        packed = torch.empty(int(table.nbytes + sizes.sum()), dtype=torch.uint8, pin_memory=True)
        view = packed.numpy()
        view[: table.nbytes] = table.view(np.uint8)
        for begin, size, image in zip(table["pixels"], sizes, images, strict=True):
            view[begin : begin + size] = image.reshape(-1)
        sources = packed.to(self.device, non_blocking=True)
        tables = torch.empty(int(weights.sum()), dtype=torch.int32, device=self.device)
        intermediate = torch.empty(int(rows.sum()), dtype=torch.uint8, device=self.device)
        shape = (len(images), 3, self.height, self.width)
        scaled = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.kernels.image_resize(
            sources.data_ptr(),
            sources.data_ptr(),
            tables.data_ptr(),
            intermediate.data_ptr(),
            scaled.data_ptr(),
            count=len(images),
            max_height=int(table["height"].max()),
            out_height=self.height,
            out_width=self.width,
            filter=self.filter,
            stream=torch.cuda.current_stream().cuda_stream,
        )
        return scaled

    def _table_sizes(self, sides: np.ndarray, out: int) -> np.ndarray:
        """Elements of the tables of weights, int64 [images], for sides that become `out` pixels."""
        taps = 2 * np.ceil(SUPPORT[self.filter] * np.maximum(sides / out, 1.0)).astype(np.int64) + 1
        return 1 + (1 + taps) * out
