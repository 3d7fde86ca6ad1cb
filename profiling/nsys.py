"""Tables of a timeline: how long each stage took on the host, and what the GPU did for it.

    nsys profile -t nvtx,cuda --cuda-graph-trace=node -o rec python runtime/bench.py
    nsys export --type sqlite rec.nsys-rep
    python -m profiling.nsys rec.sqlite --json FILE

    python -m profiling.nsys --cupti --model bundled --batch-size 16

The second form is for machines without nsys (or with one that cannot write SQLite): it reads the bundled
sample lines under torch.profiler, which takes the same ranges, though only those of the main thread, and from
CUPTI the same kernels. TensorRT's ranges of single layers are in recordings of nsys only, made with
`runtime/bench.py --no-cuda-graphs`.

GPU time of a range is that of the kernels, copies and graphs that were launched on its thread within it.
"""

from __future__ import annotations

import argparse
import bisect
import json
import re
import sqlite3
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from runtime.ranges import DOMAIN

PUSH_POP, START_END, DOMAIN_CREATE = 59, 60, 75  # NVTX_EVENTS.eventType
MOST_KERNELS = 20


class RecordingError(RuntimeError):
    """A recording without what the tables need; the message names the file, and what to do."""


@dataclass(frozen=True)
class Range:
    """domain: "trocr", "TensorRT", ...; times in nanoseconds; payload None where there is none."""

    domain: str
    name: str
    thread: int
    begin: int
    end: int
    payload: int | None = None


@dataclass(frozen=True)
class GpuWork:
    """A kernel, a copy or a whole graph, and from where it was launched; times in nanoseconds."""

    name: str
    duration: int
    thread: int | None
    launched: int | None


@dataclass
class Recording:
    """source: which tool recorded."""

    source: str
    ranges: list[Range]
    work: list[GpuWork] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """All ranges of one name; milliseconds.

    host_*: from begin to end on the host. gpu_*: of the work launched within; None where nothing of a GPU
    was recorded.
    """

    domain: str
    name: str
    batch: int | None
    count: int
    host_total: float
    host_median: float
    host_p99: float
    gpu_total: float | None
    gpu_median: float | None
    launches: int


def read_nsys(path: Path) -> Recording:
    """A recording that `nsys export --type sqlite` wrote.

    Raises:
        RecordingError: no such file, no SQLite, or no ranges in it.
    """
    if not path.is_file():
        raise RecordingError(f"{path}: not found; write it: nsys export --type sqlite RECORDING.nsys-rep")
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "NVTX_EVENTS" not in tables:
            raise RecordingError(f"{path}: no NVTX ranges; record with nsys profile -t nvtx,cuda")
        version = (
            dict(database.execute("SELECT name, value FROM META_DATA_EXPORT"))
            if "META_DATA_EXPORT" in tables
            else {}
        )
        recording = Recording(
            f"nsys {version.get('EXPORT_PRODUCT_VERSION', '')}".strip(), _nsys_ranges(database)
        )
        recording.work = _nsys_work(database, tables)
    except sqlite3.Error as error:
        raise RecordingError(
            f"{path}: {error}; write it: nsys export --type sqlite RECORDING.nsys-rep"
        ) from None
    finally:
        if "database" in locals():
            database.close()
    if not recording.ranges:
        raise RecordingError(
            f"{path}: no NVTX ranges, only domains: this nsys is too old for the installed nvtx; "
            "see docs/bugs/nvtx-ranges-lost"
        )
    return recording


def _nsys_ranges(database: sqlite3.Connection) -> list[Range]:
    # A message is in the event, or registered; domains are told apart within a process by number.
    rows = database.execute(
        "SELECT eventType, coalesce(text, value), domainId, globalTid, start, end, int64Value, uint64Value, "
        "int32Value, uint32Value FROM NVTX_EVENTS LEFT JOIN StringIds ON StringIds.id = textId ORDER BY start"
    ).fetchall()
    process = {(_process(row[3]), row[2]): row[1] for row in rows if row[0] == DOMAIN_CREATE}
    ranges = []
    for kind, name, domain, thread, begin, end, *payloads in rows:
        if kind in (PUSH_POP, START_END) and end is not None:
            payload = next((value for value in payloads if value is not None), None)
            ranges.append(
                Range(process.get((_process(thread), domain), ""), name or "", thread, begin, end, payload)
            )
    return ranges


