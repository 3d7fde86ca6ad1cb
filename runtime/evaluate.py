"""Accuracy of a checkpoint on labelled lines, and a page that shows what went wrong.

    python -m runtime.evaluate --model models/trocr-tiny-printed --data data/lines-val.tar --ignore-case \\
        --json build/lines-val.json --html build/lines-val.html
    python -m runtime.evaluate --model DIR --data lines/ --labels lines.tsv

`--data` is a folder of images, with folders in it or not, or a tar file of one. `--labels` is a TSV file
(image, tab, text; further columns ignored) that names the images as they stand in the data; without it,
labels.tsv in the data. Character error rate, word error rate and exact matches come for all lines and by the
label's length; the lines with errors come worst first.
"""

from __future__ import annotations

import argparse
import base64
import io
import lzma
import os
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import jinja2
from tabulate import tabulate
from tqdm import tqdm

from runtime.archive import unpack
from runtime.images import SUFFIXES, load_image
from runtime.metrics import Accuracy, LineErrors, accuracy, by_length, line_errors
from runtime.recognize import (
    Labels,
    UsageError,
    add_recognizer_arguments,
    check_output,
    open_recognizer,
    run,
    warn,
    write_json,
    write_text,
)
from runtime.recognizer import Recognizer

LABELS = "labels.tsv"
TEMPLATE = Path(__file__).with_name("evaluate.html.j2")

# Image types that every browser shows; others are converted.
BROWSER_TYPES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}


@dataclass(frozen=True)
class Line:
    """One labelled line and what was read.

    Attributes:
        image: its name in the data.
        path: the image file.
        text: None where there is an error.
        errors: the comparison; None where there is an error.
        error: why the image could not be read.
    """

    image: str
    path: Path
    label: str
    text: str | None
    mean_log_prob: float | None
    errors: LineErrors | None
    error: str | None


