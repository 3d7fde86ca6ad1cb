"""Encoder attention on Hopper beside PyTorch's flash attention: correctness and time in one run.

    python -m profiling.attention_sm90 [--variants] [--batch 1,8,16,64] [--heads 6,12,16] [--path auto]

Ours reads the packed qkv [B, S, 3, H, 64]; PyTorch gets separate contiguous q, k, v [B, H, S, 64]. Times are
medians of CUDA-graph replays; TFLOP/s count 4 S^2 64 a head, the work without padding.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from types import ModuleType

import torch
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.kernels import load_kernels

HEAD_DIM = 64
HOPPER_PATHS = ("hopper2", "hopper3", "divided")
DIVIDED_LENGTH = 640  # the longest sequence of the last
VARIANTS = ("mma", *HOPPER_PATHS, "auto")
# Several inputs in turn, so that they come from memory and not from the 50 MB L2 cache.
ROTATION_BYTES = 256 << 20


@functools.cache
def kernels() -> ModuleType:
    return load_kernels()


def reference(qkv: torch.Tensor) -> torch.Tensor:
    """Context [B, S, H * d] in the dtype of qkv [B, S, 3, H, d], by its definition."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def attend(path: str, qkv: torch.Tensor, context: torch.Tensor) -> None:
    """context [B, S, H * d] of qkv [B, S, 3, H, d] by the path `auto`, `mma`, `hopper` or a variant of it."""
    batch, length, _, heads, head_dim = qkv.shape
    kernels().encoder_attention(
        qkv.data_ptr(),
        context.data_ptr(),
        batch=batch,
        sequence_length=length,
        num_heads=heads,
        head_dim=head_dim,
        dtype=str(qkv.dtype).removeprefix("torch."),
        stream=torch.cuda.current_stream().cuda_stream,
        path=path,
    )


def errors(path: str, qkv: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Largest error against float32, its bound (twice that of PyTorch in this dtype + 1e-5), context."""
    context = torch.full(
        (*qkv.shape[:2], qkv[0, 0, 0].numel()), torch.nan, dtype=qkv.dtype, device=qkv.device
    )
    attend(path, qkv, context)
    exact = reference(qkv.float())
    error = (context.float() - exact).abs().nan_to_num(torch.inf).max().item()
    bound = 2 * (reference(qkv).float() - exact).abs().max().item() + 1e-5
    return error, bound, context


def graph_milliseconds(calls: list, replays: int = 7) -> float:
    """Milliseconds of one call: median over replays of a graph that makes each call in turn, twice."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls * 2:
                call()
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / (2 * len(calls)))
    return statistics.median(times)


def main() -> None:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=integers, default=[1, 8, 16, 64])
    parser.add_argument("--heads", type=integers, default=[6, 12, 16])
    parser.add_argument("--length", type=integers, default=[578])
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--path", default="auto", help="the path to time (default auto)")
    parser.add_argument("--variants", action="store_true", help=f"time {', '.join(VARIANTS)} side by side")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.backends.cuda.matmul.allow_tf32 = False

    rows = []
    paths = VARIANTS if options.variants else (options.path,)
    for length in options.length:
        for heads in options.heads:
            for batch in options.batch:
                torch.manual_seed(length + heads + batch)
                size = batch * length * 3 * heads * HEAD_DIM * 2
                copies = max(2, min(16, ROTATION_BYTES // size))
                inputs = torch.randn(copies, batch, length, 3, heads, HEAD_DIM, dtype=dtype, device="cuda")
                few = inputs[0][: min(batch, 8)].contiguous()
                contexts = torch.empty(copies, batch, length, heads * HEAD_DIM, dtype=dtype, device="cuda")
                apart = [[t.contiguous() for t in x.permute(2, 0, 3, 1, 4)] for x in inputs]
                theirs = graph_milliseconds([functools.partial(flash, *qkv) for qkv in apart])
                tera = 4 * length**2 * HEAD_DIM * heads * batch / 1e9
                row = [length, heads, batch, f"{theirs * 1e3:.1f} ({tera / theirs:.0f})"]
                for path in paths:
                    error, bound, _ = errors(path, few)
                    calls = [
                        functools.partial(attend, path, x, c) for x, c in zip(inputs, contexts, strict=True)
                    ]
                    ours = graph_milliseconds(calls)
                    wrong = "" if error <= bound else f" WRONG {error:.1e} > {bound:.1e}"
                    row.append(f"{ours * 1e3:.1f} ({tera / ours:.0f}){wrong}")
                rows.append(row)
    print(f"us (TFLOP/s), {options.dtype}, {torch.cuda.get_device_name()}")
    print(tabulate(rows, ["S", "H", "B", "flash", *paths]))


if __name__ == "__main__":
    main()
