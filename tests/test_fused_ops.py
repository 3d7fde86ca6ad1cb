"""The fused ops: their definitions against PyTorch, their attributes, and the names of `--plugins`."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx
import pytest
import torch

from graph_surgery.fused_ops import (
    BIAS_ACTIVATION,
    CROSS_ATTENTION,
    CROSS_KEY_VALUE,
    DECODER_SELF_ATTENTION,
    DOMAIN,
    ENCODER_ATTENTION,
    FP8_TYPE,
    FUSED_OPS,
    GROUPS,
    LAYER_NORM,
    LAYER_NORM_LINEAR,
    LINEAR_RESIDUAL,
    MIN_OPSET,
    PATCH_EMBEDDING,
    PLUGINS,
    RESIDUAL_LAYER_NORM,
    ROW_STATISTICS,
    STATISTICS_WIDTH,
    VERSION,
    Attribute,
    FusedOp,
    SurgeryError,
    parse_plugins,
)
from graph_surgery.passes.patch_embedding import pack_weight
from tests.small_graphs import assert_close, run

DTYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}
INTEGERS = {torch.int64: onnx.TensorProto.INT64, torch.uint8: onnx.TensorProto.UINT8}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run_op(
    op: FusedOp,
    inputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    attributes: Mapping[str, int | float | str],
    omit: int = 0,
    opset: int = MIN_OPSET,
    wide: Collection[str] = (),
    fp8: Collection[str] = (),
) -> list[torch.Tensor]:
    """Run one op of this type on ONNX Runtime: float32 outputs of all its outputs but the last `omit`.

    NumPy has no bfloat16, so the graph takes and gives float32, and casts all but `wide` ones: `fp8` ones to
    e4m3. Its batch is dynamic.
    """
    nodes, values, outputs = [], [], op.outputs[: len(op.outputs) - omit]
    for name, tensor in inputs.items():
        integer_type = INTEGERS.get(tensor.dtype)
        elem_type = integer_type or onnx.TensorProto.FLOAT
        dims = [f"{name}_{axis}" for axis in range(tensor.ndim)]
        values.append(onnx.helper.make_tensor_value_info(name, elem_type, dims))
        to = integer_type or DTYPES[torch.float32 if name in wide else dtype]
        to = FP8_TYPE if name in fp8 else to
        nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}_cast"], to=to))
    nodes.append(
        onnx.helper.make_node(
            op.name,
            [f"{name}_cast" for name in op.inputs],
            [f"{name}_cast" for name in outputs] + [""] * omit,
            domain=DOMAIN,
            **op.node_attributes(**attributes),
        )
    )
    nodes += [onnx.helper.make_node("Cast", [f"{name}_cast"], [name], to=1) for name in outputs]
    results = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "op", values, results),
        opset_imports=[onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(DOMAIN, int(VERSION))],
        functions=[op.function(opset)],
        ir_version=9,
    )
    found = run(model, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(found[name]) for name in outputs]


def rounded(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The values that an op of this type sees, in float32."""
    return {
        name: tensor if tensor.dtype in INTEGERS else tensor.to(dtype).float()
        for name, tensor in tensors.items()
    }


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """`expected` in float32. One rounding to the type is at most half a unit in the last place, eps / 2."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    limit = 1e-5 * expected.abs().max()
    if dtype != torch.float32:
        limit = limit + torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((found - expected).abs() <= limit).all()


def heads(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows [B, S, H*d] as heads [B, H, S, d]."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rows(heads: torch.Tensor) -> torch.Tensor:
    """Heads [B, H, S, d] as rows [B, S, H*d]."""
    return heads.transpose(1, 2).flatten(2)


attend = torch.nn.functional.scaled_dot_product_attention


@every_dtype
@pytest.mark.parametrize(("batch", "length", "num_heads", "head_dim"), [(1, 1, 2, 32), (3, 59, 3, 64)])
def test_encoder_attention(dtype, batch, length, num_heads, head_dim):
    torch.manual_seed(0)
    inputs = rounded({"qkv": torch.randn(batch, length, 3 * num_heads * head_dim)}, dtype)
    (found,) = run_op(ENCODER_ATTENTION, inputs, dtype, {"num_heads": num_heads})
    query, key, value = (heads(part, num_heads) for part in inputs["qkv"].chunk(3, dim=-1))
    check(found, rows(attend(query, key, value)), dtype)


@every_dtype
def test_decoder_self_attention(dtype):
    """Rows at the first position, the last, and between; beyond a row's position the cache is NaN."""
    torch.manual_seed(0)
    positions, num_heads, head_dim, capacity = [0, 6, 3], 3, 32, 7
    cache = (len(positions), num_heads, capacity, head_dim)
    inputs = {
        "qkv": torch.randn(len(positions), 1, 3 * num_heads * head_dim),
        "past_key": torch.randn(cache),
        "past_value": torch.randn(cache),
        "position_ids": torch.tensor(positions).unsqueeze(1),
    }
    for row, position in enumerate(positions):
        inputs["past_key"][row, :, position:] = torch.nan
        inputs["past_value"][row, :, position:] = torch.nan
    inputs = rounded(inputs, dtype)
    context, present_key, present_value = run_op(
        DECODER_SELF_ATTENTION, inputs, dtype, {"num_heads": num_heads}
    )

    query, new_key, new_value = (heads(part, num_heads) for part in inputs["qkv"].chunk(3, dim=-1))
    for row, position in enumerate(positions):
        key, value = inputs["past_key"][row].clone(), inputs["past_value"][row].clone()
        key[:, position], value[:, position] = new_key[row, :, 0], new_value[row, :, 0]
        torch.testing.assert_close(present_key[row], key, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(present_value[row], value, rtol=0, atol=0, equal_nan=True)
        seen = slice(position + 1)
        expected = attend(query[row : row + 1], key[None, :, seen], value[None, :, seen])
        check(context[row : row + 1], rows(expected), dtype)


@every_dtype
@pytest.mark.parametrize("beams", [1, 4])
def test_cross_attention(dtype, beams):
    torch.manual_seed(0)
    batch, length, num_heads, head_dim = 3, 59, 3, 32
    inputs = rounded(
        {
            "query": torch.randn(batch * beams, 1, num_heads * head_dim),
            "key": torch.randn(batch, num_heads, length, head_dim),
            "value": torch.randn(batch, num_heads, length, head_dim),
        },
        dtype,
    )
    (found,) = run_op(CROSS_ATTENTION, inputs, dtype, {"num_heads": num_heads})
    key, value = (inputs[name].repeat_interleave(beams, dim=0) for name in ("key", "value"))
    check(found, rows(attend(heads(inputs["query"], num_heads), key, value)), dtype)


@every_dtype
def test_cross_key_value(dtype):
    torch.manual_seed(0)
    batch, length, num_heads, head_dim, inputs = 3, 7, 3, 32, 40
    width = num_heads * head_dim
    tensors = rounded(
        {"x": torch.randn(batch, length, inputs), "weight": torch.randn(2 * width, inputs) / inputs**0.5},
        dtype,
    )
    bias = torch.randn(2 * width)
    found = run_op(CROSS_KEY_VALUE, tensors | {"bias": bias}, dtype, {"num_heads": num_heads}, wide={"bias"})
    products = (tensors["x"] @ tensors["weight"].T + bias).split(width, dim=-1)
    for tensor, expected in zip(found, products, strict=True):
        check(tensor, heads(expected, num_heads), dtype)


@every_dtype
@pytest.mark.parametrize("emit_sum", [0, 1])
@pytest.mark.parametrize("epsilon", [1e-12, 0.5])
def test_residual_layernorm(dtype, emit_sum, epsilon):
    torch.manual_seed(0)
    width = 33
    inputs = rounded(
        {
            "x": torch.randn(3, 5, width),
            "residual": torch.randn(3, 5, width),
            "gamma": torch.randn(width),
            "beta": torch.randn(width),
        },
        dtype,
    )
    attributes = {"epsilon": epsilon, "emit_sum": emit_sum}
    normed, *total = run_op(RESIDUAL_LAYER_NORM, inputs, dtype, attributes, omit=1 - emit_sum)
    expected = inputs["x"] + inputs["residual"]
    check(
        normed,
        torch.nn.functional.layer_norm(expected, (width,), inputs["gamma"], inputs["beta"], epsilon),
        dtype,
    )
    assert len(total) == emit_sum
    for found in total:
        check(found, expected, dtype)


@every_dtype
@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_bias_activation(dtype, opset, activation):
    inputs = rounded(
        {"x": torch.linspace(-6, 6, 66).view(2, 3, 11), "bias": torch.linspace(-1, 1, 11)}, dtype
    )
    (found,) = run_op(BIAS_ACTIVATION, inputs, dtype, {"activation": activation}, opset=opset)
    check(found, getattr(torch.nn.functional, activation)(inputs["x"] + inputs["bias"]), dtype)


def statistics_of(x: torch.Tensor) -> torch.Tensor:
    """[..., N / 64, 2]: mean and sum of squared distances from it of each 64 columns."""
    parts = x.double().unflatten(-1, (-1, STATISTICS_WIDTH))
    mean = parts.mean(-1, keepdim=True)
    return torch.cat((mean, (parts - mean).square().sum(-1, keepdim=True)), -1).float()


@every_dtype
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 192)])
def test_row_statistics(dtype, shape):
    torch.manual_seed(0)
    inputs = rounded({"x": 3 * torch.randn(shape) + 2}, dtype)
    (found,) = run_op(ROW_STATISTICS, inputs, dtype, {}, wide={"statistics"})
    check(found, statistics_of(inputs["x"]), torch.float32)


