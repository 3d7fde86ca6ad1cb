"""Stock ONNX -> fused ONNX: runs passes over a model's graphs and checks that each fired as often as it must.

    python -m graph_surgery.fuse --in STOCK_DIR --out FUSED_DIR --plugins fused --model CHECKPOINT
    python -m graph_surgery.fuse ... --for-tensorrt && trtexec --onnx=FUSED_DIR/encoder.onnx --stronglyTyped \
        --dynamicPlugins=build/libtrocr_plugins.so

A fused graph runs as it is on ONNX Runtime, for it carries the definition of every fused op as a local
function. TensorRT takes the copy that `strip_functions` makes. The graph's metadata says what was done:

    trocr.plugins    the `--plugins` names of the fused ops, separated by commas
    trocr.replaced   JSON, for every new node the names of the stock nodes whose work it does
    trocr.cache      "fixed" once decoder self-attention is fused, see docs/design.md
    trocr.pixels     "uint8" once the patch embedding is fused, see docs/design.md
    trocr.ranges     of an encoder in fp8, see graph_surgery/fp8.py
"""

import argparse
import json
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype
from onnx_graphsurgeon.logger import G_LOGGER
from tqdm import tqdm

from graph_surgery.checkpoint import CheckpointError, ModelSpec, load_spec
from graph_surgery.fused_ops import DOMAIN, FP8_TYPE, FUSED_OPS, VERSION, SurgeryError, parse_plugins
from graph_surgery.passes import PASSES, PassReport

GRAPHS = ("encoder", "cross_kv", "decoder")

# Local functions whose attributes have defaults came with this version of the file format.
FUNCTION_IR_VERSION = 9

# Protocol buffers end at 2 GB; nodes and functions need little beside the weights.
MAX_INLINE_BYTES = 2_000_000_000

PIXELS_A_WORD = 4
FP8_A_HALF = 2  # numbers of e4m3 in the place of one of float16

# Stand-ins for dynamic dimensions, (first, step) in each of two runs: see _infer_shapes.
PROBES = ((1009, 10), (2003, 30))

# graphsurgeon warns that it would convert bfloat16 weights to another type. It does not any more: onnx hands
# it arrays of ml_dtypes.bfloat16, which it writes as they are (tests/test_fuse.py holds it to that).
G_LOGGER.severity = G_LOGGER.ERROR


def fuse(
    models: Mapping[str, onnx.ModelProto], spec: ModelSpec, plugins: Collection[str]
) -> dict[str, onnx.ModelProto]:
    """Fuse the graphs of one model.

    `models` are by name (encoder, cross_kv, decoder), `plugins` are the names that `--plugins` takes. Returns
    new models; those given keep their nodes. Raises SurgeryError where a pass fires more or less often than
    the checkpoint's configuration lets one expect.
    """
    progress = tqdm(models.items(), desc=f"fuse {spec.name}", unit="graph", disable=None)
    return {name: fuse_graph(name, model, spec, plugins) for name, model in progress}


def fuse_graph(
    name: str, model: onnx.ModelProto, spec: ModelSpec, plugins: Collection[str]
) -> onnx.ModelProto:
    """Fuse one graph of a model, see `fuse`."""
    graph = import_graph(model)
    fired: list[str] = []
    replaced: dict[str, list[str]] = {}
    for plugin in (plugin for plugin in PASSES if plugin in plugins):
        fusion = PASSES[plugin].for_model(spec)
        expected = fusion.expected(spec, fired).get(name, 0)
        if expected:
            report = fusion.run(graph)
            _check_count(name, plugin, expected, report)
            fired.append(plugin)
            for new, nodes in report.replaced.items():  # a later pass may replace an earlier one's nodes
                replaced[new] = [stock for node in nodes for stock in replaced.pop(node, [node])]
    metadata = {"trocr.plugins": ",".join(fired), "trocr.replaced": json.dumps(replaced)}
    if "decoder_self_attention" in fired:
        metadata["trocr.cache"] = "fixed"
    if "patch_embedding" in fired:
        metadata["trocr.pixels"] = "uint8"
    fused = export_graph(graph, model, metadata)
    attach_functions(fused)
    return fused


