"""bench.json and accuracy.json -> tables in Markdown: stock against fused, losing rows too.

    python -m profiling.summary results/nvidia-h200/trocr-tiny-printed
    python -m profiling.summary --readme
    python -m profiling.summary --docs

The second command puts the tables of all results into README.md, between its marks: an overview at the top,
every part below. The third
fills the marked places of the reports (docs/report.md and its translation) and of docs/checkpoints.md:

    <!-- results: encoder nvidia-h200/trocr-small-random -->
    ... written anew ...
    <!-- end of results -->

A place names what it shows (`PLACES`), a folder of results/, for `layers` and `layer` also the graph, the
batch and the index of one of the model's layers, for `kernels` a model and the batch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tabulate as tabulate_module
from tabulate import tabulate

from profiling.records import PARTS, ROOT, VARIANTS, Record, RecordError, latest, read, read_all, usual_tokens

OVERVIEW_BEGIN = "<!-- overview: written by python -m profiling.summary --readme -->"
OVERVIEW_END = "<!-- end of overview -->"
README_BEGIN = "<!-- results: written by python -m profiling.summary --readme -->"
README_END = "<!-- end of results -->"
OVERVIEW_BATCHES = (1, 16, 64)
REPORTS = {"docs/report.md": "en", "docs/report.zh.md": "zh"}  # the same in two languages
PAGES = REPORTS | {"docs/checkpoints.md": "en"}
LAYERS = "layers/layers.json"
MARK = re.compile(r"^<!-- (results: (?P<place>.+)|end of results) -->$", re.MULTILINE)
CHINESE = {
    "precision": "精度",
    "tokens": "词元数",
    "batch": "批大小",
    "beams": "束宽",
    "lines": "行数",
    "variant": "变体",
    "exact match": "完全匹配",
    "as Hugging Face fp32": "与 Hugging Face fp32 相同",
    "lines/s": "行/秒",
    "fused lines/s": "fused 行/秒",
    "fused us/token": "fused 微秒/词元",
    "fused against stock": "fused 相对 stock",
    "engine": "引擎",
    "layers": "层数",
    "sum of layers ms": "各层之和 ms",
    "CUDA graph ms": "CUDA graph ms",
    "profiler us a layer, taken off": "每层扣除的剖析器耗时（微秒）",
    "op": "算子",
    "count": "个数",
    "of it shared": "其中分摊",
    "speedup": "加速比",
    "not attributed": "未归属",
    "other arithmetic": "其他运算",
    "data movement": "数据搬运",
    "total": "合计",
    "decoder": "解码器",
    "attends to": "交叉注意力读取",
    "keys and values": "键和值",
    "states": "编码器状态",
    "us/token": "微秒/词元",
    "byte floor us": "字节下限（微秒）",
    "of the floor": "占下限",
    "fused of the floor": "fused 占下限",
    "stock of matrix rate": "stock 占矩阵乘速率",
    "fused of matrix rate": "fused 占矩阵乘速率",
    "kernel": "核函数",
    "shape": "形状",
    "fused us": "fused 微秒",
    "PyTorch us": "PyTorch 微秒",
    "error": "误差",
    "the stock engine's layers": "stock 引擎的层",
    "PyTorch's error": "PyTorch 的误差",
    "{} tokens a line.": "每行 {} 个词元。",
    "Largest error relative to PyTorch fp32: {}.": "相对 PyTorch fp32 的最大误差：{}。",
    "Smallest share of tokens as in PyTorch fp32: {}.": "与 PyTorch fp32 相同的词元所占的最小比例：{}。",
    "Measured on {gpu}, driver {driver}, CUDA {cuda}, TensorRT {tensorrt}, commit {commit}, {date}.": (
        "测于 {gpu}，驱动 {driver}，CUDA {cuda}，TensorRT {tensorrt}，提交 {commit}，{date}。"
    ),
    "Commands:": "命令：",
    "Not measured yet: `{}` is not there, or does not have it; `{}` writes it.": (
        "尚未测量：`{}` 不存在或没有这一项；由 `{}` 写出。"
    ),
    "load": "负载",
    "offered lines/s": "到达 行/秒",
    "lines a batch": "每批行数",
    "Capacity: {} lines a second, batches up to {}.": "容量：每秒 {} 行，每批至多 {} 行。",
    "encoder's states": "编码器状态",
    "cross keys, values": "交叉注意力的键和值",
    "tensors": "张量数",
}
TITLES = {
    "encoder": "Encoder",
    "decoder": "Decoder",
    "end_to_end": "Pixel values on the device to token ids on the host",
    "page": "Page: images of lines to texts",
}


def summary(
    records: Sequence[Record],
    accuracies: Sequence[dict[str, Any]],
    stages: Sequence[dict[str, Any]],
    unavailable: Sequence[str] = (),
    load: Mapping[str, Any] | None = None,
) -> str:
    """The page. `stages` are the GPU check's: name, status, seconds, reason; `unavailable` are lines."""
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
    if load:
        lines += ["## Under load", "", load_table(load), ""]
    if unavailable:
        lines += ["## Not measured", "", *(f"* {line}" for line in unavailable), ""]
    if stages:
        lines += ["## Stages of the check", "", stage_table(stages), ""]
    return "\n".join(lines)


