"""Fusing exported models: how often every pass fires, equal results, and what is written."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from graph_surgery import fuse as fuse_module
from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint
from graph_surgery.checkpoint import DTYPES, ModelSpec, load_model, load_normalization, load_spec
from graph_surgery.export import export
from graph_surgery.fuse import GRAPHS, fuse, fuse_graph, load, save, strip_functions
from graph_surgery.fused_ops import PLUGINS, SurgeryError, parse_plugins
from tests.checkpoints import CASES, ENCODER, SMALL_DECODER
from tests.small_graphs import assert_close, run

# Fused nodes in encoder.onnx and decoder.onnx, counted by hand: two decoder layers everywhere, two encoder
# layers but three in large. `linear`: four products an encoder layer; it takes what `layernorm` and
# `bias_activation` find without it. `layernorm`: two an encoder layer and the final one, three a decoder
# layer, one for embeddings.
TWO, THREE = (
    {"patch_embedding": 1, "encoder_attention": layers, "linear": 4 * layers, "layernorm": 1}
    for layers in (2, 3)
)
TWO_SINGLE, THREE_SINGLE = (
    {
        "patch_embedding": 1,
        "encoder_attention": layers,
        "linear": 6 * layers + 1,  # queries, keys and values apart, and the first statistics
        "layernorm": 2 * layers + 1,
        "bias_activation": layers,
    }
    for layers in (2, 3)
)
DECODER = {"decoder_self_attention": 2, "cross_attention": 2, "layernorm": 6, "bias_activation": 2}
CROSS_KV = {"cross_key_value": 2}
DECODER_WITH_EMBEDDING = DECODER | {"layernorm": 7}
FIRINGS = {
    "small": (TWO, DECODER_WITH_EMBEDDING),
    "base": (TWO, DECODER_WITH_EMBEDDING),
    "base-stage1": (TWO, DECODER),
    "large": (THREE, DECODER_WITH_EMBEDDING),
    "large-printed": (THREE, DECODER),
    "wide": (TWO, DECODER_WITH_EMBEDDING),
    "projected": (TWO, DECODER_WITH_EMBEDDING),
    "small-inverted": (TWO, DECODER),
    "base-inverted": (TWO, DECODER),
}
CAPACITY = 8

Stock = Callable[..., tuple[ModelSpec, dict[str, onnx.ModelProto]]]


@pytest.fixture(scope="module")
def stock(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Description and stock graphs of a checkpoint of tests/checkpoints.py. Only to be read."""

    @cache
    def exported(name: str, precision: str = "fp32") -> tuple[ModelSpec, dict[str, onnx.ModelProto]]:
        spec = load_spec(checkpoint(name))
        folder = tmp_path_factory.mktemp(f"{name}-{precision}")
        export(spec, load_model(spec, DTYPES[precision]), precision, folder)
        return spec, load(folder)

    return exported


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Fused nodes by their names in `--plugins`."""
    counts = Counter(node.op_type for node in model.graph.node if node.domain == "trocr")
    found = {plugin: sum(counts[op.name] for op in ops) for plugin, ops in PLUGINS.items()}
    return {plugin: count for plugin, count in found.items() if count}


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def random_images(model: onnx.ModelProto, spec: ModelSpec, batch: int) -> dict[str, np.ndarray]:
    """The encoder's input: the same images, uint8 or normalised as the graph takes them."""
    size = (batch, 3, spec.encoder.image_height, spec.encoder.image_width)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    elem_type = model.graph.input[0].type.tensor_type.elem_type
    if elem_type != onnx.TensorProto.UINT8:
        values = load_normalization(spec)(torch.from_numpy(pixels)).numpy()
        pixels = values.astype(onnx.helper.tensor_dtype_to_np_dtype(elem_type))
    return {"pixel_values": pixels}


