"""Every pass on small graphs: variants that must match, and graphs that must not, with the reason given."""

import math

import numpy as np
import onnx
import pytest

from tests.small_graphs import GraphBuilder, assert_close, run, run_pass

SEQ, HEADS, HEAD_DIM = 5, 2, 8
WIDTH = HEADS * HEAD_DIM
SCALE = 1 / math.sqrt(HEAD_DIM)
BATCH = 3


def feeds(model: onnx.ModelProto, **sizes: int) -> dict[str, np.ndarray]:
    """Random values for the graph's float inputs."""
    random = np.random.default_rng(1)
    sizes = {"batch": BATCH} | sizes
    return {
        value.name: random.normal(
            size=[sizes.get(dim.dim_param, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        ).astype(np.float32)
        for value in model.graph.input
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }


def check_match(plugin: str, model: onnx.ModelProto, op: str) -> onnx.ModelProto:
    """The pass fires once, and the fused graph gives the same results."""
    fused, report = run_pass(plugin, model)
    assert report.rejected == {}
    assert [node.name for node in fused.graph.node if node.op_type == op] == report.fused == [f"/block/{op}"]
    inputs = feeds(model)
    expected, found = run(model, inputs), run(fused, inputs)
    assert expected.keys() == found.keys()
    for name in expected:
        assert_close(found[name], expected[name])
    return fused


def check_mismatch(plugin: str, model: onnx.ModelProto, reason: str) -> None:
    """The pass leaves the graph as it is and says why."""
    fused, report = run_pass(plugin, model)
    assert report.fused == []
    assert report.replaced == {}
    assert any(reason in found for found in report.rejected.values()), report.rejected
    assert sorted(node.name for node in fused.graph.node) == sorted(node.name for node in model.graph.node)


def use_again(builder: GraphBuilder, tensor: str) -> None:
    builder("Neg", tensor, output="again")
    builder.output("again", None)


def scaled(builder: GraphBuilder, x: str, scale: float, op: str = "Mul", swap: bool = False) -> str:
    if op == "Div":
        return builder("Div", x, builder.constant(1 / scale))
    return builder.commutative("Mul", x, builder.constant(scale), swap)


# encoder attention


def encoder_attention(
    *,
    scale: float = SCALE,
    scale_at: str = "scores",
    scale_op: str = "Mul",
    swap: bool = False,
    biases: str = "qkv",
    key_transposes: int = 1,
    axis: int = -1,
    mask: bool = False,
    value_scale: float | None = None,
    key_heads: int = HEADS,
    merge: tuple[int, ...] = (0, 2, 1, 3),
    other_key_input: bool = False,
    again: str = "",
    leak: str = "",
) -> onnx.ModelProto:
    """Attention as the exporter writes it, with variations.

    scale_at: any of query_rows, query, key, scores, both (the root of the scale on queries and keys), none.
    again, leak: the interior tensor (query_rows, key, scores, probs, mixed) to use twice or to put out.
    """
    b = GraphBuilder()
    x = b.input("x", ["batch", SEQ, WIDTH])
    interior = {}

    def rows(which: str, source: str) -> str:
        product = b("MatMul", source, b.weight(WIDTH, WIDTH))
        return b.commutative("Add", product, b.weight(WIDTH), swap) if which in biases else product

    def split(tensor: str, heads: int) -> str:
        return b("Reshape", tensor, b.constant([-1, SEQ, heads, WIDTH // heads]))

    query_rows = interior["query_rows"] = rows("q", x)
    if scale_at == "query_rows":
        query_rows = scaled(b, query_rows, scale, scale_op, swap)
    query = b("Transpose", split(query_rows, HEADS), perm=[0, 2, 1, 3])
    key_rows = rows("k", b.input("x2", ["batch", SEQ, WIDTH]) if other_key_input else x)
    key = split(key_rows, key_heads)
    if key_transposes == 2:
        key = b("Transpose", b("Transpose", key, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2])
    else:
        key = b("Transpose", key, perm=[0, 2, 3, 1])
    interior["key"] = key
    value = b("Transpose", split(rows("v", x), HEADS), perm=[0, 2, 1, 3])
    if value_scale is not None:
        value = scaled(b, value, value_scale)
    root = math.sqrt(scale)
    if scale_at in ("query", "both"):
        query = scaled(b, query, root if scale_at == "both" else scale, scale_op, swap)
    if scale_at in ("key", "both"):
        key = scaled(b, key, root if scale_at == "both" else scale, scale_op, swap)
    if key_heads != HEADS:  # so that the product is possible
        query = b("Reshape", query, b.constant([-1, key_heads, SEQ, WIDTH // key_heads]))
    scores = b("MatMul", query, key)
    if scale_at == "scores":
        scores = scaled(b, scores, scale, scale_op, swap)
    interior["scores"] = scores
    if mask:
        scores = b.commutative("Add", scores, b.input("mask", ["batch", 1, 1, SEQ]), swap)
    probs = interior["probs"] = b("Softmax", scores, axis=axis)
    if key_heads != HEADS:
        value = b("Reshape", value, b.constant([-1, key_heads, SEQ, WIDTH // key_heads]))
    mixed = interior["mixed"] = b("MatMul", probs, value)
    merged = b("Transpose", mixed, perm=merge)
    y = b("Reshape", merged, b.constant([-1, SEQ, WIDTH]))
    b("MatMul", y, b.weight(WIDTH, WIDTH), output="y")
    b.output("y", ["batch", SEQ, WIDTH])
    if again:
        use_again(b, interior[again])
    if leak:
        b.output(interior[leak], None)
    return b.model()


@pytest.mark.parametrize(
    "variation",
    [
        {},
        {"swap": True},
        {"scale_op": "Div"},
        {"scale_at": "query_rows"},
        {"scale_at": "query"},
        {"scale_at": "query", "swap": True},
        {"scale_at": "key"},
        {"scale_at": "key", "scale_op": "Div"},
        {"scale_at": "both"},
        {"biases": ""},
        {"biases": "qv"},
        {"key_transposes": 2},
        {"axis": 3},
    ],
    ids=str,
)
def test_encoder_attention_matches(variation):
    fused = check_match("encoder_attention", encoder_attention(**variation), "TrOCREncoderAttention")
    projections = [node.name for node in fused.graph.node if node.name.startswith("/block/qkv_proj/")]
    with_bias = variation.get("biases", "qkv") != ""
    assert projections == ["/block/qkv_proj/MatMul", "/block/qkv_proj/Add"][: 1 + with_bias]


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"again": "query_rows"}, "is also used by Neg"),
        ({"again": "key"}, "is also used by Neg"),
        ({"again": "scores"}, "is also used by Neg"),
        ({"again": "probs"}, "should have one consumer"),
        ({"again": "mixed"}, "should have one consumer"),
        ({"leak": "query_rows"}, "is an output of the graph"),
        ({"leak": "key"}, "is an output of the graph"),
        ({"leak": "scores"}, "is an output of the graph"),
        ({"leak": "probs"}, "is an output of the graph"),
        ({"leak": "mixed"}, "is an output of the graph"),
        ({"axis": 2}, "over axis 2"),
        ({"axis": 1}, "over axis 1"),
        ({"scale": 1 / HEAD_DIM}, "the scale is 0.125, not 1/sqrt(head_dim) = 0.353553"),
        ({"scale": 1 / math.sqrt(WIDTH)}, "the scale is 0.25"),
        ({"scale": SCALE * 1.001}, "the scale is"),
        ({"scale_at": "none"}, "the scale is 1,"),
        ({"mask": True}, "looks like a mask"),
        ({"mask": True, "swap": True}, "looks like a mask"),
        ({"mask": True, "scale_at": "query"}, "looks like a mask"),
        ({"value_scale": 0.5}, "the values are scaled by 0.5"),
        ({"key_heads": 4, "scale": 0.5}, "are not all projections"),  # heads cut across the projection's
        ({"merge": (0, 2, 3, 1)}, "transpose of the heads"),
        ({"other_key_input": True}, "projections of different tensors"),
    ],
    ids=str,
)
def test_encoder_attention_does_not_match(variation, reason):
    check_mismatch("encoder_attention", encoder_attention(**variation), reason)


# linear

NORMED, WIDE = 64, 128


def linear(
    *,
    residual: bool = True,
    swap: bool = False,
    biases: bool = True,
    activation: str = "erf",
    with_product: bool = True,
    width: int = NORMED,
    outputs: int = WIDE,
    axis: int = -1,
    beta: bool = True,
    computed: str = "",
    broadcast: bool = False,
    normed_is_output: bool = False,
    again: str = "",
    leak: str = "",
) -> onnx.ModelProto:
    """A product and residual, LayerNorm, and a product and activation, with variations.

    computed: which of gamma, before (the weight before it) and after is computed, not constant.
    again, leak: the interior tensor (before, normed, after, biased) to use twice or to put out.
    """
    b = GraphBuilder()
    interior = {}

    def weight(name: str, *shape: int) -> str:
        return b.input(name, shape) if computed == name else b.weight(*shape)

    def biased(product: str, size: int) -> str:
        return b.commutative("Add", product, b.weight(size), swap) if biases else product

    x = b.input("x", ["batch", SEQ, width])
    if residual:
        context = b.input("context", ["batch", SEQ, WIDE])
        interior["before"] = b("MatMul", context, weight("before", WIDE, width))
        other = b.input("other", [1, SEQ, width]) if broadcast else x
        x = b.commutative("Add", biased(interior["before"], width), other, swap)
    affine = [weight("gamma", width), *([b.weight(width)] if beta else [])]
    normed = interior["normed"] = b("LayerNormalization", x, *affine, axis=axis, epsilon=1e-3)
    if with_product:
        product = interior["after"] = b("MatMul", normed, weight("after", width, outputs))
        y = interior["biased"] = biased(product, outputs)
        if activation == "relu":
            y = b("Relu", y)
        elif activation == "erf":
            error = b("Erf", b("Div", y, b.constant(math.sqrt(2))))
            product = b.commutative("Mul", y, b("Add", error, b.constant(1.0)), swap)
            y = b("Mul", product, b.constant(0.5))
        elif activation == "tanh":
            error = b("Erf", b("Div", y, b.constant(1.5)))
            y = b("Mul", y, error)
        b("Identity", y, output="y")
        b.output("y", ["batch", SEQ, outputs])
    if residual:
        b("Identity", x, output="sum")  # the next layer's residual
        b.output("sum", ["batch", SEQ, width])
    if normed_is_output or not with_product:
        b("Identity", normed, output="normed")
        b.output("normed", ["batch", SEQ, width])
    if again:
        use_again(b, interior[again])
    if leak:
        b.output(interior[leak], None)
    return b.model()


@pytest.mark.parametrize(
    ("variation", "ops"),
    [
        ({}, ["LinearResidual", "LayerNormLinear"]),
        ({"swap": True}, ["LinearResidual", "LayerNormLinear"]),
        ({"activation": "relu"}, ["LinearResidual", "LayerNormLinear"]),
        ({"activation": "none"}, ["LinearResidual", "LayerNormLinear"]),
        ({"activation": "tanh"}, ["LinearResidual", "LayerNormLinear"]),  # which stays behind the product
        ({"biases": False}, ["LinearResidual", "LayerNormLinear"]),
        ({"beta": False}, ["LinearResidual", "LayerNormLinear"]),
        ({"axis": 2}, ["LinearResidual", "LayerNormLinear"]),
        ({"residual": False}, ["RowStatistics", "LayerNormLinear"]),
        ({"broadcast": True}, ["RowStatistics", "LayerNormLinear"]),
        ({"computed": "before"}, ["RowStatistics", "LayerNormLinear"]),
        ({"again": "after"}, ["LinearResidual", "LayerNormLinear"]),  # the bias stays behind the product
        ({"with_product": False}, ["LinearResidual"]),
        ({"normed_is_output": True}, ["LinearResidual"]),
        ({"again": "normed"}, ["LinearResidual"]),
    ],
    ids=str,
)
def test_linear_matches(variation, ops):
    model = linear(**variation)
    fused, report = run_pass("linear", model)
    assert report.rejected == {}
    found = [node.op_type for node in fused.graph.node if node.domain == "trocr"]
    assert found == [f"TrOCR{op}" for op in ops]
    assert len(report.fused) == len(ops) - ops.count("RowStatistics")
    inputs = feeds(model)
    expected, results = run(model, inputs), run(fused, inputs)
    for name in expected:
        assert_close(results[name], expected[name])


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"axis": 1, "beta": False}, "from axis 1 on"),
        ({"width": 96}, "it normalises 96 values, not a multiple of 64"),
        ({"outputs": 96}, "a weight [64, 96]"),
        ({"computed": "gamma"}, "gamma or beta is not constant"),
        ({"computed": "after"}, "has no constant weight"),
        (
            {"residual": False, "with_product": False},
            "neither a product and residual before it nor a product after it",
        ),
        ({"again": "before"}, "is also used by Neg"),
        ({"leak": "before"}, "is an output of the graph"),
        ({"leak": "after"}, "is an output of the graph"),
        ({"leak": "normed"}, "is an output of the graph"),
        ({"again": "biased"}, "is also used by Neg"),
        ({"leak": "biased"}, "is an output of the graph"),
    ],
    ids=str,
)
def test_linear_does_not_match(variation, reason):
    check_mismatch("linear", linear(**variation), reason)


# cross-attention


def cross_attention(
    *,
    scale: float = SCALE,
    scale_at: str = "query_rows",
    swap: bool = False,
    queries: int = 1,
    with_transposes: bool = False,
    mask: bool = False,
    axis: int = -1,
    computed_key: bool = False,
    again: str = "",
) -> onnx.ModelProto:
    """Attention of `queries` rows to keys and values that are inputs; one row needs no transposes."""
    b = GraphBuilder()
    query = b.input("query", ["batch", queries, WIDTH])
    key = b.input("key", ["batch", HEADS, SEQ, HEAD_DIM])
    value = b.input("value", ["batch", HEADS, SEQ, HEAD_DIM])
    if scale_at == "query_rows":
        query = scaled(b, query, scale, swap=swap)
    if with_transposes:
        split = b("Reshape", query, b.constant([-1, queries, HEADS, HEAD_DIM]))
        split = b("Transpose", split, perm=[0, 2, 1, 3])
    else:
        split = b("Reshape", query, b.constant([-1, HEADS, queries, HEAD_DIM]))
    if computed_key:
        key = b("Tanh", key)
    key = b("Transpose", key, perm=[0, 1, 3, 2])
    if scale_at == "key":
        key = scaled(b, key, scale, swap=swap)
    scores = b("MatMul", split, key)
    if scale_at == "scores":
        scores = scaled(b, scores, scale, swap=swap)
    if mask:
        hidden = b("Less", scores, b.constant(0.0))
        scores = b("Where", hidden, b.constant(-1e9), scores)
    probs = b("Softmax", scores, axis=axis)
    mixed = b("MatMul", probs, value)
    if with_transposes:
        mixed = b("Transpose", mixed, perm=[0, 2, 1, 3])
    b("Reshape", mixed, b.constant([-1, queries, WIDTH]), output="y")
    b.output("y", ["batch", queries, WIDTH])
    if again:
        use_again(b, {"query": split, "scores": scores, "probs": probs}[again])
    return b.model()


@pytest.mark.parametrize(
    "variation",
    [
        {},
        {"swap": True},
        {"scale_at": "key"},
        {"scale_at": "scores"},
        {"scale_at": "scores", "swap": True},
        {"with_transposes": True},
    ],
    ids=str,
)
def test_cross_attention_matches(variation):
    check_match("cross_attention", cross_attention(**variation), "TrOCRCrossAttention")


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"again": "query"}, "is also used by Neg"),
        ({"again": "scores"}, "is also used by Neg"),
        ({"again": "probs"}, "should have one consumer"),
        ({"axis": 1}, "over axis 1"),
        ({"scale": 0.5}, "the scale is 0.5"),
        ({"mask": True}, "looks like a mask"),
        ({"queries": 2, "with_transposes": True}, "is not one row"),
        ({"queries": 2}, "is not heads"),  # a plain reshape of two rows mixes rows and heads
        ({"computed_key": True}, "Tanh"),
    ],
    ids=str,
)
def test_cross_attention_does_not_match(variation, reason):
    check_mismatch("cross_attention", cross_attention(**variation), reason)


