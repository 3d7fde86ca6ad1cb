"""ONNX Runtime refuses a call of a local function without its last output; ONNX's checker does not."""

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
body = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Abs", ["x"], ["b"])]
function = helper.make_function("mine", "Two", ["x"], ["a", "b"], body, opsets[:1])
print("onnx", onnx.__version__, "onnxruntime", ort.__version__)
for outputs in (["y", "z"], ["y", ""], ["y"]):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Two", ["x"], outputs, domain="mine")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9)
    onnx.checker.check_model(model)
    try:
        session = ort.InferenceSession(model.SerializeToString())
        print(outputs, "->", session.run(None, {"x": np.float32([1, -2])})[0])
    except Exception as error:  # ONNX Runtime has no common class of errors
        print(outputs, "->", error)
