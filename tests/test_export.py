"""The stock graphs: their contract (docs/design.md), how clean they are, and PyTorch's results from them."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from transformers import VisionEncoderDecoderModel

from graph_surgery.checkpoint import DTYPES, ModelSpec, load_model, load_spec
from graph_surgery.export import export, main
from tests.checkpoints import CASES

BUNDLED = Path(__file__).parent.parent / "models" / "trocr-tiny-printed"
ONNX_DTYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

# Float32 results in another order of summation, relative to the tensor's scale.
TOLERANCE = 1e-5

Exported = tuple[ModelSpec, VisionEncoderDecoderModel, dict[str, Path]]


@pytest.fixture(scope="module")
def exported(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """Specification, PyTorch model and ONNX files of a case of tests/checkpoints.py."""

    @cache
    def get(case: str, precision: str = "fp32") -> Exported:
        spec = load_spec(checkpoint(case))
        model = load_model(spec, DTYPES[precision])
        return spec, model, export(spec, model, precision, tmp_path_factory.mktemp("onnx"))

    return get


def run(file: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return dict(
        zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True)
    )


def assert_close(actual: np.ndarray, expected: torch.Tensor) -> None:
    expected = expected.numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def pixels(spec: ModelSpec, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, spec.encoder.image_height, spec.encoder.image_width, generator=generator)


def shapes(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[int | str]]]:
    """Name -> (type, dimensions) in the graph's order."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