def part_table(records: Sequence[Record], language: str = "en") -> str:
    """A row for each batch size: every variant's time, and how many times faster fused is than stock.

    Beams are a column where there are any, tokens where there are several; the fractions of the matrix rate
    and of the byte floor where they were measured. A page's times are seconds for all of its lines.
    """
    variants = [name for name in VARIANTS if any(record.variant == name for record in records)]
    part, tokens = records[0].part, records[0].tokens
    with_tokens = len({record.tokens for record in records}) > 1
    with_beams = any(record.num_beams > 1 for record in records)
    with_floor = part == "decoder" and any(record.of_floor is not None for record in records)
    with_rate = any(record.of_matrix_rate is not None for record in records)
    field, unit = ("page_s", "s") if part == "page" else ("median_ms", "ms")
    header = ["precision", "batch"] + ["tokens"] * with_tokens
    header += ["beams"] * with_beams + ["lines"] * (part == "page")
    header += [*(f"{name} {unit}" for name in variants), "fused against stock"]
    header += ["fused lines/s"] + (["fused us/token"] if part == "decoder" else [])
    header += ["fused of the floor"] * with_floor
    header += ["stock TFLOP/s", "fused TFLOP/s"] if part == "encoder" else []
    header += ["stock of matrix rate", "fused of matrix rate"] * with_rate
    rows = []
    for key in sorted({_key(record) for record in records}):
        by_variant = {record.variant: record for record in records if _key(record) == key}
        stock, fused = by_variant.get("stock"), by_variant.get("fused")
        precision, batch, tokens_a_line, beams, lines = key
        row = [precision, batch] + [tokens_a_line] * with_tokens
        row += [beams] * with_beams + [lines] * (part == "page")
        row += [_number(by_variant.get(name), field) for name in variants]
        row.append(f"{stock.median_ms / fused.median_ms:.2f}x" if stock and fused else "-")
        row.append(_number(fused, "lines_per_s"))
        if part == "decoder":
            row.append(_number(fused, "us_per_token"))
        if with_floor:
            row.append(_percentage(fused, "of_floor"))
        if part == "encoder":
            row += [_number(stock, "tflops"), _number(fused, "tflops")]
        if with_rate:
            row += [_percentage(stock, "of_matrix_rate"), _percentage(fused, "of_matrix_rate")]
        rows.append(row)
    table = _table(rows, header, language)
    table += "\n\n" + _say("{} tokens a line.", language).format(tokens) if tokens and not with_tokens else ""
    return table + _correctness(records, language)


def _key(record: Record) -> tuple[str, int, int, int, int]:
    """What the variants are compared at: precision, batch, tokens, beams, lines of a page."""
    return record.precision, record.batch, record.tokens or 0, record.num_beams, record.lines or 0


def _usual(records: Sequence[Record], part: str) -> list[Record]:
    """Those of a part that have its usual number of tokens."""
    of_part = [record for record in records if record.part == part]
    return [record for record in of_part if record.tokens == usual_tokens(of_part)]


def accuracy_table(accuracies: Sequence[dict[str, Any]], language: str = "en") -> str:
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
    return _table(rows, header, language)


