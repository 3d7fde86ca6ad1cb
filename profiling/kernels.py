"""Micro-benchmark of the fused kernels against PyTorch, without TensorRT.

    python -m profiling.kernels --out results/kernels.json

Times every op at the shapes of TrOCR small, base and large, checks its result against float64 in the same
run, and prints a table. A time is the median of CUDA-graph replays. A graph walks through copies of the
tensors that together exceed the L2 cache, so that every call reads from memory; at most 64 copies, though:
the few kilobytes of a decode step stay in the cache, as they do in a real model.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from tqdm import tqdm

from profiling.kernel_calls import LAYERNORM_EPSILON, FusedOps, attention, merge_heads, split_qkv

COLUMNS = "op", "model", "batch", "precision", "shape", "fused_us", "torch_us", "speedup", "gb_per_s"
COLUMNS += "tflop_per_s", "correct"


@dataclass(frozen=True)
class Model:
    """The sizes of a TrOCR model that its kernels see."""

    name: str
    tokens: int  # encoder states an image
    encoder_width: int
    encoder_heads: int
    encoder_ffn: int
    decoder_width: int
    decoder_heads: int
    decoder_ffn: int
    activation: str  # of the decoder; the encoder's is gelu


MODELS = (
    Model("small", 578, 384, 6, 1536, 256, 8, 1024, "relu"),
    Model("base", 577, 768, 12, 3072, 1024, 16, 4096, "gelu"),
    Model("large", 577, 1024, 16, 4096, 1024, 16, 4096, "gelu"),
)
CACHE_CAPACITY = 128
CACHED_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One op at one shape: `make` builds a fresh set of tensors, the callables run on such a set."""

    op: str
    shape: str
    flops: int
    bytes: int
    make: Callable[[], dict[str, torch.Tensor]]
    fused: Callable[[dict[str, torch.Tensor]], None]
    torch: Callable[[dict[str, torch.Tensor]], torch.Tensor]
    reference: Callable[[dict[str, torch.Tensor]], torch.Tensor]  # in float64


@dataclass(frozen=True)
class Record:
    """A row of the table. `error` and `torch_error` are the largest differences from float64."""

    op: str
    model: str
    batch: int
    precision: str
    shape: str
    fused_us: float
    torch_us: float
    speedup: float
    gb_per_s: float
    tflop_per_s: float
    error: float
    torch_error: float
    correct: bool


