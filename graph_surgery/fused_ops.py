"""The one table of fused ops: names, inputs, outputs, attributes and definitions.

Every op is defined by an ONNX local function made of standard operators. That function is the specification
of the CUDA plugin of the same name, and it is what ONNX Runtime executes where there is no GPU. All bodies
compute in float32 and round once, at the output; in a float32 graph the casts vanish.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx.parser

DOMAIN = "trocr"
VERSION = "1"
# The bodies use LayerNormalization (17) and nothing whose form changed up to opset 20. ONNX wants a function
# and its model to agree on the opset, so a body is instantiated for the opset of the model that carries it.
MIN_OPSET = 17
FP8_OPSET = 19  # the first whose Cast knows 8-bit floating-point numbers


class SurgeryError(ValueError):
    """A graph cannot be fused as asked; the message names the graph, the op and the reason."""


@dataclass(frozen=True)
class Attribute:
    """An attribute of a fused op: required without a `default`, of any value without `allowed`.

    for_plugin: False where only the ONNX function has it, and `fuse.strip_functions` leaves it out.
    """

    name: str
    type: type[int] | type[float] | type[str]
    default: int | float | str | None = None
    allowed: tuple[int | str, ...] = ()
    for_plugin: bool = True

    def check(self, op: str, value: int | float | str) -> int | float | str:
        """Return `value` if it suits, else raise SurgeryError."""
        if type(value) is not self.type:
            raise SurgeryError(
                f"{op}: attribute {self.name}={value!r} is of type {type(value).__name__}, "
                f"expected {self.type.__name__}"
            )
        if self.allowed and value not in self.allowed:
            raise SurgeryError(
                f"{op}: attribute {self.name}={value!r} is not one of {', '.join(map(repr, self.allowed))}"
            )
        return value


@dataclass(frozen=True)
class FusedOp:
    """One fused op.

    name: ONNX operator and TensorRT plugin name.
    plugin: its name in `--plugins`.
    inputs, outputs: names in order; shapes and types are in docs/design.md.
    body: the statements of the function in ONNX's textual syntax.
    min_opset: the first opset that has all their operators.
    """

    name: str
    plugin: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    body: str
    min_opset: int = MIN_OPSET

    def node_attributes(self, **values: int | float | str) -> dict[str, int | float | str]:
        """All attributes of a node: checked, and completed with defaults, plugin version and namespace."""
        unknown = values.keys() - {attribute.name for attribute in self.attributes}
        if unknown:
            raise SurgeryError(f"{self.name}: unknown attribute {', '.join(sorted(unknown))}")
        complete = {}
        for attribute in self.attributes:
            value = values.get(attribute.name, attribute.default)
            if value is None:
                raise SurgeryError(f"{self.name}: attribute {attribute.name} is required")
            complete[attribute.name] = attribute.check(self.name, value)
        return complete | {"plugin_version": VERSION, "plugin_namespace": DOMAIN}

    def function(self, opset: int) -> onnx.FunctionProto:
        """The op's definition as a local function for a model of this opset."""
        if opset < self.min_opset:
            raise SurgeryError(f"{self.name} needs opset {self.min_opset} or newer, the graph has {opset}")
        declared = [
            attribute.name if attribute.default is None else _with_default(attribute)
            for attribute in self.attributes
        ]
        # ONNX Runtime refuses a call with attributes that the function does not declare, and TensorRT wants
        # these two.
        declared += [f'plugin_version: string = "{VERSION}"', f'plugin_namespace: string = "{DOMAIN}"']
        return onnx.parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
            f"{self.name} <{', '.join(declared)}> ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})\n"
            f"{{{self.body}}}"
        )


def _with_default(attribute: Attribute) -> str:
    if attribute.type is str:
        return f'{attribute.name}: string = "{attribute.default}"'
    return f"{attribute.name}: {attribute.type.__name__} = {attribute.default}"