@every_dtype
@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_layernorm_linear(dtype, opset, activation):
    """Against PyTorch's LayerNorm, product and activation, with a mean and an epsilon that show."""
    torch.manual_seed(0)
    width, epsilon = 128, 0.5
    x = rounded({"x": torch.randn(3, 5, width) + 1}, dtype)["x"]
    weight = rounded({"weight": torch.randn(72, width) / width**0.5}, dtype)["weight"]
    inputs = {
        "x": x,
        "statistics": statistics_of(x),
        "weight": weight,
        "weight_sum": weight.sum(1),
        "bias": torch.randn(72),
    }
    wide = {"statistics", "weight_sum", "bias"}
    attributes = {"activation": activation, "epsilon": epsilon}
    (found,) = run_op(LAYER_NORM_LINEAR, inputs, dtype, attributes, opset=opset, wide=wide)
    normed = torch.nn.functional.layer_norm(x, (width,), eps=epsilon)
    expected = torch.nn.functional.linear(normed, weight, inputs["bias"])
    if activation != "none":
        expected = getattr(torch.nn.functional, activation)(expected)
    check(found, expected, dtype)


@every_dtype
@pytest.mark.parametrize("emit_statistics", [0, 1])
def test_linear_residual(dtype, emit_statistics):
    torch.manual_seed(0)
    inputs = rounded(
        {
            "x": torch.randn(3, 5, 72),
            "weight": torch.randn(128, 72) / 72**0.5,
            "bias": torch.randn(128),
            "residual": torch.randn(3, 5, 128),
        },
        dtype,
    )
    attributes = {"emit_statistics": emit_statistics}
    wide = {"bias", "statistics"}
    y, *statistics = run_op(LINEAR_RESIDUAL, inputs, dtype, attributes, omit=1 - emit_statistics, wide=wide)
    product = torch.nn.functional.linear(inputs["x"], inputs["weight"], inputs["bias"])
    check(y, product + inputs["residual"], dtype)
    assert len(statistics) == emit_statistics
    for found in statistics:
        check(found, statistics_of(y), torch.float32)  # of what was rounded