def cases(ops: FusedOps, model: Model, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """The ops at the shapes one encoder pass and one decode step of a batch have."""
    size = dtype.itemsize

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    tokens, width, heads = model.tokens, model.encoder_width, model.encoder_heads
    yield Case(
        op="encoder_attention",
        shape=f"qkv [{batch}, {tokens}, 3, {heads}, {width // heads}]",
        flops=4 * batch * tokens * tokens * width,
        bytes=4 * batch * tokens * width * size,
        make=lambda: {"qkv": random(batch, tokens, 3 * width), "out": random(batch, tokens, width)},
        fused=lambda t: ops.encoder_attention(t["qkv"], t["out"], heads),
        torch=lambda t: merge_heads(F.scaled_dot_product_attention(*split_qkv(t["qkv"], heads))),
        reference=lambda t: merge_heads(attention(*split_qkv(t["qkv"].double(), heads))),
    )

    d_width, d_heads = model.decoder_width, model.decoder_heads
    d_head = d_width // d_heads
    position = CACHED_TOKENS - 1

    def cached(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = split_qkv(t["qkv"], d_heads)
        return (
            query,
            torch.cat((t["key"][:, :, :position], key), dim=2),
            torch.cat((t["value"][:, :, :position], value), dim=2),
        )

    def self_attention(t: dict[str, torch.Tensor]) -> None:
        cache = (t["key"], t["value"])
        ops.decoder_self_attention(t["qkv"], cache, t["position_ids"], t["out"], cache)

    yield Case(
        op="decoder_self_attention",
        shape=f"{CACHED_TOKENS} tokens, cache [{batch}, {d_heads}, {CACHE_CAPACITY}, {d_head}]",
        flops=4 * batch * CACHED_TOKENS * d_width,
        bytes=2 * batch * (CACHED_TOKENS + 3) * d_width * size,
        make=lambda: {
            "qkv": random(batch, 1, 3 * d_width),
            "key": random(batch, d_heads, CACHE_CAPACITY, d_head),
            "value": random(batch, d_heads, CACHE_CAPACITY, d_head),
            "position_ids": torch.full((batch, 1), position, device="cuda"),
            "out": random(batch, 1, d_width),
        },
        fused=self_attention,
        torch=lambda t: merge_heads(F.scaled_dot_product_attention(*cached(t))),
        reference=lambda t: merge_heads(attention(*(x.double() for x in cached(t)))),
    )

    def cross(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return t["query"].view(batch, 1, d_heads, d_head).transpose(1, 2), t["key"], t["value"]

    yield Case(
        op="cross_attention",
        shape=f"keys [{batch}, {d_heads}, {tokens}, {d_head}]",
        flops=4 * batch * tokens * d_width,
        bytes=2 * batch * (tokens + 1) * d_width * size,
        make=lambda: {
            "query": random(batch, 1, d_width),
            "key": random(batch, d_heads, tokens, d_head),
            "value": random(batch, d_heads, tokens, d_head),
            "out": random(batch, 1, d_width),
        },
        fused=lambda t: ops.cross_attention(t["query"], t["key"], t["value"], t["out"]),
        torch=lambda t: merge_heads(F.scaled_dot_product_attention(*cross(t))),
        reference=lambda t: merge_heads(attention(*(x.double() for x in cross(t)))),
    )

    yield Case(
        op="cross_key_value",
        shape=f"[{batch * tokens}, {width}] x [{width}, {2 * d_width}], in heads",
        flops=4 * batch * tokens * width * d_width,
        bytes=batch * tokens * (width + 2 * d_width) * size + 2 * width * d_width * size,
        make=lambda: {
            "x": random(batch, tokens, width),
            "weight": random(2 * d_width, width) * width**-0.5,
            "bias": torch.zeros(2 * d_width, device="cuda"),
            "out": random(2, batch, d_heads, tokens, d_head),
        },
        fused=lambda t: ops.cross_key_value(t["x"], t["weight"], t["bias"], *t["out"]),
        torch=lambda t: _keys_and_values(t["x"], t["weight"], d_heads).contiguous(),
        reference=lambda t: _keys_and_values(t["x"].double(), t["weight"].double(), d_heads),
    )

    for rows, n, ffn, activation in (
        (batch * tokens, width, model.encoder_ffn, "gelu"),
        (batch, d_width, model.decoder_ffn, model.activation),
    ):
        yield _layernorm_case(ops, rows, n, random, size)
        yield _activation_case(ops, rows, ffn, activation, random, size)


def _keys_and_values(x: torch.Tensor, weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[2, B, H, S, d] of x [B, S, K] and weight [2*D, K]."""
    return F.linear(x, weight).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)


def _layernorm_case(
    ops: FusedOps, rows: int, width: int, random: Callable[..., torch.Tensor], size: int
) -> Case:
    def normalise(t: dict[str, torch.Tensor], total: torch.Tensor) -> torch.Tensor:
        gamma, beta = t["gamma"].to(total.dtype), t["beta"].to(total.dtype)
        return F.layer_norm(total, (width,), gamma, beta, LAYERNORM_EPSILON)

    return Case(
        op="residual_layernorm",
        shape=f"[{rows}, {width}], with sum",
        flops=8 * rows * width,
        bytes=4 * rows * width * size,
        make=lambda: {
            "x": random(rows, width),
            "residual": random(rows, width),
            "gamma": random(width),
            "beta": random(width),
            "sum": random(rows, width),
            "out": random(rows, width),
        },
        fused=lambda t: ops.residual_layernorm(
            t["x"], t["residual"], t["gamma"], t["beta"], t["out"], t["sum"]
        ),
        torch=lambda t: normalise(t, t["x"] + t["residual"]),
        reference=lambda t: normalise(t, (t["x"] + t["residual"]).double()),
    )


def _activation_case(
    ops: FusedOps, rows: int, width: int, activation: str, random: Callable[..., torch.Tensor], size: int
) -> Case:
    activate = {"gelu": F.gelu, "relu": F.relu}[activation]
    return Case(
        op=f"bias_activation ({activation})",
        shape=f"[{rows}, {width}]",
        flops=10 * rows * width,
        bytes=2 * rows * width * size,
        make=lambda: {"x": random(rows, width), "bias": random(width), "out": random(rows, width)},
        fused=lambda t: ops.bias_activation(t["x"], t["bias"], t["out"], activation),
        torch=lambda t: activate(t["x"] + t["bias"]),
        reference=lambda t: activate(t["x"].double() + t["bias"].double()),
    )


def time_us(
    run: Callable[[dict[str, torch.Tensor]], object], sets: list[dict[str, torch.Tensor]], replays: int
) -> float:
    """Median microseconds of a call, over `replays` replays of a CUDA graph that calls `run` on every set."""
    calls = max(len(sets), 16)  # a short call needs company: an event's resolution is 0.5 us
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(sets[0])  # loads modules and cuBLAS handles, which capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in range(calls):
            run(sets[call % len(sets)])
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def measure(case: Case, model: Model, batch: int, dtype: torch.dtype, replays: int) -> Record:
    """Checks and times one case."""
    l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
    copies = min(64, max(1, math.ceil(2 * l2_bytes / case.bytes)))
    sets = [case.make() for _ in range(copies)]

    tensors = sets[0]
    tensors["out"].fill_(math.nan)
    case.fused(tensors)
    reference = case.reference(tensors)
    error = (tensors["out"].double() - reference).abs().max().item()
    torch_error = (case.torch(tensors).double() - reference).abs().max().item()
    del reference

    fused_us = time_us(case.fused, sets, replays)
    torch_us = time_us(case.torch, sets, replays)
    return Record(
        op=case.op,
        model=model.name,
        batch=batch,
        precision=str(dtype).removeprefix("torch."),
        shape=case.shape,
        fused_us=round(fused_us, 3),
        torch_us=round(torch_us, 3),
        speedup=round(torch_us / fused_us, 2),
        gb_per_s=round(case.bytes / fused_us / 1e3, 1),
        tflop_per_s=round(case.flops / fused_us / 1e6, 2),
        error=error,
        torch_error=torch_error,
        correct=error <= 2 * torch_error + 1e-5,  # False for NaN too
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    parser.add_argument(
        "--model", nargs="+", choices=[m.name for m in MODELS], default=[m.name for m in MODELS]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16, 64])
    parser.add_argument("--replays", type=int, default=20, help="graph replays a median is taken of")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU; the kernels run on one only", file=sys.stderr)
        return 2
    try:
        ops = FusedOps()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    plan = [
        (case, model, batch, dtype)
        for model in MODELS
        if model.name in arguments.model
        for batch in arguments.batch
        for dtype in (torch.float16, torch.bfloat16)
        for case in cases(ops, model, batch, dtype)
        if dtype is torch.float16 or "attention" in case.op
    ]
    records = [measure(*point, arguments.replays) for point in tqdm(plan, desc="kernels")]

    print(tabulate([[getattr(record, column) for column in COLUMNS] for record in records], headers=COLUMNS))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        lines = [json.dumps(device | asdict(record)) for record in records]
        arguments.out.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    wrong = [record for record in records if not record.correct]
    for record in wrong:
        print(
            f"error: {record.op} {record.shape} {record.precision}: largest error {record.error:.3g}, "
            f"PyTorch's {record.torch_error:.3g}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