# Statements: `qkv` [B, S, 3 * D] -> `wide_context`, float32 [B, S, D].
_ATTEND = """
        num_heads = Constant <value_int: int = @num_heads> ()
        first_axis = Constant <value_ints = [0]> ()
        heads_dim = Unsqueeze (num_heads, first_axis)
        lead = Constant <value_ints = [0, 0, 3]> ()
        rest = Constant <value_ints = [-1]> ()
        packed_shape = Concat <axis = 0> (lead, heads_dim, rest)
        rows_shape = Constant <value_ints = [0, 0, -1]> ()

        wide = Cast <to = 1> (qkv)
        packed_rows = Reshape (wide, packed_shape)                          # [B, S, 3, H, d]
        packed = Transpose <perm = [2, 0, 3, 1, 4]> (packed_rows)           # [3, B, H, S, d]
        first = Constant <value_int = 0> ()
        second = Constant <value_int = 1> ()
        third = Constant <value_int = 2> ()
        query = Gather <axis = 0> (packed, first)                           # [B, H, S, d]
        key = Gather <axis = 0> (packed, second)
        value = Gather <axis = 0> (packed, third)

        head_dim = Shape <start = -1> (query)
        head_dim_f = Cast <to = 1> (head_dim)
        root = Sqrt (head_dim_f)
        scaled = Div (query, root)
        key_t = Transpose <perm = [0, 1, 3, 2]> (key)
        scores = MatMul (scaled, key_t)                                     # [B, H, S, S]
        probs = Softmax <axis = -1> (scores)
        mixed = MatMul (probs, value)                                       # [B, H, S, d]
        mixed_rows = Transpose <perm = [0, 2, 1, 3]> (mixed)
        wide_context = Reshape (mixed_rows, rows_shape)"""

ENCODER_ATTENTION = FusedOp(
    name="TrOCREncoderAttention",
    plugin="encoder_attention",
    inputs=("qkv",),
    outputs=("context",),
    attributes=(Attribute("num_heads", int),),
    body=f"""{_ATTEND}
        context = CastLike (wide_context, qkv)
    """,
)

DECODER_SELF_ATTENTION = FusedOp(
    name="TrOCRDecoderSelfAttention",
    plugin="decoder_self_attention",
    inputs=("qkv", "past_key", "past_value", "position_ids"),
    outputs=("context", "present_key", "present_value"),
    attributes=(Attribute("num_heads", int),),
    # Of the C slots only the first T are looked at, up to the last position of the batch. What lies beyond a
    # row's own position may be anything, NaN too: values are masked as well as scores, for 0 * NaN is NaN.
    body="""
        num_heads = Constant <value_int: int = @num_heads> ()
        first_axis = Constant <value_ints = [0]> ()
        heads_dim = Unsqueeze (num_heads, first_axis)
        lead = Constant <value_ints = [0, 3]> ()
        one_row = Constant <value_ints = [1, -1]> ()
        packed_shape = Concat <axis = 0> (lead, heads_dim, one_row)
        rows_shape = Constant <value_ints = [0, 1, -1]> ()

        packed = Reshape (qkv, packed_shape)                                # [B, 3, H, 1, d]
        first = Constant <value_int = 0> ()
        second = Constant <value_int = 1> ()
        third = Constant <value_int = 2> ()
        narrow_query = Gather <axis = 1> (packed, first)                    # [B, H, 1, d]
        new_key = Gather <axis = 1> (packed, second)
        new_value = Gather <axis = 1> (packed, third)

        cache_axes = Constant <value_ints = [2, 3]> ()
        position = Unsqueeze (position_ids, cache_axes)                     # [B, 1, 1, 1]
        row_shape = Shape (new_key)
        slot = Expand (position, row_shape)                                 # [B, H, 1, d]
        present_key = ScatterElements <axis = 2> (past_key, slot, new_key)
        present_value = ScatterElements <axis = 2> (past_value, slot, new_value)

        last = ReduceMax <keepdims = 0> (position_ids)
        length = Add (last, second)
        length_dim = Unsqueeze (length, first_axis)
        slots_axis = Constant <value_ints = [2]> ()
        narrow_key = Slice (present_key, first_axis, length_dim, slots_axis)
        narrow_value = Slice (present_value, first_axis, length_dim, slots_axis)
        slots = Range (first, length, second)
        seen = LessOrEqual (slots, position_ids)                            # [B, T]
        score_axes = Constant <value_ints = [1, 2]> ()
        value_axes = Constant <value_ints = [1, 3]> ()
        seen_score = Unsqueeze (seen, score_axes)                           # [B, 1, 1, T]
        seen_slot = Unsqueeze (seen, value_axes)                            # [B, 1, T, 1]

        query = Cast <to = 1> (narrow_query)
        key = Cast <to = 1> (narrow_key)                                    # [B, H, T, d]
        value = Cast <to = 1> (narrow_value)
        head_dim = Shape <start = -1> (query)
        head_dim_f = Cast <to = 1> (head_dim)
        root = Sqrt (head_dim_f)
        scaled = Div (query, root)
        key_t = Transpose <perm = [0, 1, 3, 2]> (key)
        all_scores = MatMul (scaled, key_t)                                 # [B, H, 1, T]
        unseen_score = Constant <value_float = -inf> ()
        unseen_value = Constant <value_float = 0.0> ()
        scores = Where (seen_score, all_scores, unseen_score)
        seen_value = Where (seen_slot, value, unseen_value)
        probs = Softmax <axis = -1> (scores)
        mixed = MatMul (probs, seen_value)                                  # [B, H, 1, d]
        wide_context = Reshape (mixed, rows_shape)
        context = CastLike (wide_context, qkv)
    """,
)