@every_dtype
@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("emit_statistics", [0, 1])
@pytest.mark.parametrize("special", [0, 1, 2])
def test_patch_embedding(dtype, opset, emit_statistics, special):
    """Against PyTorch's convolution, on an image that is not square."""
    torch.manual_seed(0)
    batch, height, width, outputs, scale = 3, 32, 48, 64, 0.01
    inputs = rounded(
        {
            "pixels": torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8),
            "kernel": torch.randn(outputs, 3, 16, 16) / 16,
            "positions": torch.randn(special + height // 16 * (width // 16), outputs),
        },
        dtype,
    )
    kernel = inputs.pop("kernel")
    inputs |= {"weight": torch.from_numpy(pack_weight(kernel.numpy())), "bias": torch.randn(outputs)}
    attributes = {"scale": scale, "emit_statistics": emit_statistics}
    y, *statistics = run_op(
        PATCH_EMBEDDING,
        inputs,
        dtype,
        attributes,
        omit=1 - emit_statistics,
        opset=opset,
        wide={"bias", "statistics"},
    )
    patches = scale * torch.nn.functional.conv2d(inputs["pixels"].float() - 128, kernel, stride=16)
    expected = inputs["positions"].repeat(batch, 1, 1)
    expected[:, special:] += patches.flatten(2).transpose(1, 2) + inputs["bias"]
    check(y, expected, dtype)
    assert len(statistics) == emit_statistics
    for found in statistics:
        check(found, statistics_of(y), torch.float32)


