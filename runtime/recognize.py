"""Recognise images of text lines from the command line.

    python -m runtime.recognize --model models/trocr-tiny-printed samples
    python -m runtime.recognize --labels samples/labels.tsv --ignore-case --json result.json 'samples/*.jpg'

Prints image, text and label as they come, and at the end the character error rate and the share of exact
matches (with --labels), lines a second and the backend. Lines a second count reading and scaling the images
and recognising them, not loading the model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from build import PRECISIONS, BuildError
from graph_surgery.checkpoint import CheckpointError
from graph_surgery.fused_ops import SurgeryError
from runtime.backends.base import BackendError
from runtime.backends.choice import NAMES
from runtime.generation import GenerationError, unsupported_settings
from runtime.images import find_images
from runtime.manifest import ManifestError
from runtime.metrics import accuracy
from runtime.recognizer import Recognizer

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "trocr-tiny-printed"


class UsageError(ValueError):
    """The command line names something that cannot be used."""


UNUSABLE = (
    UsageError,
    CheckpointError,
    SurgeryError,
    BuildError,
    ManifestError,
    BackendError,
    GenerationError,
)

SEARCH_OPTIONS = ("num_beams", "length_penalty", "no_repeat_ngram_size", "early_stopping")


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Options named as `generate`'s, with its defaults."""
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beams (default: 1, greedy)")
    parser.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="default: 1.0")
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, metavar="N", help="default: 0, off")
    parser.add_argument(
        "--early-stopping",
        type=lambda text: {"false": False, "true": True}.get(text.lower(), text),
        default=False,
        metavar="true|false|never",
        help="when a line's beam search ends (default: false)",
    )


class Labels:
    """The texts of a TSV file: file, text, and further columns that do not count.

    A file is meant relative to the labels file's folder. An image elsewhere takes the label of its file name,
    if there is one and only one.

    Attributes:
        texts: file, as it stands there -> text.
    """

    def __init__(self, file: Path):
        try:
            # Not splitlines(): it also ends lines at form feeds and the like, which a text may hold.
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: {error}; give a UTF-8 text file: image, tab, text") from error
        self.texts: dict[str, str] = {}
        self._by_path: dict[str, str] = {}
        self._by_name: dict[str, set[str]] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, *columns = line.split("\t")
            if not columns:
                raise UsageError(f"{file}: line {number} is {line!r}; an image, a tab and a text are needed")
            path = os.path.abspath(file.parent / name)
            if self._by_path.setdefault(path, columns[0]) != columns[0]:
                raise UsageError(f"{file}: line {number} gives {name} another text than before; remove one")
            self.texts[name] = columns[0]
            self._by_name.setdefault(os.path.basename(name), set()).add(columns[0])

    def find(self, path: str) -> str | None:
        """The label of the image at `path`, None where there is none."""
        label = self._by_path.get(os.path.abspath(path))
        if label is None:
            candidates = self._by_name.get(os.path.basename(path), set())
            label = next(iter(candidates)) if len(candidates) == 1 else None
        return label


@dataclass
class Record:
    """One line of the JSON's `records`: a `Result` with its label."""

    path: str
    text: str | None
    label: str | None
    error: str | None
    mean_log_prob: float | None = None
    token_ids: list[int] | None = None


def recognize(options: argparse.Namespace) -> int:
    """Do what the command line asks; returns the exit status."""
    images, errors = find_images(options.images)
    if not images:
        raise UsageError("; ".join(errors.values()))
    check_output(options.json)
    labels = Labels(options.labels) if options.labels else None
    found_labels = [labels.find(image) if labels else None for image in images]
    unlabelled = found_labels.count(None)
    if labels and unlabelled:
        warn(f"{unlabelled} of {len(images)} images have no label in {options.labels}")

    recognizer = open_recognizer(options)

    records = [Record(argument, None, None, error) for argument, error in errors.items()]
    for record in records:
        print(f"error: {record.error}", file=sys.stderr)
    table = Table(images, found_labels)
    begin = time.perf_counter()
    with tqdm(total=len(images), unit="line", delay=2, disable=None) as progress:
        for result, label in zip(recognizer.stream(images), found_labels, strict=True):
            record = Record(
                result.path, result.text, label, result.error, result.mean_log_prob, result.token_ids
            )
            records.append(record)
            table.print(record)
            progress.update()
    seconds = time.perf_counter() - begin

    report = summarize(records, seconds, options, recognizer)
    print(closing_line(report, recognizer.backend_choice))
    if options.json:
        write_json(options.json, report)
    return 1 if report["failed"] else 0


def open_recognizer(options: argparse.Namespace) -> Recognizer:
    """The recognizer that `add_recognizer_arguments` describe; says on stderr what it runs on."""
    recognizer = Recognizer(
        options.model,
        backend=options.backend,
        plugins=options.plugins,
        engines=options.engines,
        precision=options.precision,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        e4m3_cross=options.e4m3_cross,
        **{name: getattr(options, name) for name in SEARCH_OPTIONS},
    )
    print(f"backend: {recognizer.backend_choice}", file=sys.stderr)
    for setting in unsupported_settings(recognizer.spec, recognizer.settings):
        warn(f"{recognizer.spec.source}: generation_config.json asks for {setting}, which is ignored")
    return recognizer


