"""TensorRT's ONNX parser takes an operator of another domain for the standard one of the same name.

Needs no GPU: TensorRT-RTX, which shares the parser's lookup, has a builder that works without one.
pip install --no-deps tensorrt-rtx-cu13-libs==1.6.1.120 tensorrt-rtx-cu13-bindings==1.6.1.120
"""

import ctypes
import importlib.util
from pathlib import Path

from onnx import TensorProto, helper

for library in sorted(
    Path(importlib.util.find_spec("tensorrt_rtx_libs").origin).parent.glob("*.so*"), reverse=True
):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt  # noqa: E402 - after its libraries

logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
builder = trt.Builder(logger)
print("TensorRT-RTX", trt.__version__)
for op in ("Relu", "NoSuchOp"):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain="mine")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model.SerializeToString()):
        print(f"mine::{op}: parsed as", [network.get_layer(i).type.name for i in range(network.num_layers)])
    else:
        print(f"mine::{op}:", parser.get_error(0).desc())