@every_dtype
def test_layernorm(dtype):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 5, 72) + 1, "gamma": torch.randn(72), "beta": torch.randn(72)}
    inputs = rounded(inputs, dtype)
    (found,) = run_op(LAYER_NORM, inputs, dtype, {"epsilon": 0.5})
    x, gamma, beta = inputs.values()
    check(found, torch.nn.functional.layer_norm(x, (72,), gamma, beta, 0.5), dtype)


def test_names_and_namespace_are_those_that_tensorrt_looks_up():
    for name, op in FUSED_OPS.items():
        assert op.name == name
        assert op in PLUGINS[op.plugin]
        assert op.name.startswith(
            "TrOCR"
        )  # TensorRT's parser ignores the domain: no built-in name may be met
        function = op.function(op.min_opset)
        assert (function.domain, function.name) == ("trocr", op.name)
        assert {node.domain for node in function.node} == {""}
        declared = {*function.attribute, *(attribute.name for attribute in function.attribute_proto)}
        assert declared >= {"plugin_version", "plugin_namespace"}


def test_node_attributes_are_completed():
    assert RESIDUAL_LAYER_NORM.node_attributes(epsilon=1e-5) == {
        "epsilon": 1e-5,
        "emit_sum": 0,
        "plugin_version": "1",
        "plugin_namespace": "trocr",
    }


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        (ENCODER_ATTENTION, {}, "num_heads is required"),
        (ENCODER_ATTENTION, {"num_heads": 2.0}, "num_heads=2.0 is of type float, expected int"),
        (ENCODER_ATTENTION, {"num_heads": 2, "scale": 1.0}, "unknown attribute scale"),
        (BIAS_ACTIVATION, {"activation": "tanh"}, "activation='tanh' is not one of 'gelu', 'relu'"),
        (RESIDUAL_LAYER_NORM, {"epsilon": 1e-5, "emit_sum": 2}, "emit_sum=2 is not one of 0, 1"),
        (LAYER_NORM_LINEAR, {}, "epsilon is required"),
        (LAYER_NORM_LINEAR, {"epsilon": 1e-5, "activation": "tanh"}, "'none', 'gelu', 'relu'"),
        (LINEAR_RESIDUAL, {"emit_statistics": 2}, "emit_statistics=2 is not one of 0, 1"),
    ],
)
def test_bad_attributes_are_refused(op, attributes, message):
    with pytest.raises(SurgeryError, match=message):
        op.node_attributes(**attributes)


def test_attribute_default_is_written_into_the_function():
    op = FusedOp("Op", "op", ("x",), ("y",), (Attribute("mode", str, "a"),), "y = Identity (x)")
    defaults = {attribute.name: attribute.s for attribute in op.function(MIN_OPSET).attribute_proto}
    assert defaults == {"mode": b"a", "plugin_version": b"1", "plugin_namespace": b"trocr"}


def test_old_opset_is_refused():
    with pytest.raises(SurgeryError, match="opset 17 or newer, the graph has 13"):
        RESIDUAL_LAYER_NORM.function(13)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", set()),
        ("all", set(PLUGINS)),
        ("fused", GROUPS["fused"]),
        ("attention", {"encoder_attention", "decoder_self_attention", "cross_attention"}),
        ("layernorm", {"layernorm"}),
        ("cross_attention, layernorm,layernorm", {"cross_attention", "layernorm"}),
        ("attention,bias_activation", GROUPS["attention"] | {"bias_activation"}),
    ],
)
def test_parse_plugins(text, expected):
    assert parse_plugins(text) == expected


@pytest.mark.parametrize("text", ["", "layernorm,", "gelu", "Layernorm"])
def test_parse_plugins_names_the_unknown_and_the_known(text):
    with pytest.raises(SurgeryError) as error:
        parse_plugins(text)
    assert repr(text.split(",")[-1]) in str(error.value)
    for name in (*PLUGINS, *GROUPS):
        assert name in str(error.value)


def test_assert_close_can_fail():
    with pytest.raises(AssertionError):
        assert_close(np.ones(3, np.float32), np.full(3, 1.1, np.float32))