# keys and values of cross-attention


def cross_key_value(
    *,
    swap: bool = False,
    bias: str = "kv",
    permutation: tuple[int, ...] = (0, 2, 1, 3),
    value_heads: int = HEADS,
    other_states: bool = False,
    scale: bool = False,
    names: tuple[str, str] = ("present.0.encoder.key", "present.0.encoder.value"),
    value_first: bool = False,
    again: str = "",
) -> onnx.ModelProto:
    """Two products of the encoder's states, split into heads."""
    b = GraphBuilder()
    states = b.input("states", ["batch", SEQ, 3 * HEAD_DIM])
    parts = {"k": (names[0], HEADS), "v": (names[1], value_heads)}
    interior = {}
    for kind, (name, heads) in reversed(parts.items()) if value_first else parts.items():
        x = b("Tanh", states) if other_states and kind == "v" else states
        rows = interior[f"{kind} product"] = b("MatMul", x, b.weight(3 * HEAD_DIM, WIDTH))
        if kind in bias:
            rows = b.commutative("Add", rows, b.weight(WIDTH), swap)
        if scale:
            rows = scaled(b, rows, 0.5)
        split = b("Reshape", rows, b.constant([-1, SEQ, heads, WIDTH // heads]))
        interior[f"{kind} split"] = split
        b("Transpose", split, perm=list(permutation), output=name)
    for name in names:
        b.output(name, None)
    if again:
        use_again(b, interior[again])
    return b.model()


@pytest.mark.parametrize(
    "variation",
    [{}, {"swap": True}, {"bias": ""}, {"bias": "v"}, {"value_first": True}],
    ids=str,
)
def test_cross_key_value_matches(variation):
    fused = check_match("cross_key_value", cross_key_value(**variation), "TrOCRCrossKeyValue")
    assert [node.op_type for node in fused.graph.node] == ["TrOCRCrossKeyValue"]


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"again": "k product"}, "is also used by Neg"),
        ({"again": "v split"}, "is also used by Neg"),
        ({"permutation": (0, 2, 3, 1)}, "is not the split of rows into heads"),
        ({"value_heads": 1}, "are not split into the same heads"),
        ({"other_states": True}, "are projections of different tensors"),
        ({"scale": True}, "is not the split of rows into heads"),
        ({"names": ("keys", "values")}, "is no output of keys or values"),
        ({"names": ("a.key", "b.value")}, "has not both keys and values"),
    ],
    ids=str,
)
def test_cross_key_value_does_not_match(variation, reason):
    check_mismatch("cross_key_value", cross_key_value(**variation), reason)