def load_table(load: Mapping[str, Any], language: str = "en") -> str:
    """Latency while lines arrive at random moments: a row a share of the capacity."""
    rows = [
        [
            f"{row['load']:.0%}",
            f"{row['offered_lines_per_s']:.0f}",
            f"{row['lines_per_s']:.0f}",
            *(f"{row[name]:.1f}" for name in ("p50_ms", "p95_ms", "p99_ms", "mean_batch")),
        ]
        for row in load["loads"]
    ]
    header = ["load", "offered lines/s", "lines/s", "p50 ms", "p95 ms", "p99 ms", "lines a batch"]
    capacity = _say("Capacity: {} lines a second, batches up to {}.", language)
    table = _table(rows, header, language)
    return table + "\n\n" + capacity.format(round(load["capacity_lines_per_s"]), load["batch_size"])


def stage_table(stages: Sequence[dict[str, Any]]) -> str:
    rows = [[s["name"], s["status"], f"{s['seconds']:.0f}", s["reason"] or ""] for s in stages]
    return tabulate(rows, ["stage", "status", "seconds", "reason"], tablefmt="github", disable_numparse=True)


def _correctness(records: Sequence[Record], language: str) -> str:
    """The worst agreement of each variant with PyTorch in float32, precision by precision."""
    several = len({record.precision for record in records}) > 1
    worst = []
    for name, precision in dict.fromkeys((record.variant, record.precision) for record in records):
        of_variant = [record for record in records if (record.variant, record.precision) == (name, precision)]
        variant = f"{name} ({precision})" if several else name
        errors = [record.rel_error for record in of_variant if record.rel_error is not None]
        same = [record.same_tokens for record in of_variant if record.same_tokens is not None]
        worst += [f"{variant} {max(errors):.1e}"] if errors else []
        worst += [f"{variant} {min(same):.1%}"] if same else []
    if not worst:
        return ""
    encoder = records[0].part == "encoder"
    what = "Largest error relative to" if encoder else "Smallest share of tokens as in"
    return "\n\n" + _say(what + " PyTorch fp32: {}.", language).format(", ".join(worst))


def _say(text: str, language: str) -> str:
    """A word or sentence in "en" or "zh"; names, which have no entry, are the same in both."""
    return CHINESE.get(text, text) if language == "zh" else text


def _table(rows: Sequence[Sequence[Any]], header: Sequence[str], language: str = "en") -> str:
    words = [_say(name, language) for name in header]
    rows = [[_say(row[0], language), *row[1:]] for row in rows]
    # Else the widths, and with them the text, depended on whether the package wcwidth is installed.
    tabulate_module.WIDE_CHARS_MODE = False
    return tabulate(rows, words, tablefmt="github", disable_numparse=True, colalign=_align(header))


def _number(record: Record | None, field: str) -> str:
    """Three significant digits, a dash where there is no measurement."""
    value = record and getattr(record, field)
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _percentage(record: Record | None, field: str) -> str:
    """Of a fraction; a dash where there is no measurement."""
    value = record and getattr(record, field)
    return "-" if value is None else f"{value:.0%}"


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
    return summary(
        records,
        content("accuracy.json", []),
        stages,
        content("unavailable.json", []),
        content("load.json", None),
    )


def overview(results: Path) -> str:
    """The table at the top of README.md: pages, and lines from pixels to token ids, of each model in fp16."""
    measured = read_all(results)
    found = [
        [record for record in measured[bench] if record.precision == "fp16"] for bench in latest(measured)
    ]
    found = sorted(filter(None, found), key=_first_time)
    gpus = dict.fromkeys(records[0].gpu for records in found)
    rows = []
    for records in found:
        model = records[0].model + (f" on {records[0].gpu.removeprefix('NVIDIA ')}" if len(gpus) > 1 else "")
        of_page = [record for record in records if record.part == "page"]
        best = {
            name: min((record.page_s * 1e3 for record in of_page if record.variant == name), default=None)
            for name in ("torch", "stock", "fused")
        }
        if best["fused"] is not None:
            lines = of_page[0].lines
            rows.append(_overview_row(f"{model}: a page of {lines} lines, images to texts", lines, best))
        for batch in OVERVIEW_BATCHES:
            alike = [record for record in _usual(records, "end_to_end") if record.num_beams == 1]
            times = {record.variant: record.median_ms for record in alike if record.batch == batch}
            if "fused" in times:
                lines = f"{batch} line{'s' * (batch > 1)} of {alike[0].tokens} tokens"
                rows.append(_overview_row(f"{model}: {lines}, pixels to ids", batch, times))
    header = ["median ms", "PyTorch", "stock TensorRT", "fused", "times PyTorch", "times stock", "lines/s"]
    return f"On {', '.join(gpus)}, float16:\n\n{_table(rows, header)}"