CROSS_ATTENTION = FusedOp(
    name="TrOCRCrossAttention",
    plugin="cross_attention",
    inputs=("query", "key", "value"),
    outputs=("context",),
    attributes=(Attribute("num_heads", int),),
    # Rows r * n to r * n + n - 1 of B = I * n rows share the keys and values of image r.
    body="""
        num_heads = Constant <value_int: int = @num_heads> ()
        first_axis = Constant <value_ints = [0]> ()
        heads_dim = Unsqueeze (num_heads, first_axis)
        images = Shape <start = 0, end = 1> (key)
        head_dim = Shape <start = -1> (key)
        rest = Constant <value_ints = [-1]> ()
        split_shape = Concat <axis = 0> (images, rest, heads_dim, head_dim)
        rows_shape = Shape (query)

        wide_query = Cast <to = 1> (query)
        wide_key = Cast <to = 1> (key)
        wide_value = Cast <to = 1> (value)
        split_query = Reshape (wide_query, split_shape)                     # [I, n, H, d]
        query_heads = Transpose <perm = [0, 2, 1, 3]> (split_query)         # [I, H, n, d]
        key_t = Transpose <perm = [0, 1, 3, 2]> (wide_key)                  # [I, H, d, S]

        head_dim_f = Cast <to = 1> (head_dim)
        root = Sqrt (head_dim_f)
        scaled = Div (query_heads, root)
        scores = MatMul (scaled, key_t)                                     # [I, H, n, S]
        probs = Softmax <axis = -1> (scores)
        mixed = MatMul (probs, wide_value)                                  # [I, H, n, d]
        by_row = Transpose <perm = [0, 2, 1, 3]> (mixed)                    # [I, n, H, d]
        wide_context = Reshape (by_row, rows_shape)
        context = CastLike (wide_context, query)
    """,
)

# Statements: `x` [..., K] and `weight` [N, K] -> their `product`, float32 [..., N].
_MULTIPLY = """
        wide_x = Cast <to = 1> (x)
        wide_weight = Cast <to = 1> (weight)
        weight_t = Transpose <perm = [1, 0]> (wide_weight)
        product = MatMul (wide_x, weight_t)"""