@pytest.mark.parametrize("case", CASES)
def test_encoder_computes_what_pytorch_does(exported, case):
    spec, model, files = exported(case)
    for batch in (1, 3):
        images = pixels(spec, batch)
        with torch.no_grad():
            expected = model.encoder(images).last_hidden_state
        assert_close(run(files["encoder"], {"pixel_values": images.numpy()})["last_hidden_state"], expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_decoding_computes_what_pytorch_does_at_every_position(exported, case, batch):
    """All positions that the model has, each from the cache of the step before."""
    spec, model, files = exported(case)
    decoder = spec.decoder
    generator = torch.Generator().manual_seed(batch)
    with torch.no_grad():
        encoder_outputs = model.encoder(pixels(spec, batch))
    cross = run(files["cross_kv"], {"encoder_hidden_states": encoder_outputs.last_hidden_state.numpy()})
    session = onnxruntime.InferenceSession(files["decoder"], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    empty = np.zeros((batch, decoder.num_attention_heads, 0, decoder.head_dim), np.float32)
    past = {name.replace("present", "past_key_values"): empty for name in names[1:]}
    past |= {name.replace("present", "past_key_values"): value for name, value in cross.items()}
    input_ids = torch.full((batch, 1), spec.decoder_start_token_id)
    cache = None
    for position in range(decoder.max_position_embeddings):
        with torch.no_grad():
            expected = model(
                encoder_outputs=encoder_outputs,
                decoder_input_ids=input_ids,
                past_key_values=cache,
                use_cache=True,
            )
        cache = expected.past_key_values
        inputs = {"input_ids": input_ids.numpy(), "position_ids": np.full((batch, 1), position)}
        outputs = dict(zip(names, session.run(None, inputs | past), strict=True))
        assert_close(outputs["logits"], expected.logits)
        past |= {name.replace("present", "past_key_values"): outputs[name] for name in names[1:]}
        # Any token but the padding, which never occurs before the end of a text.
        input_ids = torch.randint(2, decoder.vocab_size, (batch, 1), generator=generator)

    for part, pairs in (("decoder", cache.self_attention_cache), ("encoder", cache.cross_attention_cache)):
        for layer, (key, value, *_) in enumerate(pairs):
            assert_close(past[f"past_key_values.{layer}.{part}.key"], key)
            assert_close(past[f"past_key_values.{layer}.{part}.value"], value)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", ["small", "base", "wide"])
def test_tensors_are_those_of_the_design(exported, case, precision):
    _, _, files = exported(case, precision)
    dtype = ONNX_DTYPES[precision]
    layers, width = 2, 128
    tokens, heads, head_dim = {"small": (11, 6, 32), "base": (10, 3, 64), "wide": (14, 6, 32)}[case]
    height, breadth = (32, 96) if case == "wide" else (48, 48)
    cross = ["batch", heads, tokens, head_dim]

    graph = onnx.load(files["encoder"]).graph
    assert shapes(graph.input) == {"pixel_values": (dtype, ["batch", 3, height, breadth])}
    assert shapes(graph.output) == {"last_hidden_state": (dtype, ["batch", tokens, width])}

    graph = onnx.load(files["cross_kv"]).graph
    assert shapes(graph.input) == {"encoder_hidden_states": (dtype, ["batch", tokens, width])}
    assert shapes(graph.output) == {
        f"present.{i}.encoder.{kind}": (dtype, cross) for i in range(layers) for kind in ("key", "value")
    }

    graph = onnx.load(files["decoder"]).graph
    inputs = {name: (TensorProto.INT64, ["batch", 1]) for name in ("input_ids", "position_ids")}
    outputs = {"logits": (dtype, ["batch", 1, 120])}
    for i in range(layers):
        for kind in ("key", "value"):
            past, present = f"past_key_values.{i}.decoder.{kind}", f"present.{i}.decoder.{kind}"
            inputs[past] = (dtype, ["batch", heads, "past_length", head_dim])
            inputs[f"past_key_values.{i}.encoder.{kind}"] = (dtype, cross)
            outputs[present] = (dtype, ["batch", heads, "past_length + 1", head_dim])
    assert shapes(graph.input) == inputs
    assert shapes(graph.output) == outputs


@pytest.mark.parametrize("case", CASES)
def test_graphs_hold_exactly_the_operators_of_the_maths(exported, case):
    spec, _, files = exported(case)
    counts = {
        name: Counter(node.op_type for node in onnx.load(file).graph.node) for name, file in files.items()
    }
    encoder, decoder = spec.encoder, spec.decoder

    layers = encoder.num_hidden_layers
    qkv_biases = 3 if encoder.qkv_bias else 0
    assert counts["encoder"] == Counter(
        {
            "Conv": 1,
            "Pad": 1,
            "MatMul": 8 * layers,  # q, k, v, scores, context, output, two of the MLP
            "LayerNormalization": 2 * layers + 1,
            "Softmax": layers,
            "Reshape": 4 * layers + 1,
            "Transpose": 4 * layers + 1,
            "Add": 1 + (3 + qkv_biases + 2 + 1) * layers,  # positions; biases, residuals, GELU's 1 +
            "Mul": 3 * layers,  # scale; GELU's x * and / 2
            "Div": layers,
            "Erf": layers,
        }
    )

    layers = decoder.num_hidden_layers
    projection = 1 if case == "projected" else 0
    assert counts["cross_kv"] == Counter(
        {
            "MatMul": 2 * layers + projection,
            "Add": 2 * layers + projection,
            "Reshape": 2 * layers,
            "Transpose": 2 * layers,
        }
    )

    gelu = {"Add": layers, "Mul": 2 * layers, "Div": layers, "Erf": layers}
    assert counts["decoder"] == Counter(
        {
            "Gather": 2,
            "MatMul": 12 * layers + 1,
            "LayerNormalization": 3 * layers + decoder.layernorm_embedding,
            "Softmax": 2 * layers,
            "Reshape": 6 * layers,  # q, k, v, context of the text; q, context of the image
            "Transpose": 2 * layers,  # keys
            "Concat": 2 * layers,
            "Add": 1 + (8 + 3) * layers,
            "Mul": 2 * layers + decoder.scale_embedding,
        }
    ) + Counter(gelu if decoder.activation_function == "gelu" else {"Relu": layers})


def test_encoder_of_the_bundled_checkpoint_is_as_clean_as_measured(tmp_path):
    """The counts of the clean export that the stock baseline was measured with (12 layers, as in small)."""
    spec = load_spec(BUNDLED)
    files = export(spec, load_model(spec), "fp32", tmp_path)
    counts = Counter(node.op_type for node in onnx.load(files["encoder"]).graph.node)
    clean = {"MatMul": 96, "LayerNormalization": 25, "Softmax": 12, "Erf": 12, "Conv": 1}
    assert {op: counts[op] for op in clean} == clean
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cross_kv.onnx",
        "decoder.onnx",
        "encoder.onnx",
    ]


@pytest.mark.parametrize("case", ["small", "base"])
def test_weights_and_nodes_are_named_after_modules(exported, case):
    _, model, files = exported(case)
    graph = onnx.load(files["encoder"]).graph
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    attention = model.encoder.layers[1].attention
    np.testing.assert_array_equal(
        weights["layers.1.attention.q_proj.weight"], attention.q_proj.weight.detach().numpy().T
    )
    assert len(weights) == len(graph.initializer)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {
        "/layers.1/attention/q_proj/MatMul",
        "/layers.1/attention/Softmax",
        "/layers.1/mlp/fc1/MatMul",
    } <= {*names}

    graph = onnx.load(files["decoder"]).graph
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in graph.initializer}
    np.testing.assert_array_equal(
        weights["output_projection.weight"], model.decoder.output_projection.weight.detach().numpy().T
    )
    assert {"/layers.1/self_attn/Softmax", "/layers.1/encoder_attn/Softmax", "/output_projection/MatMul"} <= {
        node.name for node in graph.node
    }