def _first_time(records: Sequence[Record]) -> float:
    """By which models are ordered, smallest first: the fused encoder's least time."""
    times = [record.median_ms for record in records if (record.part, record.variant) == ("encoder", "fused")]
    return min(times, default=0.0)


def _overview_row(what: str, lines: int, times: Mapping[str, float | None]) -> list[str]:
    """`times`: ms a variant, for so many lines."""
    fused = times["fused"]
    others = [times.get(name) for name in ("torch", "stock")]
    shown = [f"{time:.3g}" if time else "-" for time in (*others, fused)]
    return [
        what,
        *shown,
        *(f"{time / fused:.1f}" if time else "-" for time in others),
        f"{lines / fused * 1e3:.0f}",
    ]


def headline(results: Path) -> str:
    """The tables for README.md: of every model, where it was measured last."""
    lines = []
    measured = read_all(results)
    newest = latest(measured)
    for bench in sorted(newest, key=lambda bench: _first_time(measured[bench])):
        folder, records = bench.parent, measured[bench]
        link = folder.relative_to(results.parent).as_posix()
        lines += ["<details>", f"<summary>{records[0].model} on {records[0].gpu}, part by part</summary>", ""]
        for part, unit in (("encoder", "ms a batch"), ("end_to_end", "ms a batch"), ("page", "s a page")):
            if rows := _usual(records, part):
                lines += [f"{TITLES[part]}, median {unit}:", "", part_table(rows), ""]
        if (folder / "accuracy.json").is_file():
            accuracies = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
            lines += ["Accuracy on the labelled lines:", "", accuracy_table(accuracies), ""]
        if load := _content(folder / "load.json"):
            lines += ["Lines that arrive at random moments, from arrival to text:", "", load_table(load), ""]
        lines += [f"All parts, versions and the command of each figure: [{link}]({link}/summary.md).", ""]
        lines += ["</details>", ""]
    others = [bench.parent for bench in measured if bench not in newest]
    if others:
        links = [folder.relative_to(results.parent).as_posix() for folder in others]
        lines += [
            f"Earlier, on other GPUs: {', '.join(f'[{link}]({link}/summary.md)' for link in links)}.",
            "",
        ]
    return "\n".join(lines)


def with_headline(readme: str, results: Path) -> str:
    """README's text with the newest tables between its marks."""
    places = (
        (OVERVIEW_BEGIN, f"{overview(results)}\n", OVERVIEW_END),
        (README_BEGIN, headline(results), README_END),
    )
    for begin, content, end in places:
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n\n{content}\n{end}{after}"
    return readme