CROSS_KEY_VALUE = FusedOp(
    name="TrOCRCrossKeyValue",
    plugin="cross_key_value",
    inputs=("x", "weight", "bias"),
    outputs=("key", "value"),
    attributes=(Attribute("num_heads", int),),
    body=f"""
        num_heads = Constant <value_int: int = @num_heads> ()
        first_axis = Constant <value_ints = [0]> ()
        heads_dim = Unsqueeze (num_heads, first_axis)
        lead = Constant <value_ints = [0, 0, 2]> ()
        rest = Constant <value_ints = [-1]> ()
        packed_shape = Concat <axis = 0> (lead, heads_dim, rest)

        {_MULTIPLY}
        biased = Add (product, bias)                                        # [B, S, 2*D]
        packed_rows = Reshape (biased, packed_shape)                        # [B, S, 2, H, d]
        packed = Transpose <perm = [2, 0, 3, 1, 4]> (packed_rows)           # [2, B, H, S, d]
        first = Constant <value_int = 0> ()
        second = Constant <value_int = 1> ()
        wide_key = Gather <axis = 0> (packed, first)
        wide_value = Gather <axis = 0> (packed, second)
        key = CastLike (wide_key, x)
        value = CastLike (wide_value, x)
    """,
)

RESIDUAL_LAYER_NORM = FusedOp(
    name="TrOCRResidualLayerNorm",
    plugin="layernorm",
    inputs=("x", "residual", "gamma", "beta"),
    outputs=("normed", "sum"),
    attributes=(Attribute("epsilon", float), Attribute("emit_sum", int, 0, (0, 1))),
    # A function always has all its outputs; a node without emit_sum leaves the name of the second one empty.
    body="""
        wide_x = Cast <to = 1> (x)
        wide_residual = Cast <to = 1> (residual)
        wide_gamma = Cast <to = 1> (gamma)
        wide_beta = Cast <to = 1> (beta)
        wide_sum = Add (wide_x, wide_residual)
        wide_normed =
            LayerNormalization <axis = -1, epsilon: float = @epsilon> (wide_sum, wide_gamma, wide_beta)
        normed = CastLike (wide_normed, x)
        sum = CastLike (wide_sum, x)
    """,
)

LAYER_NORM = FusedOp(
    name="TrOCRLayerNorm",
    plugin="layernorm",
    inputs=("x", "gamma", "beta"),
    outputs=("normed",),
    attributes=(Attribute("epsilon", float),),
    body="""
        wide_x = Cast <to = 1> (x)
        wide_gamma = Cast <to = 1> (gamma)
        wide_beta = Cast <to = 1> (beta)
        wide_normed =
            LayerNormalization <axis = -1, epsilon: float = @epsilon> (wide_x, wide_gamma, wide_beta)
        normed = CastLike (wide_normed, x)
    """,
)

# Statements that choose among `none`, `gelu`, `relu`: `biased` -> `activated`, both float32. Opset 17 cannot
# compare strings; but two that are equal have one distinct element. GELU is x * Phi(x), with the cumulative
# normal distribution Phi(x) = (1 + erf(x / sqrt(2))) / 2. The branches are chosen when a graph is loaded.
_ACTIVATE = """
        activation = Constant <value_string: string = @activation> ()
        first_axis = Constant <value_ints = [0]> ()
        chosen = Unsqueeze (activation, first_axis)
        one = Constant <value_int = 1> ()
        relu = Constant <value_strings = ["relu"]> ()
        chosen_or_relu = Concat <axis = 0> (chosen, relu)
        distinct_of_relu = Unique (chosen_or_relu)
        num_distinct_of_relu = Size (distinct_of_relu)
        is_relu = Equal (num_distinct_of_relu, one)
        gelu = Constant <value_strings = ["gelu"]> ()
        chosen_or_gelu = Concat <axis = 0> (chosen, gelu)
        distinct_of_gelu = Unique (chosen_or_gelu)
        num_distinct_of_gelu = Size (distinct_of_gelu)
        is_gelu = Equal (num_distinct_of_gelu, one)
        rectified = If (is_relu) <
            then_branch = rectify () => (float[] positive) { positive = Relu (biased) },
            else_branch = pass () => (float[] same) { same = Identity (biased) }
        >
        activated = If (is_gelu) <
            then_branch = gate () => (float[] gated) {
                root_two = Constant <value_float = 1.4142135> ()
                unit = Constant <value_float = 1.0> ()
                half = Constant <value_float = 0.5> ()
                normalised = Div (biased, root_two)
                error = Erf (normalised)
                shifted = Add (error, unit)
                doubled = Mul (biased, shifted)
                gated = Mul (doubled, half)
            },
            else_branch = keep () => (float[] kept) { kept = Identity (rectified) }
        >"""