def encode(
    models: dict[str, onnx.ModelProto], spec: ModelSpec, batch: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Encoder states, and cross-attention's keys and values as inputs of the decoder."""
    states = run(models["encoder"], random_images(models["encoder"], spec, batch))["last_hidden_state"]
    cross = run(models["cross_kv"], {"encoder_hidden_states": states})
    return states, {
        name.replace("present", "past_key_values"): np.asarray(value) for name, value in cross.items()
    }


def decode_alone(
    decoder: onnx.ModelProto, spec: ModelSpec, cross: dict[str, np.ndarray], tokens: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Feed the stock graph one row's tokens; its outputs after each."""
    empty = np.zeros((1, spec.decoder.num_attention_heads, 0, spec.decoder.head_dim), np.float32)
    layers = range(spec.decoder.num_hidden_layers)
    past = {f"past_key_values.{layer}.decoder.{kind}": empty for layer in layers for kind in ("key", "value")}
    steps = []
    for position, token in enumerate(tokens):
        ids = {"input_ids": np.array([[token]]), "position_ids": np.array([[position]])}
        steps.append(run(decoder, ids | past | cross))
        past = {name: steps[-1][name.replace("past_key_values", "present")] for name in past}
    return steps


def check_decoder(
    stock_decoder: onnx.ModelProto,
    fused_decoder: onnx.ModelProto,
    spec: ModelSpec,
    cross: dict[str, np.ndarray],
) -> None:
    """Four fused steps of three rows, starting at positions 0, 3 and 1, against the rows decoded alone.

    What the fixed cache holds beyond a row's position is NaN, so any use of it shows.
    """
    starts, num_steps = [0, 3, 1], 4
    tokens = np.random.default_rng(1).integers(0, spec.decoder.vocab_size, (len(starts), CAPACITY))
    alone = [
        decode_alone(
            stock_decoder,
            spec,
            {name: value[row : row + 1] for name, value in cross.items()},
            tokens[row, : start + num_steps],
        )
        for row, start in enumerate(starts)
    ]
    shape = (len(starts), spec.decoder.num_attention_heads, CAPACITY, spec.decoder.head_dim)
    names = [name for name in alone[0][0] if name != "logits"]
    past = {name: np.full(shape, np.nan, np.float32) for name in names}
    for row, start in enumerate(starts):
        for name in names if start else ():
            past[name][row, :, :start] = alone[row][start - 1][name][0]

    for step in range(num_steps):
        positions = [start + step for start in starts]
        feeds = {
            "input_ids": tokens[range(len(starts)), positions][:, None],
            "position_ids": np.array(positions)[:, None],
            **{name.replace("present", "past_key_values"): value for name, value in past.items()},
            **cross,
        }
        past = run(fused_decoder, feeds)
        logits = past.pop("logits")
        for row, position in enumerate(positions):
            expected = alone[row][position]
            assert_close(logits[row], expected["logits"][0])
            for name in names:
                assert_close(past[name][row, :, : position + 1], expected[name][0])


def test_every_case_is_counted():
    assert FIRINGS.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_all_passes(stock, name):
    """Exact firings and equal results with everything fused."""
    spec, models = stock(name)
    fused = fuse(models, spec, parse_plugins("all"))
    encoder_firings, decoder_firings = FIRINGS[name]
    assert op_counts(fused["encoder"]) == encoder_firings
    assert op_counts(fused["decoder"]) == decoder_firings
    assert op_counts(fused["cross_kv"]) == CROSS_KV
    for model in fused.values():
        onnx.checker.check_model(model)

    states, cross = encode(models, spec, batch=3)
    fused_states, fused_cross = encode(fused, spec, batch=3)
    assert_close(fused_states, states)
    for kind, value in cross.items():
        assert_close(fused_cross[kind], value)
    check_decoder(models["decoder"], fused["decoder"], spec, cross)


@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize(
    ("name", "encoder_firings"),
    [("small", TWO_SINGLE), ("base", TWO_SINGLE), ("large-printed", THREE_SINGLE)],
)
def test_each_pass_alone(stock, name, encoder_firings, plugin):
    spec, models = stock(name)
    fused = fuse(models, spec, {plugin})
    expected = {"encoder": encoder_firings, "cross_kv": CROSS_KV, "decoder": FIRINGS[name][1]}
    for graph, firings in expected.items():
        assert op_counts(fused[graph]) == {op: count for op, count in firings.items() if op == plugin}
        used = {node.op_type for node in fused[graph].graph.node if node.domain == "trocr"}
        assert sorted(function.name for function in fused[graph].functions) == sorted(used)
    states, cross = encode(models, spec, batch=3)
    fused_states, fused_cross = encode(fused, spec, batch=3)
    assert_close(fused_states, states)
    for kind, value in cross.items():
        assert_close(fused_cross[kind], value)
    if plugin == "decoder_self_attention":
        check_decoder(models["decoder"], fused["decoder"], spec, cross)
    else:
        row = {kind: value[:1] for kind, value in cross.items()}
        tokens = np.array([2, 5, 7])
        steps = zip(
            decode_alone(models["decoder"], spec, row, tokens),
            decode_alone(fused["decoder"], spec, row, tokens),
            strict=True,
        )
        for expected, found in steps:
            for output, value in expected.items():
                assert_close(found[output], value)


def test_none_leaves_the_graphs_as_they_are(stock):
    spec, models = stock("small")
    for name, model in fuse(models, spec, parse_plugins("none")).items():
        for part in ("node", "input", "output"):
            assert getattr(model.graph, part) == getattr(models[name].graph, part)
        assert {tensor.name for tensor in model.graph.initializer} == {
            tensor.name for tensor in models[name].graph.initializer
        }
        assert len(model.functions) == 0
        assert metadata(model) == metadata(models[name]) | {"trocr.plugins": "", "trocr.replaced": "{}"}


@pytest.mark.parametrize("graph", GRAPHS)
def test_given_models_are_not_changed(stock, graph):
    spec, models = stock("small")
    before = models[graph].SerializeToString()
    fuse_graph(graph, models[graph], spec, parse_plugins("all"))
    assert models[graph].SerializeToString() == before


def test_metadata_tells_what_was_fused(stock):
    spec, models = stock("small")
    fused = fuse(models, spec, {"decoder_self_attention", "layernorm"})
    assert metadata(fused["decoder"])["trocr.plugins"] == "decoder_self_attention,layernorm"
    assert metadata(fused["decoder"])["trocr.cache"] == "fixed"
    assert metadata(fused["encoder"])["trocr.plugins"] == "layernorm"
    assert "trocr.cache" not in metadata(fused["encoder"])
    kept = fuse(models, spec, {"cross_attention"})
    assert metadata(kept["decoder"])["trocr.cache"] == "growing"


@pytest.mark.parametrize("name", ["small", "base"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_stock_node_stays_or_is_accounted_for(stock, name, graph):
    spec, models = stock(name)
    fused = fuse_graph(graph, models[graph], spec, parse_plugins("all"))
    replaced = json.loads(metadata(fused)["trocr.replaced"])
    stock_names = [node.name for node in models[graph].graph.node]
    fused_names = [node.name for node in fused.graph.node]
    assert len(set(fused_names)) == len(fused_names)
    assert replaced.keys() == set(fused_names) - set(stock_names)
    gone = [node for nodes in replaced.values() for node in nodes]
    assert sorted(gone + [node for node in fused_names if node not in replaced]) == sorted(stock_names)


def test_fused_nodes_are_named_after_their_modules(stock):
    spec, models = stock("small")
    fused = fuse(models, spec, parse_plugins("all"))
    names = {node.name for model in fused.values() for node in model.graph.node}
    assert names >= {
        "/embeddings/TrOCRPatchEmbedding",
        "/layers.1/attention/qkv_proj/TrOCRLayerNormLinear",
        "/layers.1/attention/TrOCREncoderAttention",
        "/layers.1/attention/o_proj/TrOCRLinearResidual",
        "/layers.1/mlp/fc1/TrOCRLayerNormLinear",
        "/layers.1/mlp/fc2/TrOCRLinearResidual",
        "/layers.1/self_attn/TrOCRDecoderSelfAttention",
        "/layers.1/self_attn/qkv_proj/MatMul",
        "/layers.1/activation_fn/TrOCRBiasActivation",
        "/layers.1/encoder_attn/TrOCRCrossAttention",
        "/layers.1/TrOCRCrossKeyValue",
        "/layernorm/TrOCRLayerNorm",
        "/layernorm_embedding/TrOCRResidualLayerNorm",
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_survives(stock, precision):
    """Every weight keeps type and bits; the packed ones are the stock ones side by side."""
    spec, models = stock("small", precision)
    fused = fuse(models, spec, parse_plugins("all") - {"linear", "patch_embedding"})
    elem_type = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    for name, attention in (("encoder", "layers.0.attention"), ("decoder", "layers.0.self_attn")):
        before, after = (
            {tensor.name: tensor for tensor in model.graph.initializer}
            for model in (models[name], fused[name])
        )
        for tensor in after.values():
            assert tensor.data_type in (elem_type, onnx.TensorProto.INT64)
            if tensor.name in before:
                assert tensor == before[tensor.name]
        for kind, axis in (("weight", 1), ("bias", 0)):
            parts = [onnx.numpy_helper.to_array(before[f"{attention}.{part}_proj.{kind}"]) for part in "qkv"]
            packed = onnx.numpy_helper.to_array(after[f"{attention}.qkv_proj.{kind}"])
            assert packed.tobytes() == np.concatenate(parts, axis=axis).tobytes()
        for model in (models[name], fused[name]):
            assert {value.type.tensor_type.elem_type for value in model.graph.output} == {elem_type}


def test_fp16_runs_alike(stock):
    spec, models = stock("small", "fp16")
    fused = fuse(models, spec, parse_plugins("all"))
    expected, found = (
        run(graphs["encoder"], random_images(graphs["encoder"], spec, 2))["last_hidden_state"]
        for graphs in (models, fused)
    )
    assert_close(found, expected, tolerance=5e-3)


def test_strip_functions_keeps_what_tensorrt_needs(stock):
    spec, models = stock("small")
    fused = fuse(models, spec, parse_plugins("all"))
    for model in fused.values():
        functions = len(model.functions)
        stripped = strip_functions(model)
        assert len(stripped.functions) == 0
        assert len(model.functions) == functions
        assert op_counts(stripped) == op_counts(model)
        for node in stripped.graph.node:
            assert all(node.output)
            if node.domain == "trocr":
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                assert attributes["plugin_version"] == b"1"
                assert attributes["plugin_namespace"] == b"trocr"
                if node.op_type == "TrOCRResidualLayerNorm":
                    assert len(node.output) == 1 + attributes["emit_sum"]
                if node.op_type in ("TrOCRLinearResidual", "TrOCRPatchEmbedding"):
                    assert len(node.output) == 1 + attributes["emit_statistics"]


def test_pre_ln_emits_all_sums_but_the_last(stock):
    spec, models = stock("large")
    encoder = strip_functions(fuse_graph("encoder", models["encoder"], spec, {"layernorm"}))
    outputs = [len(node.output) for node in encoder.graph.node if node.op_type == "TrOCRResidualLayerNorm"]
    assert outputs == [2, 2, 2, 2, 2, 1]


def test_all_statistics_are_emitted_but_the_last(stock):
    """Every LayerNorm but the last is folded: what comes before it gives it the statistics."""
    spec, models = stock("large")
    encoder = strip_functions(fuse_graph("encoder", models["encoder"], spec, parse_plugins("all")))
    nodes = [node for node in encoder.graph.node if node.domain == "trocr"]
    layer = ["LayerNormLinear", "EncoderAttention", "LinearResidual", "LayerNormLinear", "LinearResidual"]
    ops = ["PatchEmbedding", *3 * layer, "LayerNorm"]
    assert [node.op_type for node in nodes] == [f"TrOCR{op}" for op in ops]
    assert len(nodes[0].output) == 2
    outputs = [len(node.output) for node in nodes if node.op_type == "TrOCRLinearResidual"]
    assert outputs == [2, 2, 2, 2, 2, 1]
    assert len(nodes) == len(encoder.graph.node)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", np.float32), ("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)]
)
def test_folded_weights(stock, precision, dtype):
    """gamma * W is rounded once, sums are those of what was rounded, and beta goes into a float32 bias."""
    spec, models = stock("small", precision)
    fused = fuse_graph("encoder", models["encoder"], spec, {"linear"})
    stock_weights, weights = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for model in (models["encoder"], fused)
    )
    weight, bias, gamma, beta = (
        stock_weights[f"layers.1.{name}"].astype(np.float64)
        for name in ("mlp.fc1.weight", "mlp.fc1.bias", "layernorm_after.weight", "layernorm_after.bias")
    )
    node = "layers.1.mlp.fc1.MatMul"
    folded = weights[f"{node}.weight"]
    assert folded.dtype == dtype
    np.testing.assert_array_equal(folded, (gamma[:, None] * weight).T.astype(dtype))
    assert weights[f"{node}.weight_sum"].dtype == weights[f"{node}.bias"].dtype == np.float32
    np.testing.assert_allclose(
        weights[f"{node}.weight_sum"], folded.astype(np.float64).sum(1), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(weights[f"{node}.bias"], bias + beta @ weight, rtol=1e-6)
    residual = weights["layers.1.mlp.fc2.MatMul.weight"]
    assert residual.dtype == dtype
    np.testing.assert_array_equal(residual, stock_weights["layers.1.mlp.fc2.weight"].T)


def test_published_widths(tmp_path):
    """The encoder of small as published, but for its depth and the image's size."""
    encoder, decoder = ARCHITECTURES["small"]
    shallow = encoder | {"num_hidden_layers": 2, "image_size": 64}
    write_random_checkpoint(shallow, decoder | SMALL_DECODER, tmp_path, torch.float32, seed=0)
    spec = load_spec(tmp_path)
    export(spec, load_model(spec, torch.float32), "fp32", tmp_path)
    stock_model = load(tmp_path)["encoder"]
    fused = fuse_graph("encoder", stock_model, spec, parse_plugins("fused"))
    assert op_counts(fused) == TWO
    expected, found = (
        run(model, random_images(model, spec, 2))["last_hidden_state"] for model in (stock_model, fused)
    )
    assert_close(found, expected)


def test_widths_that_linear_cannot_do_are_left_to_the_other_passes(tmp_path):
    encoder, decoder = ARCHITECTURES["small"]
    narrow = ENCODER | {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 160}
    write_random_checkpoint(encoder | narrow, decoder | SMALL_DECODER, tmp_path, torch.float32, seed=0)
    spec = load_spec(tmp_path)
    export(spec, load_model(spec, torch.float32), "fp32", tmp_path)
    fused = fuse_graph("encoder", load(tmp_path)["encoder"], spec, parse_plugins("all"))
    assert op_counts(fused) == {"encoder_attention": 2, "layernorm": 5, "bias_activation": 2}


def spoil(model: onnx.ModelProto, node_name: str, attribute: str, value: object) -> onnx.ModelProto:
    """A copy with another value of one attribute."""
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(model)
    (node,) = (node for node in spoilt.graph.node if node.name == node_name)
    kept = [a for a in node.attribute if a.name != attribute]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(attribute, value)])
    return spoilt