def _process(global_thread: int) -> int:
    return global_thread >> 24  # the lower 24 bits are the thread


def _nsys_work(database: sqlite3.Connection, tables: set[str]) -> list[GpuWork]:
    launches = {}
    if "CUPTI_ACTIVITY_KIND_RUNTIME" in tables:
        rows = database.execute("SELECT correlationId, globalTid, start FROM CUPTI_ACTIVITY_KIND_RUNTIME")
        launches = {(_process(thread), correlation): (thread, start) for correlation, thread, start in rows}
    strings = dict(database.execute("SELECT id, value FROM StringIds"))
    work = []
    for table, column in (
        ("CUPTI_ACTIVITY_KIND_KERNEL", "shortName"),
        ("CUPTI_ACTIVITY_KIND_MEMCPY", "'copy'"),
        ("CUPTI_ACTIVITY_KIND_MEMSET", "'set'"),
        ("CUPTI_ACTIVITY_KIND_GRAPH_TRACE", "'CUDA graph'"),
    ):
        if table not in tables:
            continue
        query = f"SELECT {column}, start, end, correlationId, globalPid FROM {table}"
        for name, begin, end, correlation, pid in database.execute(query):
            thread, launched = launches.get((_process(pid), correlation), (None, None))
            work.append(GpuWork(strings.get(name, name), end - begin, thread, launched))
    return work


def read_trace(path: Path) -> Recording:
    """A Chrome trace that torch.profiler wrote: our ranges, and CUPTI's kernels, copies and sets."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError) as error:
        raise RecordingError(
            f"{path}: no trace of torch.profiler ({error}); record it with --cupti"
        ) from None
    recording, launches = Recording("CUPTI through torch.profiler", []), {}
    prefix = f"{DOMAIN}: "
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind == "user_annotation" and name.startswith(prefix):
            begin, message = round(1e3 * event["ts"]), name.removeprefix(prefix)
            batch = re.search(r"\[(\d+)", message)
            end = begin + round(1e3 * event["dur"])
            recording.ranges.append(
                Range(DOMAIN, message, event["tid"], begin, end, int(batch[1]) if batch else None)
            )
        elif kind in ("cuda_runtime", "cuda_driver"):
            launches[event["args"].get("correlation")] = event["tid"], round(1e3 * event["ts"])
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            thread, launched = launches.get(event["args"].get("correlation"), (None, None))
            recording.work.append(GpuWork(event["name"], round(1e3 * event["dur"]), thread, launched))
    if not recording.ranges:
        raise RecordingError(f"{path}: none of our ranges is in this trace; record it with --cupti")
    return recording


def rows(recording: Recording, domain: str | None = None) -> list[Row]:
    """A row a name, in the order of first appearance; of one domain, or of all."""
    by_thread: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for work in recording.work:
        if work.thread is not None:
            by_thread[work.thread].append((work.launched, work.duration))
    for launches in by_thread.values():
        launches.sort()
    grouped: dict[tuple[str, str, int | None], list[Range]] = defaultdict(list)
    for entry in sorted(recording.ranges, key=lambda entry: entry.begin):
        if domain in (None, entry.domain):
            grouped[entry.domain, entry.name, entry.payload].append(entry)
    return [_row(*key, entries, by_thread, bool(recording.work)) for key, entries in grouped.items()]


def _row(
    domain: str, name: str, payload: int | None, entries: Sequence[Range], by_thread, with_gpu: bool
) -> Row:
    host = sorted((entry.end - entry.begin) / 1e6 for entry in entries)
    gpu, count = [], 0
    for entry in entries:
        launches = by_thread.get(entry.thread, [])
        inside = launches[
            bisect.bisect_left(launches, (entry.begin, 0)) : bisect.bisect_left(launches, (entry.end, 0))
        ]
        gpu.append(sum(duration for _, duration in inside) / 1e6)
        count += len(inside)
    p99 = host[min(len(host) - 1, int(0.99 * len(host)))]
    totals = (sum(gpu), statistics.median(gpu)) if with_gpu else (None, None)
    return Row(domain, name, payload, len(host), sum(host), statistics.median(host), p99, *totals, count)


def kernels(recording: Recording) -> list[dict[str, Any]]:
    """The GPU's work by name, longest in total first; milliseconds."""
    found: dict[str, list[int]] = defaultdict(list)
    for work in recording.work:
        found[work.name].append(work.duration)
    table = [
        {
            "name": name,
            "count": len(times),
            "total": sum(times) / 1e6,
            "median": statistics.median(times) / 1e6,
        }
        for name, times in found.items()
    ]
    return sorted(table, key=lambda entry: -entry["total"])


