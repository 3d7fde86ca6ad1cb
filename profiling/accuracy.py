"""Reads the labelled lines with engines, and holds the texts against the labels and Hugging Face's own texts.

python -m profiling.accuracy --engines engines/X-fp16-fused --engines engines/X-fp16-none --json accuracy.json
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from build import BuildError
from graph_surgery.checkpoint import CheckpointError
from graph_surgery.fused_ops import SurgeryError
from profiling.records import environment, update
from runtime.archive import unpack
from runtime.backends.base import BackendError
from runtime.generation import GenerationError
from runtime.manifest import Manifest, ManifestError
from runtime.metrics import accuracy
from runtime.recognizer import Recognizer

LINES = Path("data/lines-val.tar")
REFERENCE = Path("data/lines-val.hf-greedy.tsv")
SHOWN_DIFFERENCES = 50
WHAT = ("model", "variant", "backend", "precision")  # an entry is of


class LinesError(RuntimeError):
    """The labelled lines cannot be read; the message names the file and the remedy."""


@contextmanager
def line_images(archive: Path = LINES, most: int | None = None) -> Iterator[list[Path]]:
    """The image files of an archive of lines, in the order of their names, unpacked meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with tarfile.open(archive) as tar:
                images = [member for member in tar if member.name.endswith(".jpg")]
                images.sort(key=lambda image: image.name)
                unpack(tar, Path(folder), images[:most])
        except (OSError, tarfile.TarError) as error:
            raise LinesError(f"{archive}: cannot be unpacked ({error}); fetch the file again") from None
        yield [Path(folder) / image.name for image in images[:most]]


def read_reference(path: Path = REFERENCE) -> dict[str, tuple[str, str]]:
    """File name -> (label, the text that Hugging Face's float32 model reads)."""
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: (label, text) for name, label, text in rows}
    except (OSError, ValueError) as error:
        raise LinesError(f"{path}: not rows of file, label and text ({error}); fetch it again") from None


def compare(
    recognizer: Recognizer, images: Sequence[Path], reference: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """Read the images; labels are compared without regard to case, as the data set's are all upper case.

    Returns:
        lines, cer, exact_match, lines_per_s; identical: the share of lines that read exactly as the
        reference;
        different: the first lines that do not.
    """
    recognizer.recognize(images[: recognizer.batch_size])  # engines warm up, graphs are captured
    begin = time.perf_counter()
    results = recognizer.recognize(images)
    seconds = time.perf_counter() - begin

    texts = [result.text or "" for result in results]
    labels, expected = zip(*(reference[image.name] for image in images), strict=True)
    score = accuracy(labels, texts, ignore_case=True)
    different = [
        {"path": image.name, "text": text, "reference": other, "label": label}
        for image, text, other, label in zip(images, texts, expected, labels, strict=True)
        if text.strip() != other.strip()
    ]
    return asdict(score) | {
        "lines_per_s": len(images) / seconds,
        "identical": 1 - len(different) / len(images),
        "different": different[:SHOWN_DIFFERENCES],
        "failed": sum(result.error is not None for result in results),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Accuracy of engines on the labelled lines.")
    parser.add_argument(
        "--engines", type=Path, action="append", required=True, help="engine folder; repeatable"
    )
    parser.add_argument("--backend", default="tensorrt", choices=("tensorrt", "onnxruntime"))
    parser.add_argument("--lines", type=Path, default=LINES, help="default: %(default)s")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="default: %(default)s")
    parser.add_argument("--most", type=int, help="read only so many lines")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--e4m3-cross", action="store_true", help="keys and values of cross-attention rounded to e4m3"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file, beside others in it")
    options = parser.parse_args(arguments)
    command = shlex.join(["python", "-m", "profiling.accuracy", *(arguments or sys.argv[1:])])
    unusable = (
        LinesError,
        BackendError,
        BuildError,
        CheckpointError,
        GenerationError,
        ManifestError,
        SurgeryError,
    )

    results = []
    try:
        reference = read_reference(options.reference)
        with line_images(options.lines, options.most) as images:
            for folder in options.engines:
                manifest = Manifest.read(folder)
                recognizer = Recognizer(
                    folder,
                    backend=options.backend,
                    batch_size=options.batch_size,
                    e4m3_cross=options.e4m3_cross,
                )
                if options.e4m3_cross and not recognizer.backend.reads_e4m3(recognizer.batch_size):
                    raise BackendError(
                        f"{folder}: searches of {recognizer.batch_size} lines read no e4m3; choose a smaller "
                        "--batch-size, or leave --e4m3-cross out"
                    )
                variant = "fused_e4m3" if options.e4m3_cross else "fused" if manifest.plugins else "stock"
                result = {
                    "model": Path(manifest.model).resolve().name,
                    "variant": variant,
                    "backend": options.backend,
                    "precision": manifest.precision,
                    "batch": recognizer.batch_size,
                    **compare(recognizer, images, reference),
                    **asdict(environment(command)),
                }
                results.append(result)
                print(
                    f"{folder}: {result['lines']} lines, CER {result['cer']:.2%}, "
                    f"exact match {result['exact_match']:.2%}, as Hugging Face {result['identical']:.2%}, "
                    f"{result['lines_per_s']:.1f} lines/s"
                )
                del recognizer
    except unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        update(options.json, results, WHAT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
