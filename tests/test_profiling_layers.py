"""Stock against fused layer by layer: times are put down to the right ops, and add up."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from profiling import layers
from profiling.layers import NOT_ATTRIBUTED, OUTSIDE, RAW, LayersError, compare, main, measure_into
from tests.conftest import BUNDLED_MODEL

needs_plotly = pytest.mark.skipif(not importlib.util.find_spec("plotly"), reason="no plotly here: make setup")
ENVIRONMENT = {
    "command": "test",
    "commit": "abc",
    "date": "2026-11-22",
    "gpu": "G",
    "driver": "1",
    "cuda": "13",
}
ENVIRONMENT |= {"tensorrt": "10.6.0"}
ATTENTION = "/layers.0/attention/TrOCREncoderAttention"
QKV = "/layers.0/attention/qkv_proj/TrOCRLayerNormLinear"


@pytest.fixture(scope="module")
def content(graphs):
    """The nodes and metadata of a real graph: variant, graph name -> what `measure` saves of it."""

    def read(variant: str, graph: str) -> dict:
        folder = graphs(BUNDLED_MODEL, {"stock": "none", "fused": "fused"}[variant])
        return layers._graph_content(folder / f"{graph}.onnx")

    return read


def entry(
    content: dict, variant: str, graph: str, kernels: list[tuple[str, list[str], float]], **changes
) -> dict:
    """A measurement of layers (name, nodes, milliseconds)."""
    described = [
        {"Name": name, "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)}
        for name, nodes, _ in kernels
    ]
    total = sum(ms for _, _, ms in kernels)
    base = {"variant": variant, "graph": graph, "batch": 1, "position": None, **content}
    base |= {"layers": [{"name": name, "times_ms": [ms, ms, 9 * ms]} for name, _, ms in kernels]}
    base |= {"inspector": {"Layers": described}}
    base |= {"enqueue_ms": [total], "replay_ms": [total], "profiled_ms": [total]}
    return base | changes


def raw(*entries: dict) -> dict:
    return {"format": layers.FORMAT, "environment": ENVIRONMENT, "measurements": list(entries)}


def node_by_node(content, graph: str) -> dict:
    """Both engines with a layer a node, a millisecond each."""
    entries = []
    for variant in layers.VARIANTS:
        nodes = content(variant, graph)
        kernels = [(f"{variant} {node}", [node], 1.0) for node in nodes["nodes"]]
        entries.append(entry(nodes, variant, graph, kernels))
    return raw(*entries)


@pytest.mark.parametrize("graph", layers.GRAPHS)
def test_every_op_gets_what_it_replaced(content, graph: str):
    (result,) = compare(node_by_node(content, graph))["comparisons"]
    stock, fused = (content(variant, graph) for variant in layers.VARIANTS)
    units = {unit["name"]: unit for unit in result["units"]}
    replaced = {node for nodes in fused["replaced"].values() for node in nodes}
    for new, nodes in fused["replaced"].items():
        assert units[new]["stock_ms"] == len(nodes)
        assert sorted(layer["name"] for layer in units[new]["stock_layers"]) == sorted(
            f"stock {node}" for node in nodes
        )
        assert units[new]["fused_ms"] == 1
    for node in set(stock["nodes"]) - replaced:
        assert (units[node]["stock_ms"], units[node]["fused_ms"]) == (1, 1)
    for table in ("units", "ops", "modules"):
        for variant, nodes in (("stock", stock), ("fused", fused)):
            assert sum(row[f"{variant}_ms"] for row in result[table]) == pytest.approx(len(nodes["nodes"]))
            assert not any(row[f"{variant}_shared_ms"] for row in result[table])
    assert not any(row["op"] == NOT_ATTRIBUTED for row in result["ops"])
    modules = [row["module"] for row in result["modules"]]
    assert [name for name in modules if name != OUTSIDE] == [
        f"{graph} layer {i}" for i in range(len(modules) - modules.count(OUTSIDE))
    ]


def test_layers_of_several_ops(content):
    """As TensorRT fuses: products with what surrounds them, arithmetic across ops, and layers of no node."""
    stock, fused = content("stock", "encoder"), content("fused", "encoder")
    attention = fused["replaced"][ATTENTION]
    kernels = [
        # one product among other nodes, of another op: the product takes it all
        ("qkv", ["/layers.0/attention/q_proj/MatMul", "/layers.0/attention/Reshape"], 6.0),
        ("attention", attention, 10.0),
        # the residual of one op and the LayerNormalization of the next: in halves
        ("add and norm", ["/layers.0/Add", "/layers.0/layernorm_after/LayerNormalization"], 4.0),
        ("Reformatting CopyNode for Input Tensor 0 to /layers.0/mlp/fc1/MatMul", [], 1.0),
        ("mystery", [], 2.0),
    ]
    ours = [("plugin", [ATTENTION], 3.0), ("gemm", [QKV], 2.0)]
    measured = raw(entry(stock, "stock", "encoder", kernels), entry(fused, "fused", "encoder", ours))
    (result,) = compare(measured)["comparisons"]
    units = {unit["name"]: unit for unit in result["units"]}
    assert (units[QKV]["stock_ms"], units[QKV]["fused_ms"], units[QKV]["speedup"]) == (6, 2, 3)
    assert (units[ATTENTION]["stock_ms"], units[ATTENTION]["stock_shared_ms"]) == (10, 0)
    owner = {node: new for new, nodes in fused["replaced"].items() for node in nodes}
    residual, norm = owner["/layers.0/Add"], owner["/layers.0/layernorm_after/LayerNormalization"]
    assert residual != norm
    assert units[residual]["stock_ms"] == units[residual]["stock_shared_ms"] == 2
    assert units[norm]["stock_ms"] == 2 + 1  # with the reformat, named after the product that belongs to it
    assert units[NOT_ATTRIBUTED]["stock_ms"] == 2
    assert result["whole"]["stock"]["sum_ms"] == 23
    assert result["speedup"]["sum_ms"] == 23 / 5
    # a fused op without a time of its own is still there, at zero
    assert units["/layers.1/attention/TrOCREncoderAttention"]["fused_ms"] == 0


@pytest.mark.parametrize("inspector", ["not available: no inspector", {"Layers": ["a", ATTENTION]}])
def test_without_details_layer_names_are_all_there_is(content, inspector):
    fused = content("fused", "encoder")
    kernels = [("a", [], 1.0), (ATTENTION, [], 2.0)]
    entries = [
        entry(content(v, "encoder"), v, "encoder", kernels, inspector=inspector) for v in layers.VARIANTS
    ]
    (result,) = compare(raw(*entries))["comparisons"]
    units = {unit["name"]: unit for unit in result["units"]}
    assert units[NOT_ATTRIBUTED]["stock_ms"] == 3  # the stock graph has no such node
    assert (units[NOT_ATTRIBUTED]["fused_ms"], units[ATTENTION]["fused_ms"]) == (1, 2)
    assert fused["nodes"][ATTENTION] == "TrOCREncoderAttention"


def test_errors(content, tmp_path: Path, capsys):
    measured = node_by_node(content, "cross_kv")
    with pytest.raises(LayersError, match="cross_kv, batch 1: no fused measurement"):
        compare(raw(measured["measurements"][0]))
    with pytest.raises(LayersError, match="no measurements"):
        compare(raw())
    with pytest.raises(LayersError, match="no layers of the stock engine"):
        compare(raw(measured["measurements"][0] | {"layers": []}, measured["measurements"][1]))
    (tmp_path / "bad.json").write_text("[1]")
    assert main(["--raw", str(tmp_path / "bad.json"), "--out", str(tmp_path)]) == 2
    assert "bad.json: not measurements" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--stock", "a"])
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.json"]


def test_what_the_profiler_adds_is_taken_off_in_equal_parts(content):
    """Layers of 2, 10 and 0.5 ms, of which the profiler has 1.5 each: the smallest has no more than it is."""
    stock, fused = content("stock", "encoder"), content("fused", "encoder")
    kernels = [("a", ["/layers.0/Add"], 2.0), ("b", ["/layers.0/mlp/fc1/MatMul"], 10.0), ("c", [], 0.5)]
    entries = [
        entry(stock, "stock", "encoder", kernels, replay_ms=[9.0]),
        entry(fused, "fused", "encoder", kernels),
    ]
    (result,) = compare(raw(*entries))["comparisons"]
    whole = result["whole"]["stock"]
    assert [layer["ms"] for layer in result["timelines"]["stock"]] == pytest.approx([0.5, 8.5, 0])
    assert whole["profiler_us"] == pytest.approx(1500)
    assert (whole["layers_ms"], whole["sum_ms"], whole["side_by_side"]) == pytest.approx((12.5, 9, 1))
    assert result["whole"]["fused"]["profiler_us"] == 0
    assert [layer["ms"] for layer in result["timelines"]["fused"]] == [2, 10, 0.5]
    assert sum(op["stock_ms"] for op in result["ops"]) == pytest.approx(9)


def test_layers_that_run_side_by_side_are_scaled(content):
    """Two layers of 6 ms in a profiled replay of 8, a plain one of 6."""
    kernels = [("a", ["/layers.0/Add"], 6.0), ("b", [], 6.0)]
    entries = [
        entry(content(v, "encoder"), v, "encoder", kernels, profiled_ms=[8.0], replay_ms=[6.0])
        for v in layers.VARIANTS
    ]
    (result,) = compare(raw(*entries))["comparisons"]
    whole = result["whole"]["stock"]
    assert [layer["ms"] for layer in result["timelines"]["stock"]] == pytest.approx([3, 3])
    assert (whole["side_by_side"], whole["profiler_us"]) == pytest.approx((1.5, 1000))
    assert "1.50x" in layers.whole_table(result)


@pytest.mark.parametrize(("amount", "level"), [(0, 0), (-1, 0), (1.5, 0.5), (3, 1), (4, 1.5), (5, 2), (6, 3)])
def test_level(amount: float, level: float):
    """Of 1, 2, 3 and 0: nobody gives more than it has."""
    found = layers._level([1.0, 2.0, 3.0, 0.0], amount)
    assert found == pytest.approx(level)
    assert sum(min(value, found) for value in (1, 2, 3)) == pytest.approx(max(amount, 0))


def test_parts_that_do_not_add_up_are_reported(content, tmp_path: Path, capsys):
    """The plain replay takes longer than what the profiler reports of all layers."""
    measured = node_by_node(content, "cross_kv")
    measured["measurements"][0]["replay_ms"] = [1.06 * measured["measurements"][0]["replay_ms"][0]]
    (tmp_path / RAW).write_text(json.dumps(measured))
    assert main(["--raw", str(tmp_path / RAW), "--out", str(tmp_path)]) == 1
    assert "do not add up to the engine's time: cross_kv, batch 1, stock: -5.7%" in capsys.readouterr().err


def test_a_failure_keeps_what_was_measured(content, tmp_path: Path):
    def measurements():
        yield from node_by_node(content, "cross_kv")["measurements"]
        raise RuntimeError("the GPU is gone")

    with pytest.raises(RuntimeError, match="gone"):
        measure_into(tmp_path / RAW, measurements(), ENVIRONMENT)
    assert main(["--raw", str(tmp_path / RAW), "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / layers.COMPARISON).read_text())["comparisons"]


@needs_plotly
def test_files(content, tmp_path: Path, capsys):
    steady = node_by_node(content, "encoder")
    for measurement in steady["measurements"]:
        for layer in measurement["layers"]:
            layer["times_ms"] = [1.0, 1.01, 0.99]
    path = tmp_path / RAW
    path.write_text(json.dumps(steady))
    assert main(["--raw", str(path), "--out", str(tmp_path)]) == 0
    assert "TrOCREncoderAttention" in capsys.readouterr().out
    assert json.loads((tmp_path / layers.COMPARISON).read_text()) == compare(steady)
    page = (tmp_path / layers.PAGE).read_text()
    assert "</html>" in page and "Plotly.newPlot" in page
    assert not re.search(r"<script[^>]*\ssrc=|<link[^>]*\shref=", page)  # self-contained


@needs_plotly
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here to draw the page with")
def test_page_is_drawn_by_a_browser(content, tmp_path: Path):
    (tmp_path / "page.html").write_text(layers.html(compare(node_by_node(content, "encoder"))))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # no network
    command += ["--dump-dom", (tmp_path / "page.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.count('class="main-svg"') >= 3  # a chart each, drawn