@pytest.mark.parametrize(
    ("graph", "plugin", "node", "expected", "reason"),
    [
        ("encoder", "encoder_attention", "/layers.1/attention/Softmax", 2, "over axis 1"),
        ("decoder", "decoder_self_attention", "/layers.1/self_attn/Softmax", 2, "over axis 1"),
        ("decoder", "cross_attention", "/layers.0/encoder_attn/Softmax", 2, "over axis 1"),
        ("decoder", "layernorm", "/layers.0/final_layer_norm/LayerNormalization", 7, "from axis 1 on"),
        ("encoder", "linear", "/layernorm/LayerNormalization", 8, "from axis 1 on"),
    ],
)
def test_too_few_firings_are_an_error_with_the_reason(stock, graph, plugin, node, expected, reason):
    spec, models = stock("small")
    spoilt = spoil(models[graph], node, "axis", 1)
    with pytest.raises(SurgeryError) as error:
        fuse_graph(graph, spoilt, spec, parse_plugins("all"))
    message = str(error.value)
    assert f"{graph}.onnx: {plugin} fired {expected - 1} times, expected {expected}" in message
    assert f"{node}: " in message
    assert reason in message


def test_model_without_any_anchor_is_an_error(stock):
    spec, models = stock("small")
    with pytest.raises(
        SurgeryError, match=r"encoder_attention fired 0 times, expected 2(.|\n)*no other node"
    ):
        fuse_graph("encoder", models["cross_kv"], spec, {"encoder_attention"})


