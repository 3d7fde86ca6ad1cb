"""Bench records: one measurement each, as `results/<gpu>/<model>/bench.json` lists them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.gpu import current_gpu, driver_version
from runtime.tensorrt_loader import TensorRTError, load_tensorrt, load_tensorrt_rtx

PARTS = ("encoder", "decoder", "end_to_end", "page")
VARIANTS = (
    *("stock", "stock_naive", "fused", "fused_steps", "fused_e4m3"),
    *("torch", "compile", "onnxruntime", "tensorrt_rtx"),
)
# Fields that older records do not have.
OPTIONAL = {
    *("num_beams", "lines", "page_s"),
    *("matrix_tflops", "of_matrix_rate", "copy_gb_per_s", "floor_us", "of_floor"),
}
ROOT = Path(__file__).resolve().parent.parent


class RecordError(ValueError):
    """A file that does not hold bench records; the message names the file and the value."""


@dataclass(frozen=True)
class Environment:
    """Where and with what a measurement was made. What is not there is None."""

    command: str
    commit: str | None
    date: str
    gpu: str | None
    driver: str | None
    cuda: str | None
    tensorrt: str | None


@dataclass(frozen=True)
class Record(Environment):
    """One measurement.

    Attributes:
        part: of PARTS. "decoder" is all decode steps, "end_to_end" is pixel values on the device to token ids
            on the host, "page" is images in memory to text.
        batch: images a batch.
        num_beams: of beam search; 1 is greedy.
        lines: of a page.
        page_s: median seconds for all lines of a page.
        tokens: decode steps a line; None for the encoder, and for a page, whose lines end where their text
            does.
        variant: of VARIANTS.
        median_ms, p99_ms: of one batch; of a page, of all its lines.
        lines_per_s: from the median.
        us_per_token: of one decode step of the batch; "end_to_end" shares out the encoder's time as well.
        images_per_s, tflops: "encoder" only; operations as counted in `encoder_flops`.
        matrix_tflops: TFLOP/s of a large matrix product in `precision`, measured in the same run ("encoder"
            only; `rates.matrix_rate`).
        of_matrix_rate: tflops / matrix_tflops.
        copy_gb_per_s: GB/s, read and written, of a large copy, measured in the same run ("decoder" and
            "end_to_end", greedy only; `rates.copy_rate`).
        floor_us: the byte floor of a decode step, its bytes (`rates.decoder_bytes`) at that bandwidth;
            "fused_e4m3" reads keys and values of one byte. Beam search has none: how many bytes its beams
            share is known only once they are found.
        of_floor: floor_us / us_per_token; of "end_to_end", whose encoder is not in the floor, the share of
            the whole time that decoding would take at its floor.
        rel_error: max |x - y| / max |y| against PyTorch in float32 ("encoder" only).
        same_tokens: share of the token ids that PyTorch in float32 chooses as well.
    """

    part: str
    model: str
    batch: int
    tokens: int | None
    precision: str
    variant: str
    median_ms: float
    p99_ms: float
    lines_per_s: float
    us_per_token: float | None = None
    images_per_s: float | None = None
    tflops: float | None = None
    matrix_tflops: float | None = None
    of_matrix_rate: float | None = None
    copy_gb_per_s: float | None = None
    floor_us: float | None = None
    of_floor: float | None = None
    rel_error: float | None = None
    same_tokens: float | None = None
    num_beams: int = 1
    lines: int | None = None
    page_s: float | None = None


def usual_tokens(records: Sequence[Record]) -> int | None:
    """The number of tokens that most records have; None for the encoder."""
    counts = [record.tokens for record in records]
    return max(dict.fromkeys(counts), key=counts.count, default=None)


def environment(command: str, rtx: bool = False) -> Environment:
    """This machine, now; with `rtx`, TensorRT-RTX in place of TensorRT, which it does not go with."""
    gpu = current_gpu()
    try:
        tensorrt = (load_tensorrt_rtx if rtx else load_tensorrt)().__version__
    except TensorRTError:
        tensorrt = None
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Environment(
        command, commit(), date, gpu and gpu.name, driver_version(), gpu and gpu.cuda, tensorrt
    )


def commit() -> str | None:
    """The commit that is measured; a copy without a repository gets it from TROCR_COMMIT."""
    if named := os.environ.get("TROCR_COMMIT"):
        return named
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def update(
    path: Path, entries: Iterable[Mapping[str, Any]], names: Sequence[str], order: Sequence | None = None
) -> None:
    """Put entries into the file's list, in place of earlier ones that are the same by their fields `names`.

    `order`: the values of these fields that the list is to have, in this order; else as they came.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    by_fields = {tuple(entry[name] for name in names): entry for entry in (*known, *entries)}
    kept = by_fields if order is None else [fields for fields in order if fields in by_fields]
    text = json.dumps([by_fields[fields] for fields in kept], indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def write(records: Sequence[Record], path: Path) -> None:
    write_text(path, json.dumps([asdict(record) for record in records], indent=1) + "\n")


def merged(old: Sequence[Record], new: Sequence[Record]) -> list[Record]:
    """All of them, part by part; a new one takes the place of an old one of the same case."""
    case = ("part", "model", "variant", "precision", "batch", "tokens", "num_beams", "lines")
    by_case = {tuple(getattr(record, name) for name in case): record for record in (*old, *new)}
    return sorted(by_case.values(), key=lambda record: PARTS.index(record.part))


def read_all(results: Path) -> dict[Path, list[Record]]:
    """The records of every results/<gpu>/<model>/bench.json; raises RecordError as `read` does."""
    return {bench: read(bench) for bench in sorted(results.glob("*/*/bench.json"))}


def latest(measured: Mapping[Path, Sequence[Record]]) -> list[Path]:
    """Of each model's bench.json, as `read_all` gives them, that of the GPU it was measured on last."""
    found: dict[str, tuple[str, Path]] = {}
    for bench, records in measured.items():
        date = max((record.date for record in records), default="")
        found[bench.parent.name] = max(found.get(bench.parent.name, ("", bench)), (date, bench))
    return [bench for _, bench in found.values()]


def read(path: Path) -> list[Record]:
    """Raises RecordError where the file does not hold a list of records."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path}: unreadable ({error}); write it with `python -m runtime.bench --json`"
        ) from None
    known = {field.name for field in fields(Record)}
    for number, entry in enumerate(content):
        if entry.keys() | OPTIONAL != known:
            wrong = ", ".join(sorted(known ^ (entry.keys() | OPTIONAL)))
            raise RecordError(f"{path}: record {number}: fields missing or unknown: {wrong}")
        if entry["part"] not in PARTS or entry["variant"] not in VARIANTS:
            raise RecordError(
                f"{path}: record {number}: part {entry['part']!r}, variant {entry['variant']!r}"
            )
    return [Record(**entry) for entry in content]
