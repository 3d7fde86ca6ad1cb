"""The variants that stand for other ways to run a checkpoint: naive export, and TensorRT-RTX's loading."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from graph_surgery.checkpoint import load_model, load_spec
from profiling.peers import naive_encoder, naive_folder
from profiling.records import ROOT
from runtime.tensorrt_loader import TensorRTError, load_tensorrt_rtx

pytest.importorskip("onnxscript", reason="no onnxscript here: make setup")


def test_naive_export_computes_the_encoder(checkpoint):
    """Of Hugging Face's own module, for any batch; with the guards that the clean export leaves out."""
    spec = load_spec(checkpoint("small"))
    graph = naive_encoder(spec, "fp32")
    (pixels,) = graph.graph.input
    assert (pixels.name, pixels.type.tensor_type.shape.dim[0].dim_param) == ("pixel_values", "batch")
    assert "IsNaN" in {node.op_type for node in graph.graph.node}
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = torch.randn(3, 3, spec.encoder.image_height, spec.encoder.image_width)
    (found,) = session.run(None, {"pixel_values": inputs.numpy()})
    with torch.no_grad():
        expected = load_model(spec).encoder(pixel_values=inputs).last_hidden_state.numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_naive_folder_is_beside_the_others():
    assert naive_folder("models/x", "fp16") == Path("engines/x-fp16-naive")


@pytest.mark.parametrize(
    ("loaded", "message"),
    [(None, "Python module tensorrt_rtx: not installed"), ("tensorrt_bindings", "a process of its own")],
)
def test_tensorrt_rtx_is_loaded_alone(monkeypatch, loaded: str | None, message: str):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorrt", "tensorrt_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if loaded:
        monkeypatch.setitem(sys.modules, loaded, None)
    with pytest.raises(TensorRTError, match=message):
        load_tensorrt_rtx.__wrapped__()


def test_engines_need_a_model(tmp_path: Path):
    command = [sys.executable, "-m", "profiling.peers", "--model", str(tmp_path / "nothing")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and "nothing" in result.stderr