# decoder self-attention


def self_attention(
    *,
    scale: float = SCALE,
    scale_at: str = "query_rows",
    swap: bool = False,
    mask: bool = False,
    axis: int = -1,
    append_axis: int = 2,
    new_first: bool = False,
    cache_is_input: bool = True,
    present_is_output: bool = True,
    position_ids: tuple[int, list[int | str]] | None = (onnx.TensorProto.INT64, ["batch", 1]),
    append: bool = True,
    again: str = "",
) -> onnx.ModelProto:
    b = GraphBuilder()
    x = b.input("x", ["batch", 1, WIDTH])
    past = {
        name: b.input(f"past_{name}", ["batch", HEADS, "past_length", HEAD_DIM]) for name in ("key", "value")
    }
    if position_ids is not None:
        b.input("position_ids", position_ids[1], position_ids[0])

    def rows() -> str:
        return b.commutative("Add", b("MatMul", x, b.weight(WIDTH, WIDTH)), b.weight(WIDTH), swap)

    def split(tensor: str) -> str:
        return b("Reshape", tensor, b.constant([-1, HEADS, 1, HEAD_DIM]))

    def appended(name: str) -> str:
        old = past[name] if cache_is_input else b("Tanh", past[name])
        if not append:
            return old
        new = split(rows())
        parts = [new, old] if new_first else [old, new]
        present = b("Concat", *parts, axis=append_axis, output=f"present_{name}")
        if present_is_output:
            b.output(present, ["batch", HEADS, "present_length", HEAD_DIM])
        return present

    key, value = appended("key"), appended("value")
    query_rows = rows()
    if scale_at == "query_rows":
        query_rows = scaled(b, query_rows, scale, swap=swap)
    query = split(query_rows)
    key = b("Transpose", key, perm=[0, 1, 3, 2])
    if scale_at == "key":
        key = scaled(b, key, scale, swap=swap)
    scores = b("MatMul", query, key)
    if scale_at == "scores":
        scores = scaled(b, scores, scale, swap=swap)
    if mask:
        scores = b("Add", scores, b.input("mask", ["batch", 1, 1, 1]))
    probs = b("Softmax", scores, axis=axis)
    mixed = b("MatMul", probs, value)
    b("Reshape", mixed, b.constant([-1, 1, WIDTH]), output="y")
    b.output("y", ["batch", 1, WIDTH])
    if again:
        use_again(
            b, {"query_rows": query_rows, "past": "past_key", "present": "present_key", "probs": probs}[again]
        )
    return b.model()


