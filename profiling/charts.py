"""Charts of the committed results, as SVG, in docs/charts/<gpu>/<model>.

    python -m profiling.charts

They are of bench.json, load.json, tensors/tensors.json and layers/layers.json in results/<gpu>/<model>. A
chart of bench.json is of greedy search, and shows the variants that were measured; one for which nothing was
measured is not drawn. The same records give the same bytes: no dates, no random names.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from profiling.records import ROOT, VARIANTS, Record, RecordError, latest, read_all, usual_tokens

STYLE = {
    "svg.hashsalt": "trocr",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e0e0e0",
    "legend.frameon": False,
}
NAMES = {
    "stock": "TensorRT",
    "stock_naive": "TensorRT, as exported",
    "fused": "TensorRT, fused",
    "fused_steps": "TensorRT, fused, step by step",
    "fused_e4m3": "TensorRT, fused, keys in e4m3",
    "torch": "PyTorch eager",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "tensorrt_rtx": "TensorRT-RTX",
}
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = dict(
    zip(
        VARIANTS,
        ("#666666", "#bbbbbb", "#0072b2", "#56b4e9", "#000000", "#d55e00", "#e69f00", "#009e73", "#cc79a7"),
        strict=True,
    )
)
LINES = ("-", "--", ":", "-.")  # a precision each
MARKERS = dict(zip(VARIANTS, "sdoPX^v<>", strict=True))
PARTS = {"encoder": "Encoder", "decoder": "Decoder, all steps", "end_to_end": "Pixels to token ids"}


@matplotlib.rc_context(STYLE)
def charts(results: Path) -> dict[str, Figure]:
    """File name (with folders) -> chart, of all the records under `results`.

    Raises RecordError for a file that holds something else.
    """
    figures: dict[str, Figure] = {}
    greedy = {
        file: [record for record in records if record.num_beams == 1]
        for file, records in read_all(results).items()
    }
    measured = {file: records for file, records in greedy.items() if records}
    for file, records in measured.items():
        folder = file.parent.relative_to(results).as_posix()
        for part in PARTS:
            of_part = [record for record in records if record.part == part]
            tokens = usual_tokens(of_part)
            over_batch = [record for record in of_part if record.tokens == tokens]
            if over_batch:
                figures[f"{folder}/{part}.svg"] = batch_chart(over_batch)
                if _speedups(over_batch):
                    figures[f"{folder}/{part}-speedup.svg"] = speedup_chart(over_batch)
            if len({record.tokens for record in of_part}) > 1:
                figures[f"{folder}/{part}-tokens.svg"] = tokens_chart(of_part)
    for file in sorted(results.glob("*/*/load.json")):
        figures[f"{file.parent.relative_to(results).as_posix()}/load.svg"] = load_chart(_read(file))
    for file in sorted(results.glob("*/*/tensors/tensors.json")):
        folder = file.parent.parent.relative_to(results).as_posix()
        figures[f"{folder}/tensors.svg"] = tensors_chart(_read(file))
    for file in sorted(results.glob("*/*/layers/layers.json")):
        folder, content = file.parent.parent, _read(file)
        for graph in dict.fromkeys(entry["graph"] for entry in content["comparisons"]):
            entries = [entry for entry in content["comparisons"] if entry["graph"] == graph]
            name = f"{folder.relative_to(results).as_posix()}/{graph}-timeline.svg"
            figures[name] = timeline_chart(entries, folder.name, content["environment"]["gpu"])
    if measured:
        figures["headline.svg"] = headline_chart([measured[file] for file in latest(measured)])
    return figures


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{file}: no JSON ({error}); measure again") from None


def load_chart(content: Mapping[str, Any]) -> Figure:
    """Percentiles of the latency and the throughput, over the load."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(f"Lines that arrive at random: {content['model']} on {content['gpu']}", fontsize=11)
    latency, throughput = figure.subplots(1, 2)
    loads = content["loads"]
    place = range(len(loads))
    labels = [f"{load['load']:.0%}" for load in loads]
    for name, colour in (("p50", "#56b4e9"), ("p95", "#0072b2"), ("p99", "#d55e00")):
        latency.plot(place, [load[f"{name}_ms"] for load in loads], marker="o", label=name, color=colour)
    latency.set_ylabel("ms from arrival to text")
    latency.set_ylim(bottom=0)
    latency.legend()
    drawn = throughput.bar(place, [load["lines_per_s"] for load in loads], 0.6, color="#0072b2")
    throughput.bar_label(drawn, [f"{load['lines_per_s']:,.0f}" for load in loads], fontsize=8)
    throughput.axhline(content["capacity_lines_per_s"], color="black", linewidth=0.8, label="capacity")
    throughput.set_ylim(top=1.2 * content["capacity_lines_per_s"])
    throughput.set_ylabel("lines a second")
    throughput.legend(loc="upper left")
    for axes in (latency, throughput):
        axes.set_xticks(place, labels)
        axes.set_xlabel("arrivals, share of the capacity")
    return figure