def test_too_many_firings_are_an_error(stock):
    spec, models = stock("small")
    shallow = dataclasses.replace(spec, encoder=dataclasses.replace(spec.encoder, num_hidden_layers=1))
    with pytest.raises(SurgeryError, match="encoder_attention fired 2 times, expected 1"):
        fuse_graph("encoder", models["encoder"], shallow, {"encoder_attention"})


def test_large_weights_go_into_a_file_beside(stock, tmp_path, monkeypatch):
    """What is beyond ONNX's 2 GB, at a lower limit: written, read and fused again, with equal results."""
    monkeypatch.setattr(fuse_module, "MAX_INLINE_BYTES", 1000)
    spec, models = stock("small")
    stock_folder, fused_folder = tmp_path / "stock", tmp_path / "fused"
    for folder in (stock_folder, fused_folder):
        folder.mkdir()
    for _ in range(2):  # a second time over the first
        for name, model in models.items():
            save(model, stock_folder / f"{name}.onnx")
    assert models["encoder"].graph.initializer[0].raw_data  # the given models keep their weights
    fused = fuse(load(stock_folder), spec, parse_plugins("all"))
    for name, model in fused.items():
        save(model, fused_folder / f"{name}.onnx")
    assert sorted(file.name for file in fused_folder.iterdir()) == sorted(
        file for name in GRAPHS for file in (f"{name}.onnx", f"{name}.onnx.data")
    )
    weights = sum(len(tensor.raw_data) for tensor in models["encoder"].graph.initializer)
    assert (stock_folder / "encoder.onnx.data").stat().st_size < 1.5 * weights  # not appended to
    assert (stock_folder / "encoder.onnx").stat().st_size < weights / 4
    assert_close(encode(load(fused_folder), spec, 2)[0], encode(models, spec, 2)[0])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["fuse", *map(str, arguments)])
    return fuse_module.main()