BIAS_ACTIVATION = FusedOp(
    name="TrOCRBiasActivation",
    plugin="bias_activation",
    inputs=("x", "bias"),
    outputs=("y",),
    attributes=(Attribute("activation", str, allowed=("gelu", "relu")),),
    body=f"""
        wide_x = Cast <to = 1> (x)
        wide_bias = Cast <to = 1> (bias)
        biased = Add (wide_x, wide_bias)
        {_ACTIVATE}
        y = CastLike (activated, x)
    """,
)

# Row statistics are float32 [..., N / 64, 2]: of each 64 columns the mean, and the sum of squared distances
# from it.
STATISTICS_WIDTH = 64

# Statements: `rounded`, float32 values of type T's precision -> `statistics`.
_TAKE_STATISTICS = f"""
        rows_shape = Shape <start = 0, end = -1> (rounded)
        parts_shape = Constant <value_ints = [-1, {STATISTICS_WIDTH}]> ()
        split_shape = Concat <axis = 0> (rows_shape, parts_shape)
        parts = Reshape (rounded, split_shape)                              # [..., N / 64, 64]
        last_axis = Constant <value_ints = [-1]> ()
        part_sum = ReduceSum <keepdims = 1> (parts, last_axis)
        part_width = Constant <value_float = {STATISTICS_WIDTH}.0> ()
        part_mean = Div (part_sum, part_width)
        distances = Sub (parts, part_mean)
        squares = Mul (distances, distances)
        part_m2 = ReduceSum <keepdims = 1> (squares, last_axis)
        statistics = Concat <axis = -1> (part_mean, part_m2)"""

ROW_STATISTICS = FusedOp(
    name="TrOCRRowStatistics",
    plugin="linear",
    inputs=("x",),
    outputs=("statistics",),
    attributes=(),
    body=f"""
        rounded = Cast <to = 1> (x)
        {_TAKE_STATISTICS}
    """,
)

# Statements: the `statistics` of rows of K -> their `mean` and `deviation`, float32 [..., 1]. Parts of equal
# size: the mean is that of their means, and the squared distances from it are those within the parts plus 64
# times those of their means (Chan, Golub, LeVeque 1983).
_MOMENTS = f"""
        mean_index = Constant <value_int = 0> ()
        m2_index = Constant <value_int = 1> ()
        last_axis = Constant <value_ints = [-1]> ()
        part_mean = Gather <axis = -1> (statistics, mean_index)             # [..., K / 64]
        part_m2 = Gather <axis = -1> (statistics, m2_index)
        num_parts = Shape <start = -1> (part_mean)
        num_parts_f = Cast <to = 1> (num_parts)
        sum_of_means = ReduceSum <keepdims = 1> (part_mean, last_axis)      # [..., 1]
        mean = Div (sum_of_means, num_parts_f)
        distances = Sub (part_mean, mean)
        squares = Mul (distances, distances)
        between = ReduceSum <keepdims = 1> (squares, last_axis)
        within = ReduceSum <keepdims = 1> (part_m2, last_axis)
        part_width = Constant <value_float = {STATISTICS_WIDTH}.0> ()
        all_between = Mul (between, part_width)
        m2 = Add (within, all_between)
        width_f = Mul (num_parts_f, part_width)
        variance = Div (m2, width_f)
        epsilon = Constant <value_float: float = @epsilon> ()
        shifted_variance = Add (variance, epsilon)
        deviation = Sqrt (shifted_variance)"""