def tensors_chart(content: Mapping[str, Any]) -> Figure:
    """The relative error that 99 % of a tensor's elements are below: a line a variant and precision."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle(
        f"Errors against PyTorch fp32: {content['model']} on {content['gpu'] or 'a CPU'}", fontsize=11
    )
    axes = figure.subplots()
    errors = content["errors"]
    tensors = list(dict.fromkeys(error["tensor"] for error in errors))
    precisions = list(dict.fromkeys(error["precision"] for error in errors))
    for precision in precisions:
        for variant in dict.fromkeys(error["variant"] for error in errors):
            points = [e for e in errors if (e["precision"], e["variant"]) == (precision, variant)]
            if points:
                axes.plot(
                    [tensors.index(error["tensor"]) for error in points],
                    [error["relative"]["p99"] for error in points],
                    label=f"{NAMES[variant]} ({precision})",
                    color=COLOURS[variant],
                    linestyle=LINES[precisions.index(precision)],
                )
    axes.set_yscale("log")
    axes.set_ylabel("relative error, p99")
    axes.set_xticks(range(len(tensors)), tensors, rotation=90, fontsize=6)
    axes.legend(fontsize=8)
    return figure


def timeline_chart(entries: Sequence[Mapping[str, Any]], model: str, gpu: str) -> Figure:
    """The layers of stock and fused in the order of execution, coloured by op: a panel a batch size."""
    figure = Figure(figsize=(11, 0.6 + 1.3 * len(entries)), layout="constrained")
    figure.suptitle(f"Layers of the {entries[0]['graph']} one after another: {model} on {gpu}", fontsize=11)
    variants = ("fused", "stock")
    layers = [layer for entry in entries for variant in variants for layer in entry["timelines"][variant]]
    ops = list(dict.fromkeys(layer["op"] for layer in layers if layer["ms"] > 0))
    colours = {op: matplotlib.colormaps["tab20"](i % 20) for i, op in enumerate(ops)}
    for axes, entry in zip(figure.subplots(len(entries), squeeze=False)[:, 0], entries, strict=True):
        for place, variant in enumerate(variants):
            bars: dict[str, list[tuple[float, float]]] = {op: [] for op in ops}
            begin = 0.0
            for layer in entry["timelines"][variant]:
                if layer["ms"] > 0:
                    bars[layer["op"]].append((begin, layer["ms"]))
                begin += layer["ms"]
            for op, spans in bars.items():
                label = op if place == 0 else None
                axes.broken_barh(spans, (place - 0.4, 0.8), color=colours[op], label=label, edgecolor="none")
        axes.set_yticks(range(len(variants)), variants)
        axes.set_ylabel(f"batch {entry['batch']}")
        axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def batch_chart(records: Sequence[Record]) -> Figure:
    """Milliseconds a batch and lines a second, over the batch size."""
    figure = _figure(records, 9, 3.8)
    latency, throughput = figure.subplots(1, 2)
    for (variant, precision), points in _curves(records):
        points.sort(key=lambda record: record.batch)
        batches = [record.batch for record in points]
        style = _style(variant, precision, records)
        latency.plot(batches, [record.median_ms for record in points], **style)
        throughput.plot(batches, [record.lines_per_s for record in points], **style)
    for axes, label in ((latency, "ms a batch"), (throughput, "lines a second")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        batches = sorted({record.batch for record in records})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlabel("batch")
        axes.set_ylabel(label)
    latency.legend()
    return figure


def tokens_chart(records: Sequence[Record]) -> Figure:
    """Milliseconds a batch over the tokens a line: a panel a batch size."""
    by_batch: dict[int, list[Record]] = {}
    for record in records:
        by_batch.setdefault(record.batch, []).append(record)
    panels = {batch: found for batch, found in sorted(by_batch.items()) if len({r.tokens for r in found}) > 1}
    figure = _figure(records, 4.5 * len(panels), 3.8)
    axes_row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (batch, found) in zip(axes_row, panels.items(), strict=True):
        for (variant, precision), points in _curves(found):
            points.sort(key=lambda record: record.tokens)
            x, y = [record.tokens for record in points], [record.median_ms for record in points]
            axes.plot(x, y, **_style(variant, precision, records))
        axes.set_xlabel("tokens a line")
        axes.set_ylabel("ms a batch")
        axes.set_yscale("log")
        axes.set_title(f"batch {batch}")
    figure.legend(*axes_row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def speedup_chart(records: Sequence[Record]) -> Figure:
    """How many times as fast fused is as every other variant, batch by batch."""
    figure = _figure(records, 7, 3.8)
    axes = figure.subplots()
    batches = sorted({record.batch for record in records})
    ratios = _speedups(records)
    others = [variant for variant in VARIANTS if any(name == variant for name, _ in ratios)]
    width = 0.8 / max(1, len(others))
    for number, variant in enumerate(others):
        bars = [(i, ratios[variant, batch]) for i, batch in enumerate(batches) if (variant, batch) in ratios]
        place = [i + (number - (len(others) - 1) / 2) * width for i, _ in bars]
        drawn = axes.bar(
            place, [ratio for _, ratio in bars], width, label=NAMES[variant], color=COLOURS[variant]
        )
        axes.bar_label(drawn, [f"{ratio:.2f}" for _, ratio in bars], fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("fused is so many times as fast as")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def headline_chart(models: Sequence[Sequence[Record]]) -> Figure:
    """Lines a second, a row a model: encoder and end to end at the smallest and largest batch, and a page.

    A page is each variant's at the batch size that suits it best.
    """
    figure = Figure(figsize=(15, 0.8 + 1.7 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), 5, squeeze=False)
    for row, records in zip(grid, models, strict=True):
        row[0].set_ylabel(f"{records[0].model}\n{records[0].gpu.removeprefix('NVIDIA ')}", fontsize=8)
        for axes, part in zip((row[:2], row[2:4]), ("encoder", "end_to_end"), strict=True):
            found = [record for record in records if record.part == part]
            found = [record for record in found if record.tokens == usual_tokens(found)]
            batches = sorted({record.batch for record in found})
            for panel, batch in zip(axes, (batches[:1] + batches[1:][-1:]), strict=False):
                of_batch = [record for record in found if record.batch == batch]
                _headline_panel(panel, of_batch, f"{PARTS[part]},\nbatch {batch}")
        if pages := [record for record in records if record.part == "page"]:
            _headline_panel(row[4], pages, f"A page of {pages[0].lines} lines,\nimages to texts")
    for axes in grid.flat:
        axes.set_visible(axes.has_data())
    figure.suptitle("Lines a second")
    return figure


def _headline_panel(axes, records: Sequence[Record], title: str) -> None:
    """A bar a variant, of its fastest record; where it has several precisions, a bar each."""
    fastest = {
        (record.variant, record.precision): record
        for record in sorted(records, key=lambda record: record.lines_per_s)
    }
    several = {variant for variant in VARIANTS if sum(name == variant for name, _ in fastest) > 1}
    bars = [
        record for variant in reversed(VARIANTS) for record in fastest.values() if record.variant == variant
    ]
    labels = [
        NAMES[record.variant] + (f" ({record.precision})" if record.variant in several else "")
        for record in bars
    ]
    drawn = axes.barh(labels, [r.lines_per_s for r in bars], color=[COLOURS[r.variant] for r in bars])
    axes.bar_label(drawn, [f"{record.lines_per_s:,.0f}" for record in bars], padding=3, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.3)
    axes.grid(visible=False)
    axes.tick_params(labelsize=8)
    axes.set_xticks([])


def _figure(records: Sequence[Record], width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    first = records[0]
    tokens = usual_tokens(records)
    many = len({record.tokens for record in records}) > 1
    steps = "" if tokens is None or many else f", {tokens} tokens a line"
    figure.suptitle(f"{PARTS[first.part]}: {first.model} on {first.gpu}{steps}", fontsize=11)
    return figure


def _curves(records: Sequence[Record]) -> list[tuple[tuple[str, str], list[Record]]]:
    """The records of each variant and precision, in the variants' order."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.variant, record.precision), []).append(record)
    return sorted(found.items(), key=lambda item: (VARIANTS.index(item[0][0]), item[0][1]))