@pytest.mark.parametrize(
    "variation",
    [
        {},
        {"swap": True},
        {"scale_at": "key"},
        {"scale_at": "scores"},
        {"scale_at": "scores", "swap": True},
        {"append_axis": -2},
        {"axis": 3},
    ],
    ids=str,
)
def test_decoder_self_attention_matches(variation):
    """Rows at different positions in the fixed cache give what each gives alone with a growing cache."""
    model = self_attention(**variation)
    fused, report = run_pass("decoder_self_attention", model)
    assert report.fused == ["/block/TrOCRDecoderSelfAttention"]
    assert report.rejected == {}
    positions, capacity = [0, 4, 2], 6
    random = np.random.default_rng(2)
    inputs = {
        "x": random.normal(size=(len(positions), 1, WIDTH)).astype(np.float32),
        "past_key": random.normal(size=(len(positions), HEADS, capacity, HEAD_DIM)).astype(np.float32),
        "past_value": random.normal(size=(len(positions), HEADS, capacity, HEAD_DIM)).astype(np.float32),
        "position_ids": np.array(positions)[:, None],
    }
    found = run(fused, inputs)
    for row, position in enumerate(positions):
        alone = {name: array[row : row + 1] for name, array in inputs.items()}
        alone |= {name: alone[name][:, :, :position] for name in ("past_key", "past_value")}
        expected = run(model, alone)
        assert_close(found["y"][row : row + 1], expected["y"])
        for name in ("present_key", "present_value"):
            assert_close(found[name][row : row + 1, :, : position + 1], expected[name])
            untouched = inputs[name.replace("present", "past")][row, :, position + 1 :]
            np.testing.assert_array_equal(found[name][row, :, position + 1 :], untouched)


