"""The patch embedding kernel against PyTorch's convolution: correctness and speed on the encoders' shapes.

    python -m profiling.patch_embedding [--models small,base,large] [--batches 1,8,16,64] [--dtype float16]

Needs the module `trocr_kernels` in CMake's build folder (TROCR_BUILD_DIR, by default `build`). Every launch
takes the next of three sets of pixels and outputs, so that large batches come from memory and not from the
cache. PyTorch begins with pixels that are normalised already, the kernel with bytes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graph_surgery.checkpoint import Normalization
from graph_surgery.fused_ops import PATCH_SIZE
from graph_surgery.passes.patch_embedding import fold, pack_weight
from profiling.linear import (
    GUARD_ROWS,
    STATISTICS_WIDTH,
    kernels,
    microseconds,
    name_of,
    partial_statistics,
)
from profiling.rates import matrix_rate

# name -> (special tokens, hidden size); images of 384 x 384
ENCODERS = {"tiny": (2, 192), "small": (2, 384), "base": (1, 768), "large": (1, 1024)}
IMAGE_SIZE = (384, 384)
NORMALIZATION = Normalization(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SETS = 3


@dataclass
class PatchEmbedding:
    """One problem: inputs on the GPU, and references.

    pixels: uint8 [B, 3, height, width]; kernel, conv_bias: T [N, 3, 16, 16] and [N], a convolution of
    normalised pixels; positions: T [S, N], the special tokens complete in its first rows. Outputs y T [B, S,
    N] and statistics float32 [B, S, N / 64, 2], with guard rows behind.
    """

    batch: int
    outputs: int
    special: int
    dtype: torch.dtype
    size: tuple[int, int] = IMAGE_SIZE
    normalization: Normalization = NORMALIZATION
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(self.dtype)

        shape = (self.batch, 3, *self.size)
        self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device="cuda")
        self.kernel = normal(self.outputs, 3, PATCH_SIZE, PATCH_SIZE, scale=(3 * PATCH_SIZE**2) ** -0.5)
        self.conv_bias = normal(self.outputs, scale=0.2)
        self.patches = self.size[0] // PATCH_SIZE * (self.size[1] // PATCH_SIZE)
        self.tokens = self.special + self.patches
        self.positions = normal(self.tokens, self.outputs)
        weight, self.scale, bias = fold(
            self.kernel.double().cpu().numpy(), self.conv_bias.double().cpu().numpy(), self.normalization
        )
        self.weight = torch.from_numpy(pack_weight(weight)).to("cuda", self.dtype)
        self.bias = torch.from_numpy(bias).float().cuda()
        self.rows = self.batch * self.tokens
        self.y = torch.empty(self.rows + GUARD_ROWS, self.outputs, dtype=self.dtype, device="cuda")
        parts = self.outputs // STATISTICS_WIDTH
        self.statistics = torch.empty(self.rows + GUARD_ROWS, parts, 2, device="cuda")
        self.poison()

    def poison(self) -> None:
        self.y.fill_(float("nan"))
        self.statistics.fill_(float("nan"))

    def run(
        self,
        path: str = "auto",
        overlap: bool = False,
        pixels: Tensor | None = None,
        y: Tensor | None = None,
        statistics: bool = True,
    ) -> None:
        """Enqueues the kernel on PyTorch's current stream."""
        kernels.patch_embedding(
            pixels=(self.pixels if pixels is None else pixels).data_ptr(),
            weight=self.weight.data_ptr(),
            bias=self.bias.data_ptr(),
            positions=self.positions.data_ptr(),
            y=(self.y if y is None else y).data_ptr(),
            statistics=self.statistics.data_ptr() if statistics else 0,
            scale=self.scale,
            batch=self.batch,
            height=self.size[0],
            width=self.size[1],
            special_tokens=self.special,
            outputs=self.outputs,
            dtype=name_of(self.dtype),
            overlap_predecessor=overlap,
            path=path,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def pytorch(self, normalised: Tensor) -> Tensor:
        """[B, S, N] from normalised pixels, in their type: convolution, concatenation, addition."""
        dtype = normalised.dtype
        kernel, bias, positions = (t.to(dtype) for t in (self.kernel, self.conv_bias, self.positions))
        patches = F.conv2d(normalised, kernel, bias, stride=PATCH_SIZE).flatten(2).transpose(1, 2)
        zeros = patches.new_zeros(self.batch, self.special, self.outputs)
        return torch.cat([zeros, patches], dim=1) + positions

    def reference(self) -> Tensor:
        """float64 [B, S, N], from normalisation to positions."""

        def of_channels(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device="cuda")[:, None, None]

        normalised = self.pixels.double() * self.normalization.rescale_factor
        normalised = (normalised - of_channels(self.normalization.mean)) / of_channels(self.normalization.std)
        columns = F.unfold(normalised, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)  # [B, P, 768]
        patches = columns @ self.kernel.double().flatten(1).T + self.conv_bias.double()
        y = self.positions.double().repeat(self.batch, 1, 1)
        y[:, self.special :] += patches
        return y

    def errors(self, statistics: bool = True) -> list[str]:
        """What is wrong with the last run's outputs: max|y - ref| <= 2 max|PyTorch - ref| + 1e-5, with
        PyTorch in T on pixels normalised in float32 and rounded to T; nothing outside written, statistics
        those of y."""
        found = []
        reference = self.reference().flatten(0, 1)
        unfused = self.pytorch(self.normalization(self.pixels).to(self.dtype)).flatten(0, 1)
        allowed = 2 * (unfused - reference).abs().max().item() + 1e-5
        y = self.y[: self.rows]
        error = (y - reference).abs()
        wrong = ~(error <= allowed)
        if wrong.any():
            places = wrong.nonzero()
            row, column = places[0].tolist()
            found.append(
                f"{len(places)} of {wrong.numel()} outside {allowed:.2e} "
                f"(max {error.nan_to_num(1e9).max():.3e}); "
                f"first at [{row}, {column}]: {y[row, column]:.5f}, not {reference[row, column]:.5f}; "
                f"rows {places[:, 0].min()} to {places[:, 0].max()}, "
                f"columns {places[:, 1].min()} to {places[:, 1].max()}"
            )
        if not self.y[self.rows :].isnan().all():
            found.append("wrote behind the last row")
        if statistics and not wrong.any():
            expected = partial_statistics(y)
            got = self.statistics[: self.rows]
            close = torch.isclose(got, expected, rtol=1e-4, atol=1e-5)
            if not close.all():
                place = tuple((~close).nonzero()[0].tolist())
                found.append(f"statistics at {place}: {got[place]}, not {expected[place]}")
            if not self.statistics[self.rows :].isnan().all():
                found.append("wrote statistics behind the last row")
        return found

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"B={self.batch} {height}x{width} N={self.outputs} special={self.special} {name_of(self.dtype)}"
        )