def _check_count(name: str, plugin: str, expected: int, report: PassReport) -> None:
    found = len(report.fused)
    if found == expected:
        return
    reasons = [f"  {anchor}: {reason}" for anchor, reason in report.rejected.items()]
    anchors = ", ".join(sorted(PASSES[plugin].anchors))
    raise SurgeryError(
        f"{name}.onnx: {plugin} fired {found} times, expected {expected} for this model; "
        f"leave {plugin} out of --plugins, or export the graph anew. Not fused were\n"
        + ("\n".join(reasons) or f"  no other node ({anchors})")
    )


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """The graph for the passes: tensors know type and shape; equal symbols in shapes are equal sizes."""
    graph = gs.import_onnx(model)
    graph.import_domains = list(model.opset_import)  # exporting adds to it: not to the given model's
    tensors = graph.tensors()
    for name, (dtype, shape) in _infer_shapes(model).items():
        if isinstance(tensors.get(name), gs.Variable):
            tensors[name].dtype, tensors[name].shape = dtype, shape
    return graph


def export_graph(graph: gs.Graph, stock: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The model of a graph made by `import_graph(stock)`, with the metadata of both."""
    model = gs.export_onnx(graph)
    del model.graph.value_info[:]  # the inferred shapes: only the passes need them
    stock_metadata = {entry.key: entry.value for entry in stock.metadata_props}
    onnx.helper.set_model_props(model, stock_metadata | metadata)
    return model


def attach_functions(model: onnx.ModelProto) -> None:
    """Give `model` the definitions of the fused ops in it, so that ONNX Runtime can run it."""
    names = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    if not names:
        return
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    model.functions.extend(op.function(opsets[""]) for name, op in FUSED_OPS.items() if name in names)
    model.ir_version = max(model.ir_version, FUNCTION_IR_VERSION)
    if DOMAIN not in opsets:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, int(VERSION)))


def strip_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The copy for TensorRT, without the local functions.

    TensorRT 10.6 would take a function rather than the plugin of the same name. Outputs that a function must
    have and a plugin omits (nameless ones at the end), and attributes that only a function has, go too.
    TensorRT's plugins have neither uint8 nor e4m3: pixels uint8 [.., width] become int32 [.., width / 4], and
    weights e4m3 [N, K] float16 [N, K / 2], as e4m3 tensors between plugins do: the same bytes.
    """
    stripped = onnx.ModelProto()
    stripped.CopyFrom(model)
    del stripped.functions[:]
    for node in stripped.graph.node:
        while node.output[-1] == "":
            node.output.pop()
        if node.domain == DOMAIN:
            absent = {a.name for a in FUSED_OPS[node.op_type].attributes if not a.for_plugin}
            kept = [attribute for attribute in node.attribute if attribute.name not in absent]
            del node.attribute[:]
            node.attribute.extend(kept)
    for value in stripped.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT32
            value.type.tensor_type.shape.dim[-1].dim_value //= PIXELS_A_WORD
    for weight in stripped.graph.initializer:
        if weight.data_type == FP8_TYPE:
            weight.data_type = onnx.TensorProto.FLOAT16
            weight.dims[-1] //= FP8_A_HALF
    return stripped


def _infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[np.dtype | int, list[int | str]]]:
    """Type and shape of every tensor that ONNX's inference can tell.

    Its symbolic inference loses a dynamic dimension at the first Reshape to [-1, ...]; with numbers it does
    not. So every symbol gets a number, twice: a dimension that is the same in both runs is constant, and two
    dimensions that are equal in both runs are equal. They get the symbol of the input or output that has
    them, or else a name of both numbers.
    """
    names = dict.fromkeys(
        dim.dim_param
        for value in model.graph.input
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    )
    runs = []
    for base, step in PROBES:
        sizes = {name: base + step * index for index, name in enumerate(names)}
        runs.append(_infer_shapes_with(model, sizes))
    first, second = runs

    symbols = {}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in first:
            dims = zip(
                value.type.tensor_type.shape.dim, first[value.name][1], second[value.name][1], strict=True
            )
            symbols |= {(a, b): dim.dim_param for dim, a, b in dims if dim.dim_param}

    def merge(a: int, b: int) -> int | str:
        return a if a == b else symbols.get((a, b), f"{a}|{b}")

    return {
        name: (dtype, [merge(a, b) for a, b in zip(dims, second[name][1], strict=True)])
        for name, (dtype, dims) in first.items()
    }


