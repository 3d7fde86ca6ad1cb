"""Small ONNX graphs to try the passes on, and running them on ONNX Runtime."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime

from graph_surgery.fuse import attach_functions, export_graph, import_graph
from graph_surgery.passes import PASSES, PassReport

OPSET = 17


class GraphBuilder:
    """Writes a graph node by node. Tensors are named after the node that makes them, or as told."""

    def __init__(self, opset: int = OPSET):
        self.opset = opset
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], dtype: int = onnx.TensorProto.FLOAT) -> str:
        self.inputs.append(onnx.helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str] | None) -> str:
        """Make a tensor an output; its shape is inferred if it is None."""
        self.outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return name

    def constant(self, value: np.ndarray | Sequence[int] | float) -> str:
        """A constant: floats become float32, ints int64."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.normal(size=shape))

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: object) -> str:
        """Add a node; returns its (first) output."""
        name = f"/block/{op}_{len(self.nodes)}"
        output = output or f"{name}_output_0"
        self.nodes.append(onnx.helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def commutative(self, op: str, a: str, b: str, swap: bool) -> str:
        return self(op, b, a) if swap else self(op, a, b)

    def model(self) -> onnx.ModelProto:
        graph = onnx.helper.make_graph(self.nodes, "block", self.inputs, self.outputs, self.constants)
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", self.opset)], ir_version=8
        )
        model = onnx.shape_inference.infer_shapes(model)
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
        return model


def run_pass(plugin: str, model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
    """The model after one pass, with its functions, and the pass's report."""
    graph = import_graph(model)
    report = PASSES[plugin].run(graph)
    fused = export_graph(graph, model, {})
    attach_functions(fused)
    onnx.checker.check_model(fused)
    return fused, report


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name on ONNX Runtime's CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Max abs difference, relative to the scale of the expected tensor."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    assert np.isfinite(expected).all()
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