def markdown(recording: Recording) -> str:
    """The ranges, domain by domain, and the longest kernels."""
    text = [f"Recorded by {recording.source}. Milliseconds.", ""]
    found = rows(recording)
    if not recording.work:
        text += ["Nothing of a GPU was recorded.", ""]
    header = ["range", "batch", "count", "host total", "median", "p99", "GPU total", "median", "launches"]
    for domain in dict.fromkeys(row.domain for row in found):
        table = [
            [row.name, row.batch, row.count]
            + [_ms(value) for value in (row.host_total, row.host_median, row.host_p99)]
            + [_ms(row.gpu_total), _ms(row.gpu_median), row.launches]
            for row in found
            if row.domain == domain
        ]
        text += [
            f"## {domain or 'no domain'}",
            "",
            tabulate(table, header, tablefmt="github", missingval="-"),
            "",
        ]
    if recording.work:
        table = [[k["name"][:100], k["count"], _ms(k["total"]), _ms(k["median"])] for k in kernels(recording)]
        text += [
            "## GPU",
            "",
            tabulate(table[:MOST_KERNELS], ["work", "count", "total", "median"], tablefmt="github"),
        ]
    return "\n".join(text)


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def record_with_cupti(
    model: str, backend: str, batch_size: int | None, images: Sequence[Path], trace: Path
) -> None:
    """Read the images under torch.profiler, warmed up, and write its trace."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from runtime.recognizer import Recognizer

    recognizer = Recognizer(model, backend=backend, batch_size=batch_size)
    recognizer.recognize(images)  # graphs are captured
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=activities) as profiler:
        recognizer.recognize(images)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))


def main(arguments: Sequence[str] | None = None) -> int:
    from graph_surgery.checkpoint import CheckpointError
    from profiling.models import find_model
    from profiling.records import ROOT, write_text
    from runtime.backends.base import BackendError

    parser = argparse.ArgumentParser(
        description="Tables of an nsys recording, or of one made with CUPTI here."
    )
    parser.add_argument("recording", type=Path, nargs="?", help="what nsys export --type sqlite wrote")
    parser.add_argument(
        "--cupti", action="store_true", help="record the sample lines here, with torch.profiler"
    )
    parser.add_argument(
        "--model", default="bundled", help="of --cupti: bundled, a checkpoint or an engine folder"
    )
    parser.add_argument("--backend", default="auto", help="of --cupti: auto, tensorrt, onnxruntime or torch")
    parser.add_argument("--batch-size", type=int, help="of --cupti")
    parser.add_argument("--json", type=Path, help="write the tables to this file")
    options = parser.parse_args(arguments)
    if options.cupti == (options.recording is not None):
        parser.error("give a recording, or --cupti to make one")
    try:
        if options.cupti:
            with tempfile.TemporaryDirectory() as scratch:
                trace = Path(scratch) / "trace.json"
                images = sorted((ROOT / "samples").glob("*.jpg"))
                record_with_cupti(
                    str(find_model(options.model)), options.backend, options.batch_size, images, trace
                )
                recording = read_trace(trace)
        else:
            recording = read_nsys(options.recording)
    except (BackendError, CheckpointError, RecordingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(recording))
    if options.json:
        tables = {"source": recording.source, "ranges": [asdict(row) for row in rows(recording)]}
        write_text(options.json, json.dumps(tables | {"gpu": kernels(recording)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