LAYER_NORM_LINEAR = FusedOp(
    name="TrOCRLayerNormLinear",
    plugin="linear",
    inputs=("x", "statistics", "weight", "weight_sum", "bias"),
    outputs=("y",),
    attributes=(
        Attribute("epsilon", float),
        Attribute("activation", str, "none", ("none", "gelu", "relu")),
    ),
    body=f"""{_MOMENTS}
        {_MULTIPLY}
        product_of_mean = Mul (mean, weight_sum)
        centred = Sub (product, product_of_mean)
        normed = Div (centred, deviation)
        biased = Add (normed, bias)
        {_ACTIVATE}
        y = CastLike (activated, x)
    """,
)

LINEAR_RESIDUAL = FusedOp(
    name="TrOCRLinearResidual",
    plugin="linear",
    inputs=("x", "weight", "bias", "residual"),
    outputs=("y", "statistics"),
    attributes=(Attribute("emit_statistics", int, 0, (0, 1)),),
    # As in TrOCRResidualLayerNorm, a node that emits none leaves the name of the second output empty.
    body=f"""
        {_MULTIPLY}
        wide_residual = Cast <to = 1> (residual)
        biased = Add (product, bias)
        wide_y = Add (biased, wide_residual)
        y = CastLike (wide_y, x)
        rounded = Cast <to = 1> (y)
        {_TAKE_STATISTICS}
    """,
)

# 8-bit floating-point numbers, e4m3: a tensor's values by its scale, the largest of them by 448.
FP8_TYPE = onnx.TensorProto.FLOAT8E4M3FN
FP8_MAX = 448.0
# The columns of each 16 as the tensor cores' accumulators leave them: column 8 b + 2 t + i is stored at
# 4 t + 2 b + i. Weights have their K columns in the same order, so that products do not change.
FRAGMENT = (2, 4, 2)  # sizes of b, t, i

# Statements: `values` float32 [..., N] and `output_scale` -> `scaled_values`, what is rounded to e4m3: by the
# scale, in fragment order.
_SCALE_FRAGMENTS = f"""
                fragments_shape = Constant <value_ints = [-1, {", ".join(map(str, FRAGMENT))}]> ()
                values_shape = Shape (values)
                columns = Reshape (values, fragments_shape)
                stored_columns = Transpose <perm = [0, 2, 1, 3]> (columns)
                stored = Reshape (stored_columns, values_shape)
                scaled_values = Div (stored, output_scale)"""

FP8_ROW_STATISTICS = FusedOp(
    name="TrOCRFp8RowStatistics",
    plugin="linear",
    inputs=("x",),
    outputs=("statistics", "quantized"),
    attributes=(Attribute("scale", float),),
    body=f"""
        rounded = Cast <to = 1> (x)
        {_TAKE_STATISTICS}
        values = Identity (rounded)
        output_scale = Constant <value_float: float = @scale> ()
        {_SCALE_FRAGMENTS}
        quantized = Cast <to = {FP8_TYPE}> (scaled_values)
    """,
    min_opset=FP8_OPSET,
)

