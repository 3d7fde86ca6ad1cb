"""Every layer's output against PyTorch in float32: real graphs, and an error put into one layer."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from graph_surgery.checkpoint import load_spec
from profiling.tensors import (
    FILES,
    OnnxRuntimeRunner,
    TensorsError,
    Unavailable,
    compare,
    errors,
    graph_tensors,
    greedy_tokens,
    main,
    torch_tensors,
)

STEPS = 3
SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def test_spreads():
    expected = torch.zeros(1000)
    expected[:10] = 10.0  # root mean square 1
    found = expected.clone()
    found[0] += 0.5
    found[500:] += 0.01
    absolute, relative = compare(found, expected)
    assert absolute.maximum == pytest.approx(0.5)
    assert absolute.mean == pytest.approx((0.5 + 500 * 0.01) / 1000)
    assert absolute.p99 == pytest.approx(0.01)
    assert relative.maximum == pytest.approx(0.05)  # 0.5 of 10
    assert relative.p99 == pytest.approx(0.01)  # of zeros: by the root mean square
    assert compare(expected, expected)[1].maximum == 0
    assert np.isnan(compare(torch.full((4,), torch.nan), torch.ones(4))[0].maximum)
    with pytest.raises(TensorsError, match=r"\[3\] and \[4\]"):
        compare(torch.ones(3), torch.ones(4))


@pytest.fixture(scope="module")
def case(checkpoint):
    """A checkpoint's description, pixels, the decoder's inputs and the expected tensors, by name."""

    def make(name: str):
        spec = load_spec(checkpoint(name))
        shape = (2, 3, spec.encoder.image_height, spec.encoder.image_width)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        tokens = greedy_tokens(spec, pixels, STEPS)
        return spec, pixels, tokens, torch_tensors(spec, "fp32", pixels, tokens)

    return make


@pytest.mark.parametrize("plugins", ["none", "fused", "all"])
@pytest.mark.parametrize("name", ["small", "base", "large-printed", "projected"])
def test_all_tensors_agree_in_float32(case, checkpoint, graphs, name: str, plugins: str):
    spec, pixels, tokens, expected = case(name)
    found = graph_tensors(
        OnnxRuntimeRunner(graphs(checkpoint(name), plugins), spec, "fp32", STEPS), pixels, tokens
    )
    assert list(found)[-STEPS:] == [f"logits, step {step}" for step in range(STEPS)]
    assert found.keys() == expected.keys()
    for tensor in expected:
        assert compare(found[tensor], expected[tensor])[1].maximum < 2e-4, tensor


def test_an_error_shows_from_its_layer_on(case, checkpoint, graphs, tmp_path: Path):
    spec, pixels, tokens, expected = case("small")
    for file in graphs(checkpoint("small"), "none").glob("*.onnx"):
        model = onnx.load(file)
        for weight in model.graph.initializer:
            if file.name == "decoder.onnx" and weight.name == "layers.1.fc1.weight":
                spoilt = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
                weight.CopyFrom(onnx.numpy_helper.from_array(spoilt, weight.name))
        onnx.save(model, tmp_path / file.name)
    found = graph_tensors(OnnxRuntimeRunner(tmp_path, spec, "fp32", STEPS), pixels, tokens)
    worst = {name: compare(found[name], expected[name])[1].maximum for name in expected}
    wrong = {name for name, error in worst.items() if error > 2e-4}
    assert wrong == {"decoder layer 1", *(f"logits, step {step}" for step in range(STEPS))}


def test_errors(case, checkpoint, graphs, tmp_path: Path):
    spec, *_ = case("small")
    folder = graphs(checkpoint("small"), "none")
    with pytest.raises(Unavailable, match="bfloat16"):
        OnnxRuntimeRunner(folder, spec, "bf16", STEPS)
    for file in folder.glob("*.onnx"):
        model = onnx.load(file)
        for node in model.graph.node:
            node.output[:] = [name.replace("/layers.1/Add_1_output_0", "renamed") for name in node.output]
        onnx.save(model, tmp_path / file.name)
    with pytest.raises(TensorsError, match=r"encoder\.onnx: no tensor /layers\.1/Add_1_output_0"):
        OnnxRuntimeRunner(tmp_path, spec, "fp32", STEPS)


def test_fp8_is_compared_where_it_is(checkpoint, tmp_path: Path):
    """Of the fused graphs only; errors begin in the encoder's first layer, and are not those of float16."""
    images = sorted(SAMPLES.glob("*.jpg"))[:2]
    arguments = (["stock", "fused", "torch"], ["fp16", "fp8"], "onnxruntime", images, STEPS, tmp_path)
    found = list(errors(checkpoint("small"), *arguments))
    reasons = [entry for entry in found if isinstance(entry, str)]
    assert reasons == [f"{variant} fp8: fp8 is the fused encoder's alone" for variant in ("stock", "torch")]
    medians = {
        entry.precision: entry.relative.median
        for entry in found
        if not isinstance(entry, str) and (entry.variant, entry.tensor) == ("fused", "encoder layer 0")
    }
    assert medians["fp16"] < 2e-3 < medians["fp8"] < 0.1


@pytest.mark.slow
def test_command_line(tmp_path: Path, capsys):
    arguments = ["--most", "1", "--steps", "2", "--variants", "stock,fused", "--precision", "fp32"]
    assert main([*arguments, "--out", str(tmp_path / "out"), "--engines", str(tmp_path / "graphs")]) == 0
    content = json.loads((tmp_path / "out" / FILES[0]).read_text())
    assert {error["variant"] for error in content["errors"]} == {"stock", "fused"}
    assert max(error["relative"]["maximum"] for error in content["errors"]) < 1e-3
    assert "## fp32, fused" in (tmp_path / "out" / FILES[1]).read_text()
    assert "encoder layer 0" not in capsys.readouterr().err