def _content(file: Path) -> Any:
    """A results file's content; None where there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise RecordError(f"{file}: no JSON ({error}); measure again") from None


# What a place shows: results folder, further words of the place, language -> text; None: not measured.


def _part_place(part: str, folder: Path, words: Sequence[str], language: str) -> str | None:
    bench = folder / "bench.json"
    rows = _usual(read(bench) if bench.is_file() else [], part)
    return part_table(rows, language) if rows else None


def _accuracy_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    accuracies = _content(folder / "accuracy.json")
    return accuracy_table(accuracies, language) if accuracies else None


def _load_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    load = _content(folder / "load.json")
    return load_table(load, language) if load else None


def _tensors_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """Of every variant the errors of the encoder's states, the cross-attention's tensors and the logits."""
    content = _content(folder / "tensors" / "tensors.json")
    if not content:
        return None
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for error in content["errors"]:
        groups.setdefault((error["precision"], error["variant"]), []).append(error)

    def worst(errors: Sequence[Mapping[str, Any]], name: str) -> str:
        found = [error["relative"]["p99"] for error in errors if error["tensor"].startswith(name)]
        return f"{max(found):.1e}" if found else "-"

    parts = {"encoder's states": "encoder states", "cross keys, values": "cross ", "logits": "logits"}
    rows = [
        [precision, variant, *(worst(errors, name) for name in parts.values()), len(errors)]
        for (precision, variant), errors in groups.items()
    ]
    return _table(rows, ["precision", "variant", *parts, "tensors"], language)


def _environment_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """Where and with what bench.json was measured, and the commands."""
    bench = folder / "bench.json"
    records = read(bench) if bench.is_file() else []
    if not records:
        return None
    where = _say(
        "Measured on {gpu}, driver {driver}, CUDA {cuda}, TensorRT {tensorrt}, commit {commit}, {date}.",
        language,
    ).format(**vars(records[0]))
    commands = dict.fromkeys(record.command for record in records)
    return f"{where}\n\n{_say('Commands:', language)}\n\n" + "\n".join(
        f"    {command}" for command in commands
    )


def _comparison(folder: Path, graph: str, batch: str) -> dict[str, Any] | None:
    """What profiling/layers.py found of a graph at a batch size."""
    comparisons = (_content(folder / LAYERS) or {"comparisons": []})["comparisons"]
    return next((c for c in comparisons if (c["graph"], str(c["batch"])) == (graph, batch)), None)


def _layers_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """Both engines as a whole, then op by op; `words` are graph and batch."""
    comparison = _comparison(folder, *words)
    if comparison is None:
        return None
    engines = [
        [variant, whole["layers"], f"{whole['sum_ms']:.3f}", f"{whole['replay_ms']:.3f}"]
        + [f"{whole[name]:.2f}" for name in ("profiler_us",) if name in whole]  # not in older results
        for variant in ("stock", "fused")
        for whole in [comparison["whole"][variant]]
    ]
    header = ["engine", "layers", "sum of layers ms", "CUDA graph ms", "profiler us a layer, taken off"]
    ops = [
        [
            op["op"],
            op["units"],
            f"{op['stock_ms']:.4f}",
            f"{op['stock_shared_ms'] / op['stock_ms']:.0%}" if op["stock_ms"] else "-",
            f"{op['fused_ms']:.4f}",
            f"{op['stock_ms'] / op['fused_ms']:.2f}x" if op["stock_ms"] and op["fused_ms"] else "-",
        ]
        for op in comparison["ops"]
    ]
    stock, fused = (sum(op[f"{variant}_ms"] for op in comparison["ops"]) for variant in ("stock", "fused"))
    ops.append(["total", "", f"{stock:.4f}", "", f"{fused:.4f}", f"{stock / fused:.2f}x"])
    return "\n\n".join(
        [
            _table(engines, header[: len(engines[0])], language),
            _table(ops, ["op", "count", "stock ms", "of it shared", "fused ms", "speedup"], language),
        ]
    )


def _layer_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """One of the model's layers op by op, with the stock layers; `words` are graph, batch and index."""
    graph, batch, index = words
    comparison = _comparison(folder, graph, batch)
    units = comparison["units"] if comparison else []
    rows = [
        [
            unit["op"],
            f"{unit['fused_ms']:.4f}",
            f"{unit['stock_ms']:.4f}",
            " + ".join(f"`{layer['name'].rsplit('/', 1)[-1]}`" for layer in unit["stock_layers"]) or "-",
        ]
        for unit in units
        if unit["module"] == f"{graph} layer {index}"
    ]
    header = ["op", "fused ms", "stock ms", "the stock engine's layers"]
    return _table(rows, header, language) if rows else None


def _device_decoder_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """The device decoder alone, against the bytes that it must read."""
    rows = [
        [
            row["decoder"],
            _say(row["attends_to"], language),
            row["batch"],
            f"{row['us_per_token']:.0f}",
            f"{row['floor_us']:.0f}",
            f"{row['of_floor']:.0%}",
        ]
        for row in _content(folder / "device_decoder.json") or []
    ]
    header = ["decoder", "attends to", "batch", "us/token", "byte floor us", "of the floor"]
    return _table(rows, header, language) if rows else None


def _kernels_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """The single ops' kernels against PyTorch, in float16; `words` are model and batch."""
    rows = [
        [
            row["op"],
            row["shape"],
            f"{row['fused_us']:.1f}",
            f"{row['torch_us']:.1f}",
            f"{row['torch_us'] / row['fused_us']:.2f}x",
            f"{row['error']:.1e}",
            f"{row['torch_error']:.1e}",
        ]
        for row in _content(folder / "kernels.json") or []
        if [row["model"], str(row["batch"]), row["precision"]] == [*words, "float16"]
    ]
    header = ["kernel", "shape", "fused us", "PyTorch us", "speedup", "error", "PyTorch's error"]
    return _table(rows, header, language) if rows else None