FP8_LAYER_NORM_LINEAR = FusedOp(
    name="TrOCRFp8LayerNormLinear",
    plugin="linear",
    inputs=("x", "statistics", "weight", "weight_sum", "bias"),
    outputs=("y",),
    attributes=(
        Attribute("epsilon", float),
        Attribute("activation", str, "none", ("none", "gelu", "relu")),
        Attribute("product_scale", float),
        Attribute("output_scale", float, 0.0),
        # What y is: a function cannot tell that from output_scale, for branches have one type.
        Attribute(
            "output_type",
            int,
            onnx.TensorProto.FLOAT16,
            (onnx.TensorProto.FLOAT16, FP8_TYPE),
            for_plugin=False,
        ),
    ),
    body=f"""{_MOMENTS}

        {_MULTIPLY}
        product_scale = Constant <value_float: float = @product_scale> ()
        scaled_product = Mul (product, product_scale)
        product_of_mean = Mul (mean, weight_sum)
        centred = Sub (scaled_product, product_of_mean)
        normed = Div (centred, deviation)
        biased = Add (normed, bias)
        {_ACTIVATE}
        output_scale = Constant <value_float: float = @output_scale> ()
        zero = Constant <value_float = 0.0> ()
        is_quantized = Greater (output_scale, zero)
        wide_y = If (is_quantized) <
            then_branch = quantize () => (float[] scaled_values) {{
                values = Identity (activated)
                {_SCALE_FRAGMENTS}
            }},
            else_branch = leave () => (float[] left) {{ left = Identity (activated) }}
        >
        y = Cast <to: int = @output_type> (wide_y)
    """,
    min_opset=FP8_OPSET,
)

FP8_LINEAR_RESIDUAL = FusedOp(
    name="TrOCRFp8LinearResidual",
    plugin="linear",
    inputs=("x", "weight", "bias", "residual"),
    outputs=("y", "statistics", "quantized"),
    attributes=(
        Attribute("emit_statistics", int, 0, (0, 1)),
        Attribute("product_scale", float),
        Attribute("output_scale", float, 1.0),
    ),
    # A node that emits none leaves the names of the second and third output empty.
    body=f"""
        {_MULTIPLY}
        wide_residual = Cast <to = 1> (residual)
        product_scale = Constant <value_float: float = @product_scale> ()
        scaled_product = Mul (product, product_scale)
        biased = Add (scaled_product, bias)
        wide_y = Add (biased, wide_residual)
        y = CastLike (wide_y, residual)
        rounded = Cast <to = 1> (y)
        {_TAKE_STATISTICS}
        values = Identity (rounded)
        output_scale = Constant <value_float: float = @output_scale> ()
        {_SCALE_FRAGMENTS}
        quantized = Cast <to = {FP8_TYPE}> (scaled_values)
    """,
    min_opset=FP8_OPSET,
)

FP8_ENCODER_ATTENTION = FusedOp(
    name="TrOCRFp8EncoderAttention",
    plugin="encoder_attention",
    inputs=("qkv",),
    outputs=("context",),
    attributes=(Attribute("num_heads", int), Attribute("output_scale", float)),
    body=f"""{_ATTEND}
        values = Identity (wide_context)
        output_scale = Constant <value_float: float = @output_scale> ()
        {_SCALE_FRAGMENTS}
        context = Cast <to = {FP8_TYPE}> (scaled_values)
    """,
    min_opset=FP8_OPSET,
)

# Pixels of a patch's side, and what they are counted from: v - 128 is exact in every type.
PATCH_SIZE = 16
PIXEL_CENTRE = 128