class Table:
    """Prints rows of image, text and label in columns; errors go to stderr."""

    def __init__(self, images: Sequence[str], labels: Sequence[str | None]):
        known = [label for label in labels if label is not None]
        self._with_labels = bool(known)
        self._widths = max(map(len, images)), max(map(len, known), default=0)
        self._row("image", "text", "label")

    def print(self, record: Record) -> None:
        if record.error is None:
            self._row(record.path, record.text, record.label or "")
        else:
            tqdm.write(f"error: {record.error}", file=sys.stderr)

    def _row(self, image: str, text: str, label: str) -> None:
        columns = [image.ljust(self._widths[0]), text]
        if self._with_labels:
            columns[1:] = [text.ljust(self._widths[1]), label]
        tqdm.write("  ".join(columns).rstrip())


def summarize(
    records: Sequence[Record], seconds: float, options: argparse.Namespace, recognizer: Recognizer
) -> dict:
    """The content of the JSON file."""
    read = [record for record in records if record.error is None]
    labelled = [record for record in read if record.label is not None]
    score = accuracy(
        [record.label for record in labelled], [record.text for record in labelled], options.ignore_case
    )
    return {
        "model": options.model,
        "backend": recognizer.backend.name,
        "batch_size": recognizer.batch_size,
        "ignore_case": options.ignore_case,
        "lines": len(read),
        "failed": len(records) - len(read),
        "labelled_lines": len(labelled),
        "cer": score and score.cer,
        "wer": score and score.wer,
        "exact_match": score and score.exact_match,
        "lines_per_s": len(read) / seconds,
        "records": [asdict(record) for record in records],
    }


def closing_line(report: dict, backend: str) -> str:
    parts = []
    if report["labelled_lines"]:
        case = " (case ignored)" if report["ignore_case"] else ""
        parts += [f"CER {report['cer']:.2%}", f"exact match {report['exact_match']:.2%}{case}"]
    parts += [f"{report['lines']} lines", f"{report['lines_per_s']:.1f} lines/s", f"backend {backend}"]
    if report["failed"]:
        parts.append(f"{report['failed']} failed")
    return ", ".join(parts)


def check_output(file: Path | None) -> None:
    """Refuse a file that could not be written, before the work is done."""
    if file and not file.absolute().parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}; make it first")
    if file and file.is_dir():
        raise UsageError(f"{file}: a folder; name the file to write")
    if file and file.exists() and (not file.is_file() or _is_own_output(file)):  # it would be replaced
        raise UsageError(f"{file}: a device, a pipe or where this prints to; name a file to write")
    if file:
        partial = _partial(file)
        try:
            partial.touch()
            partial.unlink()
        except OSError as error:
            raise _unwritable(file, error) from error


def _is_own_output(file: Path) -> bool:
    """Whether stdout or stderr goes to this file, as to /dev/stdout."""
    for stream in (1, 2):
        with suppress(OSError):  # closed
            if os.path.samestat(file.stat(), os.fstat(stream)):
                return True
    return False


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, content: str) -> None:
    """Write the file whole or not at all; of a link, the file that it leads to."""
    partial = _partial(file)
    try:
        # The name of an image need not be UTF-8: Python has a surrogate for a byte that is not, and its
        # escape \udc.. stands for just that in JSON.
        partial.write_text(content, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, os.path.realpath(file))
    except OSError as error:
        raise _unwritable(file, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(file: Path) -> Path:
    """Where the file is written first, in the same folder."""
    target = Path(os.path.realpath(file))
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def _unwritable(file: Path, error: OSError) -> UsageError:
    return UsageError(f"{file}: cannot be written ({error.strerror}); name a file elsewhere")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def add_recognizer_arguments(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    """The options that choose model, backend and search. Without the default `model`, --model is required."""
    parser.add_argument(
        "--model", default=model, required=model is None, help="checkpoint or engine folder, or hub id"
    )
    parser.add_argument("--engines", type=Path, metavar="DIR", help="engine folder (default: build.py's)")
    parser.add_argument("--backend", choices=NAMES, default="auto")
    parser.add_argument("--plugins", default="fused", help="fused (default), none, or names with commas")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp16 for tensorrt, else fp32")
    parser.add_argument(
        "--e4m3-cross",
        action="store_true",
        help="keys and values of cross-attention rounded to 8-bit floats (e4m3): faster for many lines, not "
        "the same bits",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a batch")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens a line")
    add_search_options(parser)


def run(
    command: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
) -> int:
    """Parse and do; what is unusable is one line on stderr and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A text or a file's name that the terminal has no characters for must not end the run.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command(parser.parse_args(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the output has enough of it, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except (*UNUSABLE, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.recognize",
        description="Read the text of images of text lines.",
        epilog="exit status: 0 all images were read; 1 some were not; 2 wrong use, or something unusable; "
        "130 interrupted",
    )
    parser.add_argument("images", nargs="+", metavar="PATH", help="image file, folder or glob")
    add_recognizer_arguments(parser, model=str(BUNDLED_MODEL))
    parser.add_argument(
        "--labels", type=Path, metavar="TSV", help="image, tab, text; further columns ignored"
    )
    parser.add_argument("--ignore-case", action="store_true", help="compare with the labels in upper case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write accuracy, speed and records")
    return run(recognize, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
