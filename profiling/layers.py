"""Layer by layer, stock engines against fused ones: what each fused op takes, and what it replaced took.

    python -m profiling.layers --stock engines/X-fp16-none --fused engines/X-fp16-fused --batch 1,64 --out DIR
    python -m profiling.layers --raw DIR/layers-raw.json --out DIR

The first command measures on a GPU, writes `layers-raw.json` after every measurement, and then compares. The
second only compares: it needs nothing but that file. Both write layers.json, layers.md and layers.html.

How a time is put down to an op. TensorRT times its layers (`IProfiler`), and says for each of them which
ONNX nodes it does (`IEngineInspector`, engines built with detailed verbosity). A stock node belongs to the
fused op that replaced it (`trocr.replaced` in the fused graph's metadata), every other node to itself. A
layer that does nodes of several ops is divided between them: products and fused ops take it all, in equal
parts a node; where there is none, the other arithmetic; where there is none of that either, the reshapes and
copies. What was divided is shown as "shared": where that is small, an op stands against exactly the layers
that it replaced.

How the times are taken. Every engine is captured twice as a CUDA graph, plain and with TensorRT's profiler,
and the graphs of both variants are replayed in turns: the host's pace and the clock's drift touch all of
them alike. The profiler puts an event between any two layers, so that a profiled replay takes longer than a
plain one. What it adds is known in total only, from the two replays' medians. It is taken off the layers in
equal parts, from none more than it has, so that the parts add up to the plain replay, which is what an
inference takes; how much was taken off is part of the result ("profiler"). Layers that TensorRT runs side
by side, on streams of its own, have times that overlap: those are first scaled to the profiled replay
("side by side" says how much they overlapped).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from graph_surgery.fused_ops import DOMAIN
from profiling.records import write_text

VARIANTS = ("stock", "fused")
GRAPHS = ("encoder", "cross_kv", "decoder")
PRODUCTS = {"MatMul", "Gemm", "Conv"}
MOVEMENTS = {"Cast", "Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape"}
MOVEMENTS |= {"Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
NOT_ATTRIBUTED = "not attributed"
OUTSIDE = "outside of the layers"
TOLERANCE = 0.05  # of the layers' sum against the profiled replay, and of the parts' against the plain one
WARMUPS = 10
RAW, COMPARISON, TABLES, PAGE = "layers-raw.json", "layers.json", "layers.md", "layers.html"
FORMAT = 2


class LayersError(RuntimeError):
    """Engines or a raw file that cannot be compared; the message names the file, the value and the remedy."""


# --- measuring (needs a GPU) ---


def measure(
    stock: Path, fused: Path, batches: Sequence[int], graphs: Sequence[str], repeats: int, position: int
) -> Iterator[dict[str, Any]]:
    """Time both variants' engines, in turns, graph by graph and batch by batch.

    Args:
        position: of the decoder's step: tokens in the cache.

    Yields:
        For each engine and batch: `layers`, a list of name and `times_ms`, in the order of execution;
        `profiled_ms`, the same runs as a whole; `enqueue_ms` and `replay_ms`, the whole without the profiler,
        enqueued and as a CUDA graph; `inspector`, TensorRT's description; `nodes`, the graph's nodes and
        their operators; `replaced`.

    Raises:
        EngineError: an engine that cannot be loaded, or not run at this batch.
    """
    import torch

    from runtime.engine import Engine

    folders = {"stock": stock, "fused": fused}
    with torch.cuda.stream(torch.cuda.Stream()):  # on the default stream TensorRT synchronises
        for graph in graphs:
            engines = {variant: Engine.load(folder, graph) for variant, folder in folders.items()}
            for batch in batches:
                runs = {
                    variant: EngineRuns(engine, _tensors(engine, folders[variant], batch, position))
                    for variant, engine in engines.items()
                }
                for _ in range(repeats):
                    for run in runs.values():
                        run.time_once()
                for variant, run in runs.items():
                    yield {
                        "variant": variant,
                        "graph": graph,
                        "batch": batch,
                        "position": position if graph == "decoder" else None,
                        **run.content(),
                        **_graph_content(folders[variant] / f"{graph}.onnx"),
                    }


class EngineRuns:
    """One engine on fixed tensors, in three ways: enqueued, as a CUDA graph, and as one with the profiler."""

    def __init__(self, engine, tensors: Mapping[str, Any]):
        import torch

        from runtime.engine import capture

        self._plain, self._profiled = engine.bind(tensors), engine.bind(tensors)
        self._reports: list[tuple[str, float]] = []
        self._profiled.attach_profiler(lambda name, ms: self._reports.append((name, ms)))
        for _ in range(WARMUPS):
            self._plain()
            self._profiled()
        torch.cuda.synchronize()
        self._replay, self._replay_profiled = capture(self._plain).replay, self._profiled
        try:
            replay = capture(self._profiled).replay
            replay()
            torch.cuda.synchronize()
            self._profiled.report_layers()
            if sum(ms for _, ms in self._reports) > 0:
                self._replay_profiled = replay
        except RuntimeError as error:
            print(f"the profiled engine is enqueued, not replayed: {error}", file=sys.stderr)
        for _ in range(WARMUPS):
            self._replay()
            self._replay_profiled()
        self._times: dict[str, list[float]] = {"enqueue_ms": [], "replay_ms": [], "profiled_ms": []}
        self._layers: dict[str, list[float]] = defaultdict(list)

    def time_once(self) -> None:
        """One run in each way."""
        self._times["enqueue_ms"].append(_time(self._plain))
        self._times["replay_ms"].append(_time(self._replay))
        self._times["profiled_ms"].append(_time(self._replay_profiled))
        self._reports.clear()
        self._profiled.report_layers()
        of_run: dict[str, float] = defaultdict(float)  # a layer may be reported more than once
        for name, ms in self._reports:
            of_run[name] += ms
        for name, ms in of_run.items():
            self._layers[name].append(round(ms, 6))

    def content(self) -> dict[str, Any]:
        """What `measure` yields of the runs so far."""
        try:
            inspector = self._plain.layer_information()
        except RuntimeError as error:  # the times are worth keeping
            inspector = f"not available: {error}"
        layers = [{"name": name, "times_ms": values} for name, values in self._layers.items()]
        return {**self._times, "layers": layers, "inspector": inspector}


def _tensors(engine, folder: Path, batch: int, position: int) -> dict[str, Any]:
    """Random inputs, and outputs; the decoder stands at `position`, a fixed cache is written in place."""
    import torch

    from graph_surgery.checkpoint import load_spec
    from runtime.manifest import Manifest

    generator = torch.Generator("cuda").manual_seed(0)
    inputs = {}
    for name in engine.inputs:
        low, _, high = engine.profile(name)
        rest = [a if a == b else position for a, b in zip(low[1:], high[1:], strict=True)]
        shape, dtype = (batch, *rest), engine.dtypes[name]
        if name == "position_ids":
            inputs[name] = torch.full(shape, position, dtype=dtype, device="cuda")
        elif name == "input_ids":
            vocabulary = load_spec(folder).decoder.vocab_size
            inputs[name] = torch.randint(vocabulary, shape, generator=generator, device="cuda", dtype=dtype)
        elif name == "pixel_values" and dtype == torch.int32:  # words of four uint8 pixels
            words = (-(2**31), 2**31, shape)
            inputs[name] = torch.randint(*words, generator=generator, device="cuda", dtype=dtype)
        elif dtype.is_floating_point:
            inputs[name] = torch.randn(shape, generator=generator, device="cuda").to(dtype)
        else:  # numbers of something: 0 is one that always is there
            inputs[name] = torch.zeros(shape, dtype=dtype, device="cuda")
    outputs = engine.empty_outputs(inputs)
    if Manifest.read(folder).cache == "fixed":
        for name in outputs:
            past = name.replace("present", "past_key_values")
            if past in inputs:
                outputs[name] = inputs[past]
    return inputs | outputs


def _time(run: Callable[[], None]) -> float:
    """Milliseconds of one run; waits for its end."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _graph_content(file: Path) -> dict[str, Any]:
    import onnx

    model = onnx.load(file, load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    nodes = {node.name: node.op_type for node in model.graph.node}
    fused = [node.name for node in model.graph.node if node.domain == DOMAIN]
    return {
        "nodes": nodes,
        "fused_nodes": fused,
        "replaced": json.loads(metadata.get("trocr.replaced", "{}")),
    }


# --- comparing (a pure function of the measurements) ---


def compare(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Set every op's time in the fused engine against that of the stock layers it replaced.

    Returns:
        `environment`, and `comparisons`, for each graph and batch that both variants were measured at:
        `whole` (per variant: the sum of the parts, the whole in all three ways, and what was taken off, see
        `_whole`), and three tables that each add up to the sum: `units` (op by op, with the names of the
        layers), `ops` (by operator) and `modules` (by the model's layers).

    Raises:
        LayersError: a measurement without its counterpart, or without layers.
    """
    found: dict[tuple, dict[str, Any]] = defaultdict(dict)
    for entry in raw["measurements"]:
        found[entry["graph"], entry["batch"], entry["position"]][entry["variant"]] = entry
    if not found:
        raise LayersError("no measurements: measure again with python -m profiling.layers --stock --fused")
    return {
        "environment": raw["environment"],
        "comparisons": [_compare(*key, entries) for key, entries in found.items()],
    }


def _compare(graph: str, batch: int, position: int | None, entries: Mapping[str, Any]) -> dict[str, Any]:
    what = f"{graph}, batch {batch}"
    for variant in VARIANTS:
        if variant not in entries:
            raise LayersError(f"{what}: no {variant} measurement; measure both variants again")
        if not entries[variant]["layers"]:
            raise LayersError(f"{what}: TensorRT reported no layers of the {variant} engine")
    stock, fused = entries["stock"], entries["fused"]
    unit_of = {node: new for new, nodes in fused["replaced"].items() for node in nodes}

    units: dict[str, dict[str, Any]] = {}
    whole, timelines = {}, {}
    for variant, entry in entries.items():
        timelines[variant] = []
        layers = _layers(entry)
        whole[variant] = _whole(entry, layers)
        for layer in layers:
            shares = _shares(layer["nodes"], entry["nodes"], unit_of if variant == "stock" else {})
            for name, share in shares.items():
                unit = units.setdefault(name, _new_unit(name, graph, stock, fused))
                unit[f"{variant}_ms"] += share * layer["ms"]
                unit[f"{variant}_shared_ms"] += share * layer["ms"] * (share < 1)
                unit[f"{variant}_layers"].append({"name": layer["name"], "ms": layer["ms"], "share": share})
            ops = {units[name]["op"] for name in shares}
            timelines[variant].append(
                {"name": layer["name"], "ms": layer["ms"], "op": " + ".join(sorted(ops))}
            )
    for new in fused["fused_nodes"]:  # one that TensorRT's profile does not show must be seen to be missing
        units.setdefault(new, _new_unit(new, graph, stock, fused))
    return {
        "graph": graph,
        "batch": batch,
        "position": position,
        "whole": whole,
        "speedup": {
            name: _ratio(whole["stock"][name], whole["fused"][name])
            for name in ("sum_ms", "enqueue_ms", "replay_ms")
        },
        "ops": _totals(units.values(), "op"),
        "modules": _totals(units.values(), "module"),
        "units": [unit | {"speedup": _ratio(unit["stock_ms"], unit["fused_ms"])} for unit in units.values()],
        "timelines": timelines,
    }


def _layers(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, median milliseconds and ONNX nodes of every profiled layer."""
    described = {}
    for layer in _inspected(entry["inspector"]):
        described.setdefault(
            layer["Name"], re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata", ""))
        )
    known = entry["nodes"]
    layers = []
    for layer in entry["layers"]:
        nodes = described.get(layer["name"], [])
        # Without metadata (a reformat, names only): the name itself often is one, or several with " + ".
        nodes = nodes or [part.strip() for part in re.split(r" \+ | to | for |, ", layer["name"])]
        nodes = [node for node in dict.fromkeys(nodes) if node in known]
        layers.append({"name": layer["name"], "ms": statistics.median(layer["times_ms"]), "nodes": nodes})
    return layers


def _inspected(inspector: Any) -> list[dict[str, Any]]:
    """The inspector's layers; bare names, which engines without detailed verbosity have, as dicts too."""
    if isinstance(inspector, str):
        try:
            inspector = json.loads(inspector)
        except ValueError:
            return []
    layers = inspector.get("Layers", [])
    return [{"Name": layer} if isinstance(layer, str) else layer for layer in layers]


def _shares(nodes: Sequence[str], ops: Mapping[str, str], unit_of: Mapping[str, str]) -> dict[str, float]:
    """Which part of a layer's time belongs to which unit; the parts add up to 1."""
    ranks = {node: _rank(ops[node]) for node in nodes}
    working = [node for node in nodes if ranks[node] == min(ranks.values())]
    if not working:
        return {NOT_ATTRIBUTED: 1.0}
    shares: dict[str, float] = defaultdict(float)
    for node in working:
        shares[unit_of.get(node, node)] += 1 / len(working)
    if len(shares) == 1:
        return dict.fromkeys(shares, 1.0)  # not 0.999...
    return dict(shares)


def _rank(op: str) -> int:
    """0 for what dominates a layer that has it, 1 for other arithmetic, 2 for moving data."""
    return 2 if op in MOVEMENTS else 0 if op in PRODUCTS or op.startswith("TrOCR") else 1


def _new_unit(name: str, graph: str, stock: Mapping[str, Any], fused: Mapping[str, Any]) -> dict[str, Any]:
    unit = {"name": name, "op": _op_class(name, stock, fused), "module": _module(name, graph)}
    unit |= {"replaced": fused["replaced"].get(name, [])}
    for variant in VARIANTS:
        unit |= {f"{variant}_ms": 0.0, f"{variant}_shared_ms": 0.0, f"{variant}_layers": []}
    return unit


def _op_class(name: str, stock: Mapping[str, Any], fused: Mapping[str, Any]) -> str:
    op = fused["nodes"].get(name) or stock["nodes"].get(name)
    if op is None:
        return NOT_ATTRIBUTED
    if op in PRODUCTS or op.startswith("TrOCR"):
        return op
    return "data movement" if op in MOVEMENTS else "other arithmetic"


def _module(name: str, graph: str) -> str:
    """The model's layer that a node belongs to: node names are module paths, /layers.3/..."""
    if name == NOT_ATTRIBUTED:
        return NOT_ATTRIBUTED
    index = re.match(r"/layers\.(\d+)/", name)
    return f"{graph} layer {index[1]}" if index else OUTSIDE


def _whole(entry: Mapping[str, Any], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Takes what the profiler adds off the layers' `ms`, in place; returns the engine's times as a whole.

    Returns:
        `replay_ms`, `enqueue_ms`, `profiled_ms`: medians of the whole; `layers_ms`: the layers' medians
        added up, as TensorRT reports them; `side_by_side`: how many times the profiled replay that is,
        where it is more; `profiler_us`: what was taken off each layer (less where it had less); `sum_ms`:
        the parts added up, and its relative difference from the replay; `unaccounted`: share of the
        profiled replay that no layer has.
    """
    whole = {name: statistics.median(entry[name]) for name in ("enqueue_ms", "replay_ms", "profiled_ms")}
    reported = sum(layer["ms"] for layer in layers)
    side_by_side = max(1.0, reported / whole["profiled_ms"])
    for layer in layers:
        layer["ms"] /= side_by_side
    profiler = _level([layer["ms"] for layer in layers], reported / side_by_side - whole["replay_ms"])
    for layer in layers:
        layer["ms"] = max(0.0, layer["ms"] - profiler)
    total = sum(layer["ms"] for layer in layers)
    return whole | {
        "layers": len(layers),
        "runs": min(len(layer["times_ms"]) for layer in entry["layers"]),
        "layers_ms": reported,
        "side_by_side": side_by_side,
        "profiler_us": 1e3 * profiler,
        "sum_ms": total,
        "difference_from_replay": total / whole["replay_ms"] - 1,
    }


def _level(values: Sequence[float], amount: float) -> float:
    """What to take off each value, from none more than it is, to take off `amount` in all; at least 0."""
    taken = 0.0
    rest = sorted(value for value in values if value > 0)
    for number, value in enumerate(rest):
        level = (amount - taken) / (len(rest) - number)
        if level <= value:
            return max(0.0, level)
        taken += value
    return 0.0


def _totals(units: Iterable[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    """The units' times added up by `key`, in the order of first appearance."""
    totals: dict[str, dict[str, Any]] = {}
    for unit in units:
        total = totals.setdefault(unit[key], {key: unit[key], "units": 0})
        total["units"] += 1
        for variant in VARIANTS:
            for field in (f"{variant}_ms", f"{variant}_shared_ms"):
                total[field] = total.get(field, 0.0) + unit[field]
    return [total | {"speedup": _ratio(total["stock_ms"], total["fused_ms"])} for total in totals.values()]


def _ratio(stock: float, fused: float) -> float | None:
    return stock / fused if stock > 0 and fused > 0 else None


# --- showing ---

METHOD = """Median milliseconds. TensorRT's profiler puts an event between any two layers; what that adds to
the replay of the engine's CUDA graph was measured, by replaying graphs with and without it in turns, and
taken off the layers in equal parts. "Side by side": how many times the profiled replay the layers' times
are, where TensorRT runs layers at the same time; their times were scaled. "Shared" is time of layers that
do the work of several ops, divided between them (`profiling/layers.py` says how)."""


def markdown(comparison: Mapping[str, Any]) -> str:
    """The tables: the whole, operator by operator, and layer by layer."""
    here = comparison["environment"]
    text = ["# Layer by layer: stock against fused", ""]
    text += [f"{here['gpu']}, driver {here['driver']}, CUDA {here['cuda']}, TensorRT {here['tensorrt']}, "]
    text += [f"commit {here['commit']}, {here['date']}. `{here['command']}`", ""]
    text += [METHOD, ""]
    for entry in comparison["comparisons"]:
        text += [f"## {title(entry)}", "", whole_table(entry), ""]
        text += [totals_table(entry["ops"], "op"), "", totals_table(entry["modules"], "module"), ""]
    return "\n".join(text)


def title(entry: Mapping[str, Any]) -> str:
    at = "" if entry["position"] is None else f", step {entry['position']}"
    return f"{entry['graph']}, batch {entry['batch']}{at}"


def whole_table(entry: Mapping[str, Any]) -> str:
    header = ["whole engine", "layers", "runs", "CUDA graph", "sum of parts", "difference", "profiled"]
    header += ["profiler us a layer", "side by side", "enqueued"]
    rows = []
    for variant in VARIANTS:
        whole = entry["whole"][variant]
        difference, beside = whole["difference_from_replay"], whole["side_by_side"]
        mark = " (!)" if _does_not_add_up(whole) else ""
        rows.append([variant, whole["layers"], whole["runs"], _ms(whole["replay_ms"]), _ms(whole["sum_ms"])])
        rows[-1] += [f"{difference:+.1%}{mark}", _ms(whole["profiled_ms"]), f"{whole['profiler_us']:.2f}"]
        rows[-1] += [f"{beside:.2f}x" if beside > 1 + TOLERANCE else "-", _ms(whole["enqueue_ms"])]
    speedup = entry["speedup"]
    rows.append(["speedup", "", "", _times_faster(speedup["replay_ms"]), _times_faster(speedup["sum_ms"])])
    rows[-1] += ["", "", "", "", _times_faster(speedup["enqueue_ms"])]
    return _table(rows, header)


def _does_not_add_up(whole: Mapping[str, Any]) -> bool:
    return abs(whole["difference_from_replay"]) > TOLERANCE


def totals_table(totals: Sequence[Mapping[str, Any]], key: str) -> str:
    header = [key, "count", "stock ms", "of it shared", "fused ms", "of it shared", "speedup"]
    rows = [
        [
            total[key],
            total["units"],
            _ms(total["stock_ms"]),
            _percent(total["stock_shared_ms"], total["stock_ms"]),
            _ms(total["fused_ms"]),
            _percent(total["fused_shared_ms"], total["fused_ms"]),
            _times_faster(total["speedup"]),
        ]
        for total in totals
    ]
    sums = [sum(total[f"{variant}_ms"] for total in totals) for variant in VARIANTS]
    rows.append(["total", "", _ms(sums[0]), "", _ms(sums[1]), "", _times_faster(_ratio(*sums))])
    return _table(rows, header)


def _table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)


def _ms(value: float) -> str:
    return f"{value:.4f}"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _times_faster(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def html(comparison: Mapping[str, Any]) -> str:
    """One self-contained page: the tables, bars by operator and by layer, and each engine's timeline."""
    from jinja2 import Environment, FileSystemLoader

    figures: list[str] = []

    def figure(chart) -> str:
        figures.append(
            chart.to_html(full_html=False, include_plotlyjs=not figures, config={"displaylogo": False})
        )
        return figures[-1]

    sections = []
    for entry in comparison["comparisons"]:
        charts = [
            figure(_timeline(entry)),
            figure(_bars(entry["ops"], "op")),
            figure(_bars(entry["modules"], "module")),
        ]
        tables = [_html_table(whole_table(entry)), _html_table(totals_table(entry["ops"], "op"))]
        sections.append(
            {"title": title(entry), "charts": charts, "tables": tables, "units": _unit_rows(entry)}
        )
    folder = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=folder, autoescape=True).get_template("layers.html.jinja")
    return page.render(environment=comparison["environment"], method=METHOD, sections=sections)


def _timeline(entry: Mapping[str, Any]):
    """Both engines' layers one after the other, coloured by op."""
    import plotly.graph_objects as go

    colours = _colours(entry)
    chart = go.Figure(layout=_layout("Layers in the order of execution", height=300) | {"barmode": "overlay"})
    for op, colour in colours.items():
        bars: dict[str, list] = {"y": [], "base": [], "x": [], "text": []}
        for variant in reversed(VARIANTS):
            begin = 0.0
            for layer in entry["timelines"][variant]:
                if layer["op"] == op:
                    bars["y"].append(variant)
                    bars["base"].append(begin)
                    bars["x"].append(layer["ms"])
                    bars["text"].append(f"{layer['name'][:120]}<br>{1e3 * layer['ms']:.1f} µs")
                begin += layer["ms"]
        chart.add_bar(
            name=op, orientation="h", marker={"color": colour, "line": {"width": 0.3, "color": "white"}},
            y=bars["y"], base=bars["base"], x=bars["x"], hovertext=bars["text"], hoverinfo="text+name",
            textposition="none",
        )  # fmt: skip
    chart.update_xaxes(title="ms")
    return chart


def _bars(totals: Sequence[Mapping[str, Any]], key: str):
    import plotly.graph_objects as go

    rows = list(reversed(totals))
    chart = go.Figure(layout=_layout(f"Milliseconds by {key}", height=140 + 34 * len(rows)))
    for variant, colour in (("fused", "#0072b2"), ("stock", "#999999")):
        chart.add_bar(
            name=variant, orientation="h", marker={"color": colour}, y=[row[key] for row in rows],
            x=[row[f"{variant}_ms"] for row in rows],
            text=[_times_faster(row["speedup"]) if variant == "fused" else "" for row in rows],
            textposition="outside",
        )  # fmt: skip
    chart.update_layout(legend={"traceorder": "reversed"})
    chart.update_xaxes(title="ms")
    return chart


def _layout(name: str, height: int) -> dict[str, Any]:
    margin = {"l": 10, "r": 10, "t": 50, "b": 40}
    return {
        "title": name,
        "height": height,
        "template": "plotly_white",
        "margin": margin,
        "yaxis": {"automargin": True},
    }


def _colours(entry: Mapping[str, Any]) -> dict[str, str]:
    from plotly.colors import qualitative

    ops = dict.fromkeys(layer["op"] for variant in VARIANTS for layer in entry["timelines"][variant])
    return {op: qualitative.Safe[i % len(qualitative.Safe)] for i, op in enumerate(ops)}


def _unit_rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every fused op with the stock layers that it replaced."""

    def layers(unit: Mapping[str, Any], variant: str) -> list[str]:
        return [
            f"{layer['name']}: {1e3 * layer['ms']:.1f} µs"
            + (f" x {layer['share']:.2f}" if layer["share"] < 1 else "")
            for layer in unit[f"{variant}_layers"]
        ]

    return [
        {
            "name": unit["name"],
            "stock": f"{1e3 * unit['stock_ms']:.1f}",
            "fused": f"{1e3 * unit['fused_ms']:.1f}",
            "speedup": _times_faster(unit["speedup"]),
            "stock_layers": layers(unit, "stock"),
            "fused_layers": layers(unit, "fused"),
        }
        for unit in entry["units"]
        if unit["replaced"] or unit["op"].startswith("TrOCR")
    ]


def _html_table(table: str) -> list[list[str]]:
    """The cells of a Markdown table, its header first."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [rows[0], *rows[2:]]


# --- command line ---


def read_raw(path: Path) -> dict[str, Any]:
    """Raises LayersError for a file that `measure` did not write."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LayersError(f"{path}: unreadable ({error}); measure again with --stock and --fused") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise LayersError(
            f"{path}: not measurements of format {FORMAT}; measure again with --stock and --fused"
        )
    return raw


def measure_into(
    path: Path, measurements: Iterable[dict[str, Any]], environment: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the file anew after each measurement, so that nothing is lost where a later one fails."""
    raw = {"format": FORMAT, "environment": dict(environment), "measurements": []}
    for entry in measurements:
        raw["measurements"].append(entry)
        write_text(path, json.dumps(raw))
        total = statistics.median(entry["replay_ms"])
        print(
            f"{entry['graph']} batch {entry['batch']} {entry['variant']}: {total:.4f} ms a CUDA graph",
            flush=True,
        )
    return raw


def main(arguments: Sequence[str] | None = None) -> int:
    from profiling.records import environment
    from runtime.backends.base import BackendError
    from runtime.gpu import current_gpu
    from runtime.manifest import ManifestError

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="Compare stock and fused engines layer by layer.")
    parser.add_argument("--stock", type=Path, help="engine folder, built with --plugins none")
    parser.add_argument("--fused", type=Path, help="engine folder, built with --plugins fused")
    parser.add_argument("--raw", type=Path, help=f"compare an earlier {RAW} instead of measuring")
    parser.add_argument("--batch", type=numbers, default=[1, 64], help="default: 1,64")
    parser.add_argument(
        "--graphs", type=lambda text: text.split(","), default=list(GRAPHS), help=",".join(GRAPHS)
    )
    parser.add_argument("--repeats", type=int, default=200, help="runs of each engine (default: %(default)s)")
    parser.add_argument("--position", type=int, default=10, help="the decoder's step (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/layers"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    given = [option is not None for option in (options.stock, options.fused, options.raw)]
    if given not in ([True, True, False], [False, False, True]):
        parser.error("give --stock and --fused to measure, or --raw to compare an earlier measurement")
    if unknown := set(options.graphs) - set(GRAPHS):
        parser.error(f"no graph {', '.join(sorted(unknown))}; there are {', '.join(GRAPHS)}")
    try:
        if options.raw:
            raw = read_raw(options.raw)
        else:
            if current_gpu() is None:
                raise LayersError(
                    "no NVIDIA GPU can be used here; --raw compares what was measured elsewhere"
                )
            command = shlex.join(["python", "-m", "profiling.layers", *(arguments or sys.argv[1:])])
            measurements = measure(
                options.stock, options.fused, options.batch, options.graphs, options.repeats, options.position
            )
            raw = measure_into(options.out / RAW, measurements, asdict(environment(command)))
        comparison = compare(raw)
        write_text(options.out / COMPARISON, json.dumps(comparison, indent=1) + "\n")
        text = markdown(comparison)
        write_text(options.out / TABLES, text)
        print(text)
        try:
            write_text(options.out / PAGE, html(comparison))
        except ModuleNotFoundError as error:  # the measurements are what a GPU machine is for
            print(f"{PAGE} is not written: {error}; write it elsewhere with --raw", file=sys.stderr)
    except (BackendError, LayersError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    off = [
        f"{title(entry)}, {variant}: {whole['difference_from_replay']:+.1%}"
        for entry in comparison["comparisons"]
        for variant, whole in entry["whole"].items()
        if _does_not_add_up(whole)
    ]
    for line in off:
        print(f"the layers do not add up to the engine's time: {line}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