PATCH_EMBEDDING = FusedOp(
    name="TrOCRPatchEmbedding",
    plugin="patch_embedding",
    inputs=("pixels", "weight", "bias", "positions"),
    outputs=("y", "statistics"),
    attributes=(Attribute("scale", float), Attribute("emit_statistics", int, 0, (0, 1))),
    # A row of the weight has a patch's pixels in the order channel, y / 4, x / 4, x / 2 % 2, y % 4, x % 2,
    # the last fastest: as the kernels read them. SpaceToDepth leaves y, x, channel. The positions' first rows
    # are the special tokens, complete.
    body=f"""
        wide_pixels = Cast <to = 1> (pixels)
        centre = Constant <value_float = {PIXEL_CENTRE}.0> ()
        centred = Sub (wide_pixels, centre)
        deep = SpaceToDepth <blocksize = {PATCH_SIZE}> (centred)            # [B, 768, rows, columns]
        lines_shape = Constant <value_ints = [0, 4, 4, 4, 2, 2, 3, -1]> ()
        lines = Reshape (deep, lines_shape)
        ordered = Transpose <perm = [0, 7, 6, 1, 3, 4, 2, 5]> (lines)
        patches_shape = Constant <value_ints = [0, -1, {3 * PATCH_SIZE * PATCH_SIZE}]> ()
        patches = Reshape (ordered, patches_shape)                          # [B, P, 768]
        wide_weight = Cast <to = 1> (weight)
        weight_t = Transpose <perm = [1, 0]> (wide_weight)
        product = MatMul (patches, weight_t)
        scale = Constant <value_float: float = @scale> ()
        scaled = Mul (product, scale)
        biased = Add (scaled, bias)

        wide_positions = Cast <to = 1> (positions)
        first = Constant <value_ints = [0]> ()
        num_tokens = Shape <start = 0, end = 1> (positions)
        num_patches = Shape <start = 1, end = 2> (patches)
        num_special = Sub (num_tokens, num_patches)
        special = Slice (wide_positions, first, num_special, first)
        patch_positions = Slice (wide_positions, num_special, num_tokens, first)
        batch = Shape <start = 0, end = 1> (pixels)
        outputs = Shape <start = 1, end = 2> (positions)
        special_shape = Concat <axis = 0> (batch, num_special, outputs)
        special_rows = Expand (special, special_shape)
        patch_rows = Add (biased, patch_positions)
        wide_y = Concat <axis = 1> (special_rows, patch_rows)
        y = CastLike (wide_y, weight)
        rounded = Cast <to = 1> (y)
        {_TAKE_STATISTICS}
    """,
)

FUSED_OPS: Mapping[str, FusedOp] = {
    op.name: op
    for op in (
        ENCODER_ATTENTION,
        DECODER_SELF_ATTENTION,
        CROSS_ATTENTION,
        CROSS_KEY_VALUE,
        RESIDUAL_LAYER_NORM,
        LAYER_NORM,
        BIAS_ACTIVATION,
        ROW_STATISTICS,
        LAYER_NORM_LINEAR,
        LINEAR_RESIDUAL,
        PATCH_EMBEDDING,
        FP8_ENCODER_ATTENTION,
        FP8_ROW_STATISTICS,
        FP8_LAYER_NORM_LINEAR,
        FP8_LINEAR_RESIDUAL,
    )
}

FP8_PLUGINS = ("encoder_attention", "linear")  # whose ops fp8 exchanges: it needs both

# The ops behind each name of `--plugins`.
PLUGINS: Mapping[str, tuple[FusedOp, ...]] = {
    plugin: tuple(op for op in FUSED_OPS.values() if op.plugin == plugin)
    for plugin in dict.fromkeys(op.plugin for op in FUSED_OPS.values())
}

GROUPS: Mapping[str, frozenset[str]] = {
    "attention": frozenset({"encoder_attention", "decoder_self_attention", "cross_attention"}),
    # Those that won against the stock engine in the committed measurements.
    "fused": frozenset(PLUGINS),
    "all": frozenset(PLUGINS),
    "none": frozenset(),
}


def parse_plugins(text: str) -> frozenset[str]:
    """Turn the value of `--plugins`, names and groups separated by commas, into keys of `PLUGINS`.

    Raises SurgeryError for a name that is neither.
    """
    chosen: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        if name in PLUGINS:
            chosen.add(name)
        elif name in GROUPS:
            chosen |= GROUPS[name]
        else:
            raise SurgeryError(
                f"--plugins {text!r}: unknown name {name!r}; known are {', '.join(PLUGINS)}, "
                f"and the groups {', '.join(GROUPS)}"
            )
    return frozenset(chosen)