def test_command_line(stock, checkpoint, tmp_path, monkeypatch, capsys):
    _, models = stock("small")
    for name, model in models.items():
        save(model, tmp_path / f"{name}.onnx")
    out = tmp_path / "fused"
    arguments = ("--in", tmp_path, "--out", out, "--plugins", "attention", "--model", checkpoint("small"))
    assert run_main(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.split() == [str(out / f"{name}.onnx") for name in GRAPHS]
    assert op_counts(load(out)["decoder"]) == {"decoder_self_attention": 2, "cross_attention": 2}


def test_command_line_for_trtexec(stock, checkpoint, tmp_path, monkeypatch):
    _, models = stock("small")
    for name, model in models.items():
        save(model, tmp_path / f"{name}.onnx")
    arguments = ("--in", tmp_path, "--plugins", "all", "--model", checkpoint("small"))
    assert run_main(monkeypatch, *arguments, "--out", tmp_path / "fused") == 0
    assert run_main(monkeypatch, *arguments, "--out", tmp_path / "plain", "--for-tensorrt") == 0
    fused, plain = load(tmp_path / "fused"), load(tmp_path / "plain")
    for name in GRAPHS:
        assert fused[name].functions and not plain[name].functions
        assert plain[name] == strip_functions(fused[name])


@pytest.mark.parametrize(
    ("plugins", "spoilt", "message"),
    [
        ("attention,gelu", None, "unknown name 'gelu'"),
        ("all", "missing", "encoder.onnx does not exist"),
        ("all", "truncated", "encoder.onnx cannot be read as ONNX"),
    ],
)
def test_command_line_errors(stock, checkpoint, tmp_path, monkeypatch, capsys, plugins, spoilt, message):
    _, models = stock("small")
    for name, model in models.items():
        save(model, tmp_path / f"{name}.onnx")
    encoder = tmp_path / "encoder.onnx"
    if spoilt == "missing":
        encoder.unlink()
    elif spoilt == "truncated":
        encoder.write_bytes(encoder.read_bytes()[:-1000])
    arguments = ("--in", tmp_path, "--out", tmp_path / "out", "--plugins", plugins)
    assert run_main(monkeypatch, *arguments, "--model", checkpoint("small")) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
