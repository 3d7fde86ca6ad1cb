"""ONNX's shape inference loses a symbolic dimension at a Reshape to [-1, ...]; with a number it does not."""

import onnx
from onnx import TensorProto, helper

print("onnx", onnx.__version__)
for batch in ("batch", 3):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 5, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [-1, 5, 2, 4])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [shape]), opset_imports=[helper.make_opsetid("", 18)]
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0]
    dims = [dim.dim_param or dim.dim_value for dim in inferred.type.tensor_type.shape.dim]
    print(f"[{batch}, 5, 8] reshaped to [-1, 5, 2, 4]:", dims)