def _family_place(folder: Path, words: Sequence[str], language: str) -> str | None:
    """Every checkpoint: its status and parameters, and its configuration's times, sizes and build times."""
    entries = _content(folder / "family.json")
    if not entries:
        return None

    def both(engines: Mapping[str, Any], show: Callable[[Mapping[str, Any]], str]) -> str:
        return " / ".join(show(engines[variant]) for variant in ("stock", "fused"))

    rows = [
        [
            checkpoint,
            f"{entry['weights']} weights, full size",
            f"{entry['parameters'] / 1e6:.1f} M",
            both(entry["engines"], lambda engine: f"{engine['encoder_ms']:.3f}"),
            both(entry["engines"], lambda engine: f"{engine['us_per_token']:.0f}"),
            both(entry["engines"], lambda engine: f"{engine['engine_bytes'] / 2**20:.0f}"),
            both(entry["engines"], lambda engine: f"{engine['build_s']:.0f}"),
            both(entry["engines"], lambda engine: f"{engine['same_tokens']:.0%}"),
        ]
        for entry in entries
        for checkpoint in entry["checkpoints"]
    ]
    header = ["checkpoint", "measured with", "parameters", "encoder ms", "us/token", "engines MiB"]
    header += ["build s", "tokens as PyTorch fp32"]
    where = "{gpu}, TensorRT {tensorrt}, {date}; stock / fused, {precision}, batch 1, {tokens} tokens a line."
    return _table(rows, header, language) + "\n\n" + where.format(**entries[0])


# Kind -> what fills it, the file it comes from, how many words follow the folder.
PLACES: Mapping[str, tuple[Callable[[Path, Sequence[str], str], str | None], str, int]] = {
    **{part: (partial(_part_place, part), "bench.json", 0) for part in PARTS},
    "accuracy": (_accuracy_place, "accuracy.json", 0),
    "load": (_load_place, "load.json", 0),
    "tensors": (_tensors_place, "tensors/tensors.json", 0),
    "environment": (_environment_place, "bench.json", 0),
    "layers": (_layers_place, LAYERS, 2),
    "layer": (_layer_place, LAYERS, 3),
    "device_decoder": (_device_decoder_place, "device_decoder.json", 0),
    "kernels": (_kernels_place, "kernels.json", 2),
    "family": (_family_place, "family.json", 0),
}


def filled(text: str, results: Path, language: str) -> str:
    """A report with what `results` holds in its marked places; a sentence in those that were not measured.

    Raises RecordError for a place that is unknown or has no end, and for results that cannot be read.
    """
    parts, end = [], 0
    marks = list(MARK.finditer(text))
    for begin, close in zip(marks[::2], [*marks[1::2], None], strict=False):
        if begin["place"] is None or close is None or close["place"] is not None:
            raise RecordError(f"{begin[0]}: begin and end of results must take turns")
        kind, *words = begin["place"].split()
        if kind not in PLACES or len(words) != 1 + PLACES[kind][2]:
            raise RecordError(
                f"{begin[0]}: unknown; there are {', '.join(PLACES)}, each with a folder of results/"
            )
        fill, file, _ = PLACES[kind]
        content = fill(results / words[0], words[1:], language)
        if content is None:
            missing = "Not measured yet: `{}` is not there, or does not have it; `{}` writes it."
            command = {"family": "make family", "tensors": "make gpu-sweep"}.get(kind, "make gpu-check")
            content = _say(missing, language).format(f"results/{words[0]}/{file}", command)
        parts.append(f"{text[end : begin.end()]}\n\n{content}\n\n")
        end = close.start()
    return "".join(parts) + text[end:]


def _report(name: str, language: str) -> str:
    try:
        return filled((ROOT / name).read_text(encoding="utf-8"), ROOT / "results", language)
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write summary.md of a results folder, or the tables of README or of the reports."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", type=Path, nargs="?", help="results/<gpu>/<model>")
    what.add_argument("--readme", action="store_true", help="put the headline tables into README.md")
    what.add_argument("--docs", action="store_true", help="fill the reports' marked places")
    options = parser.parse_args(arguments)
    try:
        if options.readme:
            readme = ROOT / "README.md"
            text = with_headline(readme.read_text(encoding="utf-8"), ROOT / "results")
            readme.write_text(text, encoding="utf-8")
        elif options.docs:
            texts = {name: _report(name, language) for name, language in PAGES.items()}
            for name, text in texts.items():
                (ROOT / name).write_text(text, encoding="utf-8")
        elif not options.folder.is_dir():
            raise RecordError(f"{options.folder}: no such folder; name one of results/<gpu>/<model>")
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