def _style(variant: str, precision: str, records: Sequence[Record]) -> dict[str, object]:
    precisions = sorted({record.precision for record in records})
    line = LINES[precisions.index(precision)]
    label = f"{NAMES[variant]} ({precision})"
    return {"label": label, "color": COLOURS[variant], "marker": MARKERS[variant], "linestyle": line}


def _speedups(records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """(variant, batch) -> its time by fused's, in the precision that fused was measured in."""
    fused = {(record.batch, record.precision): record for record in records if record.variant == "fused"}
    return {
        (record.variant, record.batch): record.median_ms / fused[record.batch, record.precision].median_ms
        for record in records
        if record.variant != "fused" and (record.batch, record.precision) in fused
    }


def numbered(svg: str) -> str:
    """The same picture with ids counted: matplotlib's are hashes, which the last bit of a number changes."""
    ids: dict[str, str] = {}
    return re.sub(r"\b[pm][0-9a-f]{10}\b", lambda match: ids.setdefault(match[0], f"id{len(ids)}"), svg)


@matplotlib.rc_context(STYLE)
def write(figures: dict[str, Figure], out: Path) -> None:
    """Save the charts, and delete those of records that are gone."""
    for name, figure in figures.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        content = io.StringIO()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
        (out / name).write_text(numbered(content.getvalue()), encoding="utf-8")
    for file in out.rglob("*.svg"):
        if file.relative_to(out).as_posix() not in figures:
            file.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the charts of the committed results.")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="default: results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "charts", help="default: docs/charts")
    options = parser.parse_args(arguments)
    try:
        figures = charts(options.results)
    except RecordError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not figures:
        print(f"error: {options.results}: no <gpu>/<model>/bench.json; run `make gpu-check`", file=sys.stderr)
        return 2
    write(figures, options.out)
    for name in sorted(figures):
        print(options.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