def test_shared_weights_are_shared_without_a_node(checkpoint, tmp_path):
    """The exporter points those that share memory at one of them by way of Identity nodes."""
    spec = load_spec(checkpoint("small"))
    model = load_model(spec)
    for layer in model.encoder.layers:
        layer.layernorm_before.weight = model.encoder.layers[0].layernorm_before.weight
    files = export(spec, model, "fp32", tmp_path)
    graph = onnx.load(files["encoder"]).graph
    norms = [node for node in graph.node if node.name.endswith("layernorm_before/LayerNormalization")]
    assert len({node.input[1] for node in norms}) == 1
    assert "Identity" not in {node.op_type for node in graph.node}
    images = pixels(spec, 1)
    with torch.no_grad():
        expected = model.encoder(images).last_hidden_state
    assert_close(run(files["encoder"], {"pixel_values": images.numpy()})["last_hidden_state"], expected)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", ["small", "base", "base-stage1"])
def test_precision_is_that_of_all_weights(exported, case, precision):
    _, _, files = exported(case, precision)
    for name, file in files.items():
        model = onnx.load(file)
        # Full checking includes types, and by the standard Conv takes bfloat16 from opset 22 on.
        onnx.checker.check_model(model, full_check=(name, precision) != ("encoder", "bf16"))
        types = {weight.data_type for weight in model.graph.initializer}
        assert types == {ONNX_DTYPES[precision], TensorProto.INT64}  # int64: shapes
        assert "Cast" not in {node.op_type for node in model.graph.node}


def test_half_precision_graphs_compute_in_half_precision(exported):
    spec, _, files = exported("small", "fp16")
    _, model, _ = exported("small")
    images = pixels(spec, 2)
    with torch.no_grad():
        expected = model.encoder(images).last_hidden_state.numpy()
    actual = run(files["encoder"], {"pixel_values": images.half().numpy()})["last_hidden_state"]
    assert actual.dtype == np.float16
    assert 0 < np.abs(actual - expected).max() <= 0.01 * np.abs(expected).max()


def test_metadata_tells_the_passes_what_they_need(exported):
    _, _, files = exported("small", "bf16")
    metadata = {
        name: {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        for name, file in files.items()
    }
    assert metadata == {
        "encoder": {
            "trocr.graph": "encoder",
            "trocr.precision": "bf16",
            "trocr.num_heads": "2",
            "trocr.pixels": "normalised",
        },
        "cross_kv": {"trocr.graph": "cross_kv", "trocr.precision": "bf16", "trocr.num_heads": "6"},
        "decoder": {
            "trocr.graph": "decoder",
            "trocr.precision": "bf16",
            "trocr.num_heads": "6",
            "trocr.cache": "growing",
        },
    }


def test_precision_must_be_that_of_the_model(exported, tmp_path):
    spec, model, _ = exported("small")
    with pytest.raises(ValueError, match=r"float32.*fp16"):
        export(spec, model, "fp16", tmp_path)


def test_command_writes_the_graphs(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main(["--model", str(checkpoint("small")), "--precision", "fp16", "--out", str(out)]) == 0
    files = [out / f"{name}.onnx" for name in ("encoder", "cross_kv", "decoder")]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    assert sorted(out.iterdir()) == sorted(files)


def test_command_reports_a_bad_checkpoint(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path} is empty")
    assert not (tmp_path / "out").exists()