def test_decoder_self_attention_renames_the_cache_dimension():
    fused, _ = run_pass("decoder_self_attention", self_attention())
    caches = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*fused.graph.input, *fused.graph.output)
        if value.name.startswith(("past", "present"))
    }
    names = ["past_key", "past_value", "present_key", "present_value"]
    assert caches == {name: ["batch", HEADS, "capacity", HEAD_DIM] for name in names}


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"again": "query_rows"}, "is also used by Neg"),
        ({"again": "probs"}, "should have one consumer"),
        ({"scale": 0.5}, "the scale is 0.5"),
        ({"scale_at": "none"}, "the scale is 1,"),
        ({"mask": True}, "looks like a mask"),
        ({"axis": 1}, "over axis 1"),
        ({"append": False}, "expected Concat of cache and new token"),
        ({"new_first": True}, "is not an input of the graph"),
        ({"cache_is_input": False}, "is not an input of the graph"),
        ({"present_is_output": False}, "is not an output of the graph"),
        ({"position_ids": None}, "no input position_ids"),
        ({"position_ids": (onnx.TensorProto.INT32, ["batch", 1])}, "is not int64 [batch, 1]"),
        ({"position_ids": (onnx.TensorProto.INT64, [1, 1])}, "is not int64 [batch, 1]"),
    ],
    ids=str,
)
def test_decoder_self_attention_does_not_match(variation, reason):
    check_mismatch("decoder_self_attention", self_attention(**variation), reason)


