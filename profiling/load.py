"""Latency under load: lines arrive at random moments, as from independent users, and wait for a batch.

    python -m profiling.load --engines engines/X-fp16-fused --batch-size 64 --json FILE
    python -m profiling.load --backend onnxruntime --batch-size 8

First the capacity is measured: lines a second in full batches, all lines at hand. Then lines arrive as a
Poisson process at 50, 80 and 95 % of it, whether or not the earlier ones are done (an open loop). Whenever
the recognizer is free it takes what waits, up to the batch size: the largest power of two of lines, so that
few batch sizes have to be prepared. A line's latency is from its arrival to its text, image file included.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from build import BuildError
from graph_surgery.checkpoint import CheckpointError
from graph_surgery.fused_ops import SurgeryError
from profiling.models import find_model
from profiling.records import ROOT, environment, write_text
from runtime.backends.base import BackendError
from runtime.generation import GenerationError
from runtime.manifest import ManifestError
from runtime.recognizer import Recognizer

CAPACITY_BATCHES = 4
LEAST_LINES = 20  # below that a percentile says nothing


@dataclass(frozen=True)
class Load:
    """What one arrival rate led to.

    Attributes:
        load: share of the capacity.
        offered_lines_per_s: the arrivals' rate.
        lines_per_s: from the first arrival to the last text.
        p50_ms, p95_ms, p99_ms: of the lines' latencies.
        mean_batch: lines a batch.
        lines: how many were read.
    """

    load: float
    offered_lines_per_s: float
    lines_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    mean_batch: float
    lines: int


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Moments of a Poisson process of `rate` a second, in [0, seconds): the same for the same arguments."""
    generator, moments = random.Random(seed), []
    moment = generator.expovariate(rate)
    while moment < seconds:
        moments.append(moment)
        moment += generator.expovariate(rate)
    return moments


def serve(
    recognize: Callable[[int], None],
    moments: Sequence[float],
    batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[float], list[int]]:
    """Serve arrivals in their order, in batches of what waits.

    Args:
        recognize: reads so many lines; returns when their texts are there.
        moments: of the arrivals, in seconds from the beginning, ascending.

    Returns:
        The latency of every line in seconds, and the batches' sizes.
    """
    coming, waiting = deque(moments), deque()
    latencies, batches = [], []
    begin = clock()
    while coming or waiting:
        now = clock() - begin
        while coming and coming[0] <= now:
            waiting.append(coming.popleft())
        if not waiting:
            sleep(coming[0] - now)
            continue
        size = 1 << (min(len(waiting), batch_size).bit_length() - 1)
        recognize(size)
        now = clock() - begin
        latencies += [now - waiting.popleft() for _ in range(size)]
        batches.append(size)
    return latencies, batches


def measure(
    recognizer: Recognizer, images: Sequence[Path], loads: Sequence[float], seconds: float
) -> tuple[float, list[Load]]:
    """The capacity in lines a second, and what each load led to.

    Args:
        images: are read over and over.
        loads: shares of the capacity.
        seconds: of arrivals, a load.
    """
    lines: Iterator[Path] = cycle(images)

    def recognize(size: int) -> None:
        recognizer.recognize(list(islice(lines, size)))

    size = 1
    while size <= recognizer.batch_size:  # engines warm up, graphs are captured
        recognize(size)
        recognize(size)
        largest, size = size, 2 * size
    begin = time.perf_counter()
    for _ in range(CAPACITY_BATCHES):
        recognize(largest)
    capacity = CAPACITY_BATCHES * largest / (time.perf_counter() - begin)

    results = []
    for load in loads:
        moments = arrivals(load * capacity, max(seconds, LEAST_LINES / (load * capacity)))
        begin = time.perf_counter()
        latencies, batches = serve(recognize, moments, largest)
        took = time.perf_counter() - begin - moments[0]
        p50, p95, p99 = 1e3 * np.percentile(latencies, (50, 95, 99))
        rate = len(latencies) / took
        mean_batch = len(latencies) / len(batches)
        results.append(
            Load(load, load * capacity, rate, float(p50), float(p95), float(p99), mean_batch, len(latencies))
        )
    return capacity, results


def table(capacity: float, results: Sequence[Load]) -> str:
    header = ["load", "offered lines/s", "lines/s", "p50 ms", "p95 ms", "p99 ms", "lines a batch", "lines"]
    rows = [
        [f"{r.load:.0%}", f"{r.offered_lines_per_s:.1f}", f"{r.lines_per_s:.1f}"]
        + [f"{ms:.1f}" for ms in (r.p50_ms, r.p95_ms, r.p99_ms)]
        + [f"{r.mean_batch:.1f}", r.lines]
        for r in results
    ]
    body = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=["right"] * len(header))
    return f"Capacity, full batches: {capacity:.1f} lines/s.\n\n{body}"


def main(arguments: Sequence[str] | None = None) -> int:
    def shares(text: str) -> list[float]:
        try:
            found = [float(part) / 100 for part in text.split(",")]
        except ValueError:
            found = [0.0]
        if min(found) <= 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of per cents above 0, such as 50,80,95")
        return found

    parser = argparse.ArgumentParser(description="Latency of lines that arrive at random moments.")
    parser.add_argument("--model", default="bundled", help="bundled, a checkpoint or an engine folder")
    parser.add_argument("--engines", type=Path, help="engine folder (default: where build.py puts it)")
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, onnxruntime or torch")
    parser.add_argument("--batch-size", type=int, help="the most lines a batch")
    parser.add_argument("--loads", type=shares, default=[0.5, 0.8, 0.95], help="per cent (default: 50,80,95)")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of arrivals, a load (default: %(default)s)"
    )
    parser.add_argument("--images", type=Path, default=ROOT / "samples", help="folder (default: samples)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "profiling.load", *(arguments or sys.argv[1:])])
    images = sorted(options.images.glob("*.jpg"))
    if not images or options.seconds <= 0:
        print(f"error: {options.images} holds no *.jpg, or --seconds is not above 0", file=sys.stderr)
        return 2
    unusable = (BackendError, BuildError, CheckpointError, GenerationError, ManifestError, SurgeryError)
    try:
        recognizer = Recognizer(
            find_model(options.model), options.backend, engines=options.engines, batch_size=options.batch_size
        )
    except unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    capacity, results = measure(recognizer, images, options.loads, options.seconds)
    print(f"{recognizer.spec.name}, {recognizer.backend_choice}, batches up to {recognizer.batch_size}")
    print(table(capacity, results))
    if options.json:
        content: dict[str, Any] = {
            "model": recognizer.spec.name,
            "backend": recognizer.backend.name,
            "engines": str(options.engines) if options.engines else None,
            "batch_size": recognizer.batch_size,
            "capacity_lines_per_s": capacity,
            "loads": [asdict(result) for result in results],
        }
        write_text(options.json, json.dumps(content | asdict(environment(command)), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
