"""bench.json and accuracy.json -> tables in Markdown: stock against fused, losing rows too.

    python -m profiling.summary results/nvidia-h200/trocr-tiny-printed
    python -m profiling.summary --readme

The second command puts the headline tables of all results into README.md, between its two marks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from profiling.records import PARTS, ROOT, VARIANTS, Record, RecordError, read

README_BEGIN = "<!-- results: written by python -m profiling.summary --readme -->"
README_END = "<!-- end of results -->"
TITLES = {
    "encoder": "Encoder",
    "decoder": "Decoder",
    "end_to_end": "Pixel values on the device to token ids on the host",
    "page": "Page: images of lines to texts",
}


def summary(
    records: Sequence[Record], accuracies: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]]
) -> str:
    """The whole page. `stages` are the GPU check's: name, status, seconds, reason."""
    where = records[0] if records else None
    lines = [f"# {where.model if where else 'No measurements'}", ""]
    if where:
        lines += [f"{where.gpu}, driver {where.driver}, CUDA {where.cuda}, TensorRT {where.tensorrt}.", ""]
        lines += [f"Commit {where.commit}, {where.date}. Median times in milliseconds, a batch.", ""]
    for part in PARTS:
        if rows := [record for record in records if record.part == part]:
            lines += [f"## {TITLES[part]}", "", part_table(rows), ""]
    if accuracies:
        lines += ["## Accuracy on the labelled lines", "", accuracy_table(accuracies), ""]
    if stages:
        lines += ["## Stages of the check", "", stage_table(stages), ""]
    return "\n".join(lines)


def part_table(records: Sequence[Record]) -> str:
    """A row for each batch size: every variant's time, and how many times faster fused is than stock.

    Beams are a column where there are any. A page's times are seconds for all of its lines.
    """
    variants = [name for name in VARIANTS if any(record.variant == name for record in records)]
    part, tokens = records[0].part, records[0].tokens
    with_beams = any(record.num_beams > 1 for record in records)
    field, unit = ("page_s", "s") if part == "page" else ("median_ms", "ms")
    header = ["precision", "batch"] + ["beams"] * with_beams + ["lines"] * (part == "page")
    header += [*(f"{name} {unit}" for name in variants), "fused against stock"]
    header += ["fused lines/s"] + (["fused us/token"] if part == "decoder" else [])
    header += ["stock TFLOP/s", "fused TFLOP/s"] if part == "encoder" else []
    rows = []
    for key in sorted({_key(record) for record in records}):
        by_variant = {record.variant: record for record in records if _key(record) == key}
        stock, fused = by_variant.get("stock"), by_variant.get("fused")
        precision, batch, beams, lines = key
        row = [precision, batch] + [beams] * with_beams + [lines] * (part == "page")
        row += [_number(by_variant.get(name), field) for name in variants]
        row.append(f"{stock.median_ms / fused.median_ms:.2f}x" if stock and fused else "-")
        row.append(_number(fused, "lines_per_s"))
        if part == "decoder":
            row.append(_number(fused, "us_per_token"))
        if part == "encoder":
            row += [_number(stock, "tflops"), _number(fused, "tflops")]
        rows.append(row)
    table = tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=_align(header))
    table += f"\n\n{tokens} tokens a line." if tokens else ""
    return table + _correctness(records)


def _key(record: Record) -> tuple[str, int, int, int]:
    """What the variants are compared at: precision, batch, beams, lines of a page."""
    return record.precision, record.batch, record.num_beams, record.lines or 0


def accuracy_table(accuracies: Sequence[dict[str, Any]]) -> str:
    header = ["variant", "precision", "lines", "CER", "exact match", "as Hugging Face fp32", "lines/s"]
    rows = [
        [
            entry["variant"],
            entry["precision"],
            entry["lines"],
            f"{entry['cer']:.2%}",
            f"{entry['exact_match']:.2%}",
            f"{entry['identical']:.2%}",
            f"{entry['lines_per_s']:.0f}",
        ]
        for entry in accuracies
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=_align(header))


def stage_table(stages: Sequence[dict[str, Any]]) -> str:
    rows = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["reason"] or ""] for s in stages]
    return tabulate(rows, ["stage", "status", "seconds", "reason"], tablefmt="github", disable_numparse=True)


def _correctness(records: Sequence[Record]) -> str:
    """The worst agreement of each variant with PyTorch in float32."""
    worst = []
    for variant in dict.fromkeys(record.variant for record in records):
        of_variant = [record for record in records if record.variant == variant]
        errors = [record.rel_error for record in of_variant if record.rel_error is not None]
        same = [record.same_tokens for record in of_variant if record.same_tokens is not None]
        worst += [f"{variant} {max(errors):.1e}"] if errors else []
        worst += [f"{variant} {min(same):.1%}"] if same else []
    if not worst:
        return ""
    what = "Largest error relative to" if records[0].part == "encoder" else "Smallest share of tokens as in"
    return f"\n\n{what} PyTorch fp32: {', '.join(worst)}."


def _number(record: Record | None, field: str) -> str:
    """Three significant digits, a dash where there is no measurement."""
    value = record and getattr(record, field)
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _align(header: Sequence[str]) -> list[str]:
    return ["left", *["right"] * (len(header) - 1)]


def summarize(folder: Path) -> str:
    """The summary of a results folder.

    Raises RecordError where its bench.json is not what `runtime.bench` writes.
    """

    def content(name: str, default: Any) -> Any:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default

    bench = folder / "bench.json"
    records = read(bench) if bench.is_file() else []
    stages = content("environment.json", {"stages": []})["stages"]
    return summary(records, content("accuracy.json", []), stages)


def headline(results: Path) -> str:
    """The tables for README.md: of every results folder encoder, whole way, pages and accuracy."""
    lines = []
    for bench in sorted(results.glob("*/*/bench.json")):
        folder, records = bench.parent, read(bench)
        link = folder.relative_to(results.parent).as_posix()
        lines += [f"### {records[0].model} on {records[0].gpu}", ""]
        for part, unit in (("encoder", "ms a batch"), ("end_to_end", "ms a batch"), ("page", "s a page")):
            if rows := [record for record in records if record.part == part]:
                lines += [f"{TITLES[part]}, median {unit}:", "", part_table(rows), ""]
        if (folder / "accuracy.json").is_file():
            accuracies = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
            lines += ["Accuracy on the labelled lines:", "", accuracy_table(accuracies), ""]
        lines += [f"All parts, versions and the command of each figure: [{link}]({link}/summary.md).", ""]
    return "\n".join(lines)


def with_headline(readme: str, results: Path) -> str:
    """README's text with the newest tables between its marks."""
    before, _, rest = readme.partition(README_BEGIN)
    _, _, after = rest.partition(README_END)
    return f"{before}{README_BEGIN}\n\n{headline(results)}\n{README_END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write summary.md of a results folder, or README's tables.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, nargs="?", help="results/<gpu>/<model>")
    what.add_argument("--readme", action="store_true", help="put the headline tables into README.md")
    options = parser.parse_args(arguments)
    try:
        if options.readme:
            readme = ROOT / "README.md"
            text = with_headline(readme.read_text(encoding="utf-8"), ROOT / "results")
            readme.write_text(text, encoding="utf-8")
        else:
            text = summarize(options.folder)
            (options.folder / "summary.md").write_text(text, encoding="utf-8")
            print(text)
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