@pytest.mark.parametrize("again", ["past", "present"])
def test_cache_used_again_is_not_fused(again):
    """Once fixed, it holds more rows than the growing one."""
    check_mismatch("decoder_self_attention", self_attention(again=again), f"'{again}_key'")


# residual, LayerNorm


def layernorm(
    *,
    residual_shape: tuple[int | str, ...] = ("batch", SEQ, WIDTH),
    swap: bool = False,
    axis: int = -1,
    epsilon: float | None = 1e-12,
    beta: bool = True,
    add: bool = True,
    weights: tuple[int, ...] = (WIDTH,),
    again: bool = False,
    leak: bool = False,
    mean: bool = False,
) -> onnx.ModelProto:
    b = GraphBuilder()
    x = b.input("x", ["batch", SEQ, WIDTH])
    residual = b.input("residual", residual_shape)
    total = b.commutative("Add", x, residual, swap) if add else b.commutative("Sub", x, residual, swap)
    inputs = [total, b.weight(*weights), *([b.weight(*weights)] if beta else [])]
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    b("LayerNormalization", *inputs, output="y", axis=axis, **attributes)
    b.output("y", ["batch", SEQ, WIDTH])
    if mean:
        b.nodes[-1].output.append("mean")
        b.output("mean", ["batch", SEQ, 1])
    if again:
        use_again(b, total)
    if leak:
        b.output(total, ["batch", SEQ, WIDTH])
    return b.model()


