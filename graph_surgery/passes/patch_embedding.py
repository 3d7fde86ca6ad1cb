"""What turns an image into the first layer's input: convolution, special tokens, positions."""

import logging
from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from graph_surgery.checkpoint import CheckpointError, ModelSpec, Normalization, load_normalization
from graph_surgery.fused_ops import (
    PATCH_EMBEDDING,
    PATCH_SIZE,
    PIXEL_CENTRE,
    ROW_STATISTICS,
    STATISTICS_WIDTH,
)
from graph_surgery.passes.base import FusionPass, NewNode
from graph_surgery.passes.matching import Mismatch, describe, only_consumer, require_op, shape

logger = logging.getLogger(__name__)

# Of the convolution; an attribute that is absent has its default, which is the first.
CONVOLUTION = {
    "kernel_shape": (None, [PATCH_SIZE, PATCH_SIZE]),
    "strides": ([PATCH_SIZE, PATCH_SIZE],),
    "pads": (None, [0, 0, 0, 0]),
    "dilations": (None, [1, 1]),
    "group": (None, 1),
    "auto_pad": (None, "NOTSET", "VALID"),
}


class PatchEmbeddingPass(FusionPass):
    """Conv, Reshape, Transpose, Pad and Add -> one op on uint8 pixels, which become the graph's input.

    normalization: what is folded into the weights; without it nothing matches.
    """

    op = PATCH_EMBEDDING
    anchors = frozenset({"Conv"})

    def __init__(self, normalization: Normalization | None = None):
        self.normalization = normalization

    def for_model(self, spec: ModelSpec) -> FusionPass:
        try:
            return PatchEmbeddingPass(load_normalization(spec))
        except CheckpointError as error:
            logger.warning("the patch embedding is left as it is: %s", error)
            return self

    def expected(self, spec: ModelSpec, fused: Collection[str]) -> dict[str, int]:
        encoder = spec.encoder
        obstacle = None
        if (encoder.patch_height, encoder.patch_width) != (PATCH_SIZE, PATCH_SIZE):
            obstacle = (
                f"patches are {encoder.patch_height} x {encoder.patch_width}, not {PATCH_SIZE} x {PATCH_SIZE}"
            )
        elif encoder.image_height % PATCH_SIZE or encoder.image_width % PATCH_SIZE:
            obstacle = (
                f"images are {encoder.image_height} x {encoder.image_width}, no multiples of {PATCH_SIZE}"
            )
        elif encoder.hidden_size % STATISTICS_WIDTH:
            obstacle = f"the encoder's width is {encoder.hidden_size}, not a multiple of {STATISTICS_WIDTH}"
        if obstacle:
            logger.warning("the patch embedding of %s is left as it is: %s", spec.name, obstacle)
        return {} if obstacle or self.normalization is None else {"encoder": 1}

    def match(self, graph: gs.Graph, anchor: gs.Node) -> list[NewNode]:
        if self.normalization is None:
            raise Mismatch("the normalisation of the pixels is not known")
        pixels, kernel, *bias = anchor.inputs
        if not any(pixels is tensor for tensor in graph.inputs):
            raise Mismatch("it does not read the graph's input")
        only_consumer(pixels)
        if not all(isinstance(tensor, gs.Constant) for tensor in (kernel, *bias)):
            raise Mismatch("its weight or bias is not constant")
        for name, allowed in CONVOLUTION.items():
            if (value := anchor.attrs.get(name)) not in allowed:
                raise Mismatch(f"its {name} is {value}, not {allowed[-1]}")
        outputs = kernel.shape[0]
        if tuple(kernel.shape[1:]) != (3, PATCH_SIZE, PATCH_SIZE):
            raise Mismatch(
                f"its weight has shape {list(kernel.shape)}, not [N, 3, {PATCH_SIZE}, {PATCH_SIZE}]"
            )
        if outputs % STATISTICS_WIDTH:
            raise Mismatch(f"it has {outputs} channels, not a multiple of {STATISTICS_WIDTH}")
        height, width = shape(pixels)[2:]
        if any(not isinstance(size, int) or size % PATCH_SIZE for size in (height, width)):
            raise Mismatch(f"its images are {height} x {width}, no multiples of {PATCH_SIZE}")

        num_patches = height // PATCH_SIZE * (width // PATCH_SIZE)
        reshape = require_op(only_consumer(anchor.outputs[0]), "Reshape", "after the convolution")
        if shape(reshape.outputs[0])[1:] != (outputs, num_patches):
            raise Mismatch(f"{describe(reshape)} gives {list(shape(reshape.outputs[0]))}")
        transpose = require_op(only_consumer(reshape.outputs[0]), "Transpose", "of the patches")
        if transpose.attrs.get("perm") != [0, 2, 1]:
            raise Mismatch(f"{describe(transpose)} has perm {transpose.attrs.get('perm')}, not [0, 2, 1]")
        pad = require_op(only_consumer(transpose.outputs[0]), "Pad", "for the special tokens")
        special = _padded_rows(pad)
        add = require_op(only_consumer(pad.outputs[0]), "Add", "of the positions")
        (positions,) = [tensor for tensor in add.inputs if tensor is not pad.outputs[0]] or [None]
        expected = (num_patches + special, outputs)
        if not isinstance(positions, gs.Constant) or tuple(positions.shape) not in (expected, (1, *expected)):
            raise Mismatch(f"{describe(add)} adds no constant [{expected[0]}, {expected[1]}]")

        y = add.outputs[0]
        readers = [node for node in y.outputs if node.op == ROW_STATISTICS.name]
        replaces = [anchor, reshape, transpose, pad, add, *readers]
        dtype = kernel.values.dtype
        bias_values = bias[0].values.astype(np.float64) if bias else np.zeros(outputs)
        weight, scale, folded_bias = fold(kernel.values.astype(np.float64), bias_values, self.normalization)
        module = anchor.name.strip("/").replace("/", ".").removesuffix("Conv")
        return [
            self.fused_node(
                add,
                [
                    pixels,
                    gs.Constant(f"{module}patch_weight", pack_weight(weight).astype(dtype)),
                    gs.Constant(f"{module}patch_bias", folded_bias.astype(np.float32)),
                    gs.Constant(
                        f"{module}patch_positions", np.ascontiguousarray(positions.values.reshape(expected))
                    ),
                ],
                # A local function has all its outputs always; an unused one has no name.
                [y, readers[0].outputs[0] if readers else gs.Variable.empty()],
                replaces,
                scale=scale,
                emit_statistics=int(bool(readers)),
            )
        ]

    def finish(self, graph: gs.Graph) -> None:
        for node in graph.nodes:
            if node.op == self.op.name:
                node.inputs[0].dtype = np.dtype(np.uint8)