@contextmanager
def open_data(data: Path) -> Iterator[Path]:
    """The folder with the data: `data` itself, or a temporary one with the content of the tar file."""
    if data.is_dir():
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="trocr-lines-") as folder:
        try:
            with tarfile.open(data) as archive:
                unpack(archive, Path(folder))
        except (OSError, tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
            raise UsageError(f"{data}: {reason}; give a folder of images, or a tar file of one") from error
        yield Path(folder)


def labelled_images(folder: Path, labels_file: Path | None, data: Path) -> dict[str, tuple[Path, str]]:
    """Name in the data -> file and label, for every label; whether the file can be read turns out later."""
    file = labels_file or folder / LABELS
    if labels_file is None and not file.is_file():
        raise UsageError(f"{data}: there is no {LABELS} in it; name the file with --labels")
    images = {name: (folder / name, text) for name, text in Labels(file).texts.items()}
    known = {path for path, _ in images.values()}
    found = {path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()}
    if not known & found:
        raise UsageError(
            f"{data}: none of its {len(found)} images has a label in {labels_file or LABELS}, which names "
            f"{len(known)}; the names must be those in the data"
        )
    if unlabelled := len(found - known):
        warn(f"{unlabelled} images of {data} have no label in {labels_file or LABELS}; they are left out")
    return images


def read(
    recognizer: Recognizer, images: dict[str, tuple[Path, str]], data: Path, ignore_case: bool
) -> list[Line]:
    """Recognise and compare all of them, in the order given."""
    lines = []
    with tqdm(total=len(images), unit="line", delay=2, disable=None) as progress:
        results = recognizer.stream(path for path, _ in images.values())
        for (name, (path, label)), result in zip(images.items(), results, strict=True):
            errors = None if result.error else line_errors(label, result.text, ignore_case)
            error = result.error and result.error.replace(str(path), str(data / name), 1)
            lines.append(Line(name, path, label, result.text, result.mean_log_prob, errors, error))
            progress.update()
    return lines


def worst_first(lines: Sequence[Line]) -> list[Line]:
    """Unreadable images, then lines by character error rate, then by edits; else in the order given."""
    return sorted(
        lines,
        key=lambda line: (line.errors is not None, -(line.errors.cer if line.errors else 0), -_edits(line)),
    )


def _edits(line: Line) -> int:
    return line.errors.edits if line.errors else 0


def evaluate(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit status."""
    check_output(options.json)
    check_output(options.html)
    if options.json and options.html and os.path.realpath(options.json) == os.path.realpath(options.html):
        raise UsageError(f"{options.html}: both --json and --html; name two files")
    with open_data(options.data) as folder:
        images = labelled_images(folder, options.labels, options.data)
        recognizer = open_recognizer(options)
        begin = time.perf_counter()
        lines = read(recognizer, images, options.data, options.ignore_case)
        seconds = time.perf_counter() - begin

        report = summarize(lines, seconds, options, recognizer)
        for line in lines:
            if line.error:
                print(f"error: {line.error}", file=sys.stderr)
        print_summary(report, options.worst)
        if options.json:
            write_json(options.json, report)
        if options.html:
            write_text(options.html, page(report, lines))
    return 1 if report["failed"] else 0


def summarize(
    lines: Sequence[Line], seconds: float, options: argparse.Namespace, recognizer: Recognizer
) -> dict:
    """The content of the JSON file: rates as fractions, lengths in characters, worst records first."""
    compared = [line for line in lines if line.errors]
    labels, texts = [line.label for line in compared], [line.text for line in compared]
    score = accuracy(labels, texts, options.ignore_case)
    return {
        "model": options.model,
        "data": str(options.data),
        "backend": recognizer.backend.name,
        "batch_size": recognizer.batch_size,
        "ignore_case": options.ignore_case,
        "lines": len(compared),
        "failed": len(lines) - len(compared),
        "cer": score and score.cer,
        "wer": score and score.wer,
        "exact_match": score and score.exact_match,
        "lines_per_s": len(compared) / seconds,
        "by_length": [
            {"shortest": shortest, "longest": longest, **asdict(found)}
            for shortest, longest, found in by_length(labels, texts, options.ignore_case)
        ],
        "records": [
            {
                "image": line.image,
                "label": line.label,
                "text": line.text,
                "edits": line.errors and line.errors.edits,
                "cer": line.errors and line.errors.cer,
                "mean_log_prob": line.mean_log_prob,
                "error": line.error,
            }
            for line in worst_first(lines)
        ],
    }


def length_rows(report: dict) -> list[tuple[str, Accuracy]]:
    """Class of lengths in words and its accuracy, as table and page show them; all lines last."""
    rows = []
    for entry in report["by_length"]:
        longest = entry["longest"]
        name = f"{entry['shortest']} and more" if longest is None else f"{entry['shortest']} to {longest}"
        rows.append((name, Accuracy(entry["cer"], entry["wer"], entry["exact_match"], entry["lines"])))
    if report["lines"]:
        total = Accuracy(report["cer"], report["wer"], report["exact_match"], report["lines"])
        rows.append(("all", total))
    return rows


def print_summary(report: dict, worst: int) -> None:
    wrong = [record for record in report["records"] if record["edits"]]
    if wrong[:worst]:
        print(
            tabulate(
                [
                    (record["image"], f"{record['cer']:.1%}", record["text"], record["label"])
                    for record in wrong[:worst]
                ],
                headers=("image", "CER", "text", "label"),
                disable_numparse=True,
            ),
            end="\n\n",
        )
    print(
        tabulate(
            [
                (name, found.lines, f"{found.cer:.2%}", f"{found.wer:.2%}", f"{found.exact_match:.2%}")
                for name, found in length_rows(report)
            ],
            headers=("characters", "lines", "CER", "WER", "exact match"),
            colalign=("left", *["right"] * 4),
            disable_numparse=True,
        )
    )
    case = ", case ignored" if report["ignore_case"] else ""
    print(
        f"\n{report['lines']} lines{case}, {report['failed']} failed, {report['lines_per_s']:.1f} lines/s, "
        f"backend {report['backend']}"
    )


def page(report: dict, lines: Sequence[Line]) -> str:
    """A page of HTML that needs nothing else: the figures, and every line with an error with its image."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [
        (line, None if line.error else data_uri(line.path))
        for line in worst_first(lines)
        if line.error or line.errors.edits
    ]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, rows=length_rows(report), shown=shown)


def data_uri(path: Path) -> str:
    """The image as a URI that holds it; the file's own bytes where browsers show them, else what was read."""
    kind = BROWSER_TYPES.get(path.suffix.lower())
    if kind is None:
        buffer = io.BytesIO()
        load_image(path).save(buffer, "PNG")
        kind, content = "png", buffer.getvalue()
    else:
        content = path.read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _count(text: str) -> int:
    """Parse --worst."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.evaluate",
        description="Measure the accuracy of a checkpoint on labelled lines.",
        epilog="exit status: 0 all images were read; 1 some were not; 2 wrong use, or something unusable; "
        "130 interrupted",
    )
    add_recognizer_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="PATH", help="folder or tar file of images"
    )
    parser.add_argument(
        "--labels", type=Path, metavar="TSV", help=f"image, tab, text (default: {LABELS} in the data)"
    )
    parser.add_argument("--ignore-case", action="store_true", help="compare in upper case")
    parser.add_argument(
        "--worst", type=_count, default=10, metavar="N", help="lines with errors to print (10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and records, worst first")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with the images of wrong lines"
    )
    return run(evaluate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