@pytest.mark.parametrize(
    ("variation", "emit_sum"),
    [
        ({}, 0),
        ({"swap": True}, 0),
        ({"axis": 2}, 0),
        ({"epsilon": None}, 0),
        ({"epsilon": 0.25}, 0),
        ({"again": True}, 1),
        ({"leak": True}, 1),
    ],
    ids=str,
)
def test_layernorm_matches(variation, emit_sum):
    fused = check_match("layernorm", layernorm(**variation), "TrOCRResidualLayerNorm")
    (node,) = (node for node in fused.graph.node if node.op_type == "TrOCRResidualLayerNorm")
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes["emit_sum"] == emit_sum
    assert attributes["epsilon"] == pytest.approx(variation.get("epsilon", 1e-12) or 1e-5, rel=1e-6, abs=0)
    assert bool(node.output[1]) == bool(emit_sum)


@pytest.mark.parametrize(
    "variation",
    [
        {"residual_shape": (1, SEQ, WIDTH)},
        {"residual_shape": (WIDTH,)},
        {"residual_shape": ("batch", 1, WIDTH), "swap": True},
        {"add": False, "again": True, "leak": True},
    ],
    ids=str,
)
def test_layernorm_of_no_residual_matches(variation):
    fused = check_match("layernorm", layernorm(**variation), "TrOCRLayerNorm")
    before = "Sub" if "add" in variation else "Add"
    assert before in {node.op_type for node in fused.graph.node}


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"residual_shape": ("other", SEQ, WIDTH)}, "is not known"),
        ({"axis": 1, "weights": (SEQ, WIDTH)}, "from axis 1 on"),
        ({"axis": 1}, "from axis 1 on"),
        ({"beta": False}, "no bias"),
        ({"weights": (1,)}, "has shape [1]"),
        ({"mean": True}, "mean or deviation"),
    ],
    ids=str,
)
def test_layernorm_does_not_match(variation, reason):
    check_mismatch("layernorm", layernorm(**variation), reason)


# bias, activation