def _padded_rows(pad: gs.Node) -> int:
    """The rows of zeros that a Pad puts before the second of three axes. Raises Mismatch if it does more."""
    amounts, *fill = pad.inputs[1:]
    if (
        pad.attrs.get("mode", "constant") != "constant"
        or not isinstance(amounts, gs.Constant)
        or len(pad.inputs) > 3
    ):
        raise Mismatch(f"{describe(pad)} does not pad by a constant amount with a constant")
    if (
        fill
        and not fill[0].is_empty()
        and not (isinstance(fill[0], gs.Constant) and not fill[0].values.any())
    ):
        raise Mismatch(f"{describe(pad)} pads with something else than 0")
    rows = amounts.values.tolist()
    if len(rows) != 6 or rows[1] < 0 or any(rows[:1] + rows[2:]):
        raise Mismatch(f"{describe(pad)} pads by {rows}, not before the tokens only")
    return rows[1]


def fold(
    kernel: np.ndarray, bias: np.ndarray, normalization: Normalization
) -> tuple[np.ndarray, float, np.ndarray]:
    """Weight, scale and bias: `scale * conv(v - 128, weight) + bias` is conv of the normalised pixels.

    kernel: float64 [N, 3, 16, 16]; bias: float64 [N]. Where all channels have the same deviation, as in every
    published checkpoint, the weight is the kernel itself: nothing is rounded twice.
    """
    steps = normalization.rescale_factor / np.array(normalization.std)  # of one grey level, by channel
    centre = PIXEL_CENTRE * steps - np.array(normalization.mean) / np.array(normalization.std)
    scale = float(np.float32(steps.max()))  # as the attribute holds it
    ratios = np.ones(3) if np.ptp(steps) == 0 else steps / scale
    return kernel * ratios[:, None, None], scale, bias + kernel.sum(axis=(2, 3)) @ centre


def pack_weight(kernel: np.ndarray) -> np.ndarray:
    """[N, 3, 16, 16] -> [N, 768] in the order of TrOCRPatchEmbedding's weight."""
    parts = kernel.reshape(-1, 3, 4, 4, 4, 2, 2)  # N, channel, y / 4, y % 4, x / 4, x / 2 % 2, x % 2
    return np.ascontiguousarray(parts.transpose(0, 1, 2, 4, 5, 3, 6).reshape(len(kernel), -1))