def _infer_shapes_with(
    model: onnx.ModelProto, sizes: Mapping[str, int]
) -> dict[str, tuple[np.dtype | int, list[int]]]:
    """Types and shapes with these numbers for the inputs' symbols; without tensors of unknown shape."""
    # Inference gets no weights, only the small constants that are shapes: it copies what it gets, 2 GB at
    # most.
    slim = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    slim.graph.name = model.graph.name
    slim.graph.node.extend(model.graph.node)
    slim.graph.input.extend(model.graph.input)
    for value in slim.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    for constant in model.graph.initializer:
        if constant.data_type == onnx.TensorProto.INT64:
            slim.graph.initializer.append(constant)
        else:
            slim.graph.input.append(
                onnx.helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims)
            )
    for value in model.graph.output:
        slim.graph.output.append(
            onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, None)
        )
    inferred = onnx.shape_inference.infer_shapes(slim, data_prop=True).graph
    shapes = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = (get_onnx_tensor_dtype(value), [dim.dim_value for dim in tensor.shape.dim])
    return shapes


def load(folder: Path) -> dict[str, onnx.ModelProto]:
    """The graphs of one model, by name. Raises SurgeryError for a file that is missing or is no ONNX file."""
    models = {}
    for name in GRAPHS:
        file = folder / f"{name}.onnx"
        if not file.is_file():
            raise SurgeryError(f"{file} does not exist; export the checkpoint first (graph_surgery.export)")
        try:
            models[name] = onnx.load(file)
        except (DecodeError, OSError, onnx.checker.ValidationError) as error:
            raise SurgeryError(
                f"{file} cannot be read as ONNX ({error}); export the checkpoint again"
            ) from error
    return models


def save(model: onnx.ModelProto, file: Path) -> Path:
    """Write the file whole or not at all. Weights beyond what one ONNX file holds go into FILE.data."""
    partial = file.with_name(file.name + ".partial")
    if sum(len(weight.raw_data) for weight in model.graph.initializer) <= MAX_INLINE_BYTES:
        onnx.save(model, partial)
    else:
        data = file.with_name(file.name + ".data")
        data.unlink(missing_ok=True)  # onnx appends
        # Saving moves the weights out of the model it is given.
        outlined = onnx.ModelProto()
        outlined.CopyFrom(model)
        onnx.save(outlined, partial, save_as_external_data=True, location=data.name)
    os.replace(partial, file)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuse the stock ONNX graphs of a TrOCR checkpoint.")
    parser.add_argument("--in", dest="source", type=Path, required=True, help="folder of the stock graphs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the fused graphs to")
    parser.add_argument(
        "--plugins", default="fused", help="names or groups, separated by commas (default: fused)"
    )
    parser.add_argument("--model", help="checkpoint of the graphs (default: the config.json beside them)")
    parser.add_argument(
        "--for-tensorrt", action="store_true", help="leave out the ops' definitions: graphs for trtexec"
    )
    arguments = parser.parse_args()
    try:
        plugins = parse_plugins(arguments.plugins)
        spec = load_spec(arguments.model or arguments.source)
        fused = fuse(load(arguments.source), spec, plugins)
    except (CheckpointError, SurgeryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, model in fused.items():
        model = strip_functions(model) if arguments.for_tensorrt else model
        print(save(model, arguments.out / f"{name}.onnx"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
