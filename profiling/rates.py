"""What this GPU reaches, measured: a large matrix product, a large copy; and the bytes of a decode step.

`runtime.bench` holds what it measures against these two rates, in the same run on the same GPU, so that a
fraction means the same on any GPU. `profiling.device_decoder` takes `decoder_bytes` from here, and a
bandwidth of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from graph_surgery.checkpoint import DTYPES

TYPES = DTYPES | {"fp8": torch.float8_e4m3fn}  # of the encoder's products, for each `--precision`
E4M3_COMPUTE_CAPABILITY = (8, 9)  # the first that multiplies it
SIZE = 8192  # rows and columns of the matrices
COPIED_BYTES = 2**29  # several times what an L2 cache holds
WARMUPS = 3
LEAST, MOST, MILLISECONDS = 5, 100, 100  # of one measurement


@dataclass(frozen=True)
class Rates:
    """What the GPU reached; None where it was not measured.

    Attributes:
        matrix_tflops: TFLOP/s, as `matrix_rate` measures it, in the precision of the encoder.
        copy_gb_per_s: GB/s, read and written, as `copy_rate` measures it.
    """

    matrix_tflops: float | None = None
    copy_gb_per_s: float | None = None


def measure_rates(precision: str, parts: Collection[str]) -> Rates:
    """The rates that the bench's `parts` are held against, in `precision` (of TYPES); takes some 0.3 s.

    The encoder wants that of products, decoder and end_to_end that of copies. Without a GPU, and where the
    GPU has no products of that type, there is none.
    """
    if not torch.cuda.is_available():
        return Rates()
    dtype = TYPES[precision]
    multiplies = dtype != torch.float8_e4m3fn or torch.cuda.get_device_capability() >= E4M3_COMPUTE_CAPABILITY
    rates = Rates(
        matrix_rate(dtype) if "encoder" in parts and multiplies else None,
        copy_rate() if {"decoder", "end_to_end"} & set(parts) else None,
    )
    torch.cuda.empty_cache()
    return rates


def matrix_rate(dtype: torch.dtype) -> float:
    """TFLOP/s of PyTorch, that is cuBLAS, in an 8192 x 8192 x 8192 product of random values on the GPU."""
    return 2 * SIZE**3 / _milliseconds(product(dtype)) / 1e9


def product(dtype: torch.dtype, size: int = SIZE, device: str = "cuda") -> Callable[[], Tensor]:
    """A function that multiplies random matrices, both `dtype` [size, size].

    Sums are in float32; of e4m3 products, whose result is float16, as the tensor cores keep them, as in the
    kernels of `--precision fp8`.
    """
    is_e4m3 = dtype == torch.float8_e4m3fn
    made = torch.float16 if is_e4m3 else dtype  # PyTorch draws no e4m3
    a, b = (torch.randn(size, size, device=device, dtype=made).to(dtype) for _ in range(2))
    if not is_e4m3:
        return lambda: a @ b.T
    one = torch.ones((), device=device)
    return partial(
        torch._scaled_mm, a, b.T, scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=True
    )


def copy_rate() -> float:
    """GB/s of a copy of 512 MiB from the GPU's memory to the GPU's memory, bytes read plus bytes written."""
    source = torch.randint(256, (COPIED_BYTES,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _milliseconds(lambda: target.copy_(source)) / 1e6


def _milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call among calls in a row, the GPU never idle, as it is while an encoder runs."""
    for _ in range(WARMUPS):
        run()
    once = _times(run, 1)[0]
    return statistics.median(_times(run, max(LEAST, min(MOST, int(MILLISECONDS / once)))))


def _times(run: Callable[[], object], count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def decoder_bytes(
    *,
    layers: int,
    width: int,
    inner: int,
    vocabulary: int,
    source: int,
    lines: int,
    tokens: int,
    itemsize: int = 2,
    cross_itemsize: int | None = None,
) -> float:
    """Bytes that a greedy decode step has to read, the mean of the steps of a text: the byte floor's.

    `itemsize` bytes a number, L layers of `width` D and feed-forward width `inner` F, V tokens in the
    vocabulary, S states of the encoder (`source`), B lines, t = `tokens` / 2 of a text's tokens in the cache:

        itemsize (L (6 D^2 + 2 D F) + V D)   weights of the decoder's products and the head's, once a token
        itemsize B 2 L D (S + t)             of every line keys and values, cross-attention's and the cache's

    Those of cross-attention, the part with S, have `cross_itemsize` bytes a number where that is given.

    6 D^2: query, key, value and output of self-attention, query and output of cross-attention, whose keys
    and values are made once an image. Left out are biases, LayerNorms, the rows of the embeddings, and all
    that is written. It is a floor for decoders that read keys and values; the device decoder may attend to
    the encoder's states instead. And it is one for the GPU's memory: what a cache holds from token to token
    (the L2 cache of an H200 is as large as the small decoder) may be read faster.
    """
    weights = layers * (6 * width**2 + 2 * width * inner) + vocabulary * width
    row = lines * 2 * layers * width  # of keys and values
    cross = row * source * (itemsize if cross_itemsize is None else cross_itemsize)
    return itemsize * (weights + row * tokens / 2) + cross