def bench(models: list[str], batches: list[int], dtype: torch.dtype) -> bool:
    """Prints one line a size; returns whether all outputs were right."""
    print(
        f"{torch.cuda.get_device_name()}, {name_of(dtype)}: "
        f"8192^3 product {matrix_rate(dtype):.0f} TFLOP/s; times in us, graph replays"
    )
    print(
        f"{'model':6}{'B':>3}{'PyTorch':>9}{'ours':>8}{'overlap':>8}{'mma':>8}{'TFLOP/s':>8}{'GB/s':>7}"
        "   (ours; bytes: pixels read and outputs written once)"
    )
    right = True
    for model in models:
        special, outputs = ENCODERS[model]
        for batch in batches:
            problem = PatchEmbedding(batch, outputs, special, dtype)
            problem.run()
            errors = problem.errors()
            right = right and not errors
            pixels = [problem.pixels, *(torch.randint_like(problem.pixels, 256) for _ in range(SETS - 1))]
            ys = [torch.empty_like(problem.y) for _ in pixels]
            normalised = [NORMALIZATION(p).to(dtype) for p in pixels]

            def time(call: Callable, *sets: list[Tensor]) -> float:
                turns = itertools.cycle(zip(*sets, strict=True))
                return microseconds(lambda: call(*next(turns)))

            def ours(p: Tensor, y: Tensor, problem=problem, **options) -> None:
                problem.run(pixels=p, y=y, **options)

            pytorch = time(problem.pytorch, normalised)
            plain = time(ours, pixels, ys)
            overlap = time(lambda p, y, ours=ours: ours(p, y, overlap=True), pixels, ys)
            mma = time(lambda p, y, ours=ours: ours(p, y, path="mma"), pixels, ys)
            flops = 2 * batch * problem.patches * 3 * PATCH_SIZE**2 * outputs
            size = problem.pixels.numel() + problem.y.numel() * problem.y.element_size()
            print(
                f"{model:6}{batch:3}{pytorch:9.2f}{plain:8.2f}{overlap:8.2f}{mma:8.2f}"
                f"{flops / plain / 1e6:8.0f}{size / plain / 1e3:7.0f}"
                + "".join(f"\n    WRONG: {error}" for error in errors),
                flush=True,
            )
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="small,base,large,tiny")
    parser.add_argument("--batches", default="1,8,16,64")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    right = bench(arguments.models.split(","), batches, getattr(torch, arguments.dtype))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