def activation(
    *,
    form: str = "Erf",
    swap: bool = False,
    divide: bool = True,
    half: str = "last",
    root: float = math.sqrt(2),
    one: float = 1.0,
    half_value: float = 0.5,
    approximate: str = "none",
    bias: tuple[int, ...] | None = (WIDTH,),
    again: str = "",
    leak: str = "",
) -> onnx.ModelProto:
    """MatMul, bias, and an activation.

    form: Relu, Gelu, Erf, or Sigmoid, an activation that no op has.
    half: where the Erf form halves: "last" the product, "gate" 1 + erf, "first" x.
    """
    b = GraphBuilder(opset=20 if form == "Gelu" else 17)
    x = b.input("x", ["batch", SEQ, WIDTH])
    z = b("MatMul", x, b.weight(WIDTH, WIDTH))
    interior = {"product": z}
    if bias is not None:
        z = b.commutative("Add", z, b.weight(*bias), swap)
    interior["biased"] = z
    if form == "Gelu":
        y = b("Gelu", z, approximate=approximate)
    elif form == "Erf":
        inner = b("Div", z, b.constant(root)) if divide else scaled(b, z, 1 / root, swap=swap)
        interior["erf"] = b("Erf", inner)
        y = b.commutative("Add", interior["erf"], b.constant(one), swap)
        if half == "gate":
            y = scaled(b, y, half_value, swap=swap)
        y = b.commutative("Mul", scaled(b, z, half_value, swap=swap) if half == "first" else z, y, swap)
        if half == "last":
            y = scaled(b, y, half_value, swap=swap) if divide else b("Div", y, b.constant(1 / half_value))
    else:
        y = b(form, z)
    b("MatMul", y, b.weight(WIDTH, WIDTH), output="y")
    b.output("y", ["batch", SEQ, WIDTH])
    if again:
        use_again(b, interior[again])
    if leak:
        b.output(interior[leak], None)
    return b.model()


@pytest.mark.parametrize("swap", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize(
    "variation",
    [
        {"form": "Relu"},
        {"form": "Gelu"},
        {"half": "last"},
        {"half": "gate"},
        {"half": "first"},
        {"half": "last", "divide": False},
        {"half": "first", "divide": False},
        {"again": "product", "form": "Relu"},  # not interior: the op takes it as it is
        {"again": "product"},
    ],
    ids=str,
)
def test_bias_activation_matches(variation, swap):
    model = activation(**variation, swap=swap)
    fused = check_match("bias_activation", model, "TrOCRBiasActivation")
    (node,) = (node for node in fused.graph.node if node.op_type == "TrOCRBiasActivation")
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes["activation"] == (b"relu" if variation.get("form") == "Relu" else b"gelu")


@pytest.mark.parametrize(
    ("variation", "reason"),
    [
        ({"form": "Gelu", "approximate": "tanh"}, "approximates GELU by tanh"),
        ({"root": 2.0}, "is not x / sqrt(2)"),
        ({"root": 1.41}, "is not x / sqrt(2)"),
        ({"one": 2.0}, "expected 1 + erf"),
        ({"half_value": 0.25}, "is no part of"),
        ({"bias": None}, "expected Add of the bias"),
        ({"bias": None, "form": "Relu"}, "expected Add of the bias"),
        ({"bias": (1,)}, "adds no constant bias"),
        ({"bias": (SEQ, WIDTH)}, "adds no constant bias"),
        ({"bias": (SEQ, 1), "form": "Gelu"}, "adds no constant bias"),
        ({"again": "erf"}, "should have one consumer"),
        ({"again": "biased"}, "is also used by Neg"),
        ({"again": "biased", "form": "Gelu"}, "is also used by Neg"),
        ({"leak": "biased", "form": "Relu"}, "is an output of the graph"),
        ({"leak": "biased"}, "is an output of the graph"),
        ({"leak": "erf"}, "is an output of the graph"),
    ],
    ids=str,
)
def test_bias_activation_does_not_match(variation, reason):
    check_mismatch("bias_activation", activation(**variation), reason)


def test_activation_without_op_is_no_anchor():
    fused, report = run_pass("bias_activation", activation(form="Sigmoid"))
    assert (report.fused, report.rejected) == ([], {})
    assert all(node.domain == "" for node in fused.graph.node)
