"""PyTorch -> stock ONNX: a checkpoint's encoder.onnx, cross_kv.onnx and decoder.onnx in standard operators.

    python -m graph_surgery.export --model DIR --precision fp16 --out DIR

The modules below drive Hugging Face's own submodules in Hugging Face's order of operations. They leave out of
its forward functions what would clutter a graph: sizes are constants, not read from tensors, and there are no
masks that mask nothing. docs/design.md lists the graphs' tensors.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import VisionEncoderDecoderModel

from graph_surgery.checkpoint import DTYPES, CheckpointError, ModelSpec, load_model, load_spec

# The first opset with LayerNormalization. Opset 20 would only write GELU as one operator. The standard lets
# Conv take bfloat16 from opset 22 on, which this exporter does not reach and TensorRT does not ask for.
OPSET = 17

ONNX_DTYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
}

# Dynamic dimensions of the example inputs: neither 0 nor 1, which tracing could take for a constant.
EXAMPLE_SIZES = {"batch": 2, "past_length": 3}


@dataclass(frozen=True)
class TensorInfo:
    """A graph's input or output. A dimension with a name is dynamic."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    @property
    def dynamic_axes(self) -> dict[int, str]:
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}

    def example(self) -> Tensor:
        return torch.zeros([EXAMPLE_SIZES.get(size, size) for size in self.shape], dtype=self.dtype)


class EncoderAttention(nn.Module):
    """Self-attention of the encoder over its S tokens."""

    def __init__(self, attention: nn.Module, num_tokens: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        self.scaling = attention.scaling
        self.split_shape = (-1, num_tokens, attention.num_attention_heads, attention.head_dim)
        self.merged_shape = (-1, num_tokens, attention.num_attention_heads * attention.head_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query = self.q_proj(hidden_states).reshape(self.split_shape).transpose(1, 2)  # [B, H, S, d]
        key = self.k_proj(hidden_states).reshape(self.split_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).reshape(self.split_shape).transpose(1, 2)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scaling  # [B, H, S, S]
        # Hugging Face computes this softmax in float32 between two casts. Runtimes accumulate it in float32
        # anyway, and would not recognise attention with the casts inside.
        context = torch.matmul(scores.softmax(dim=-1), value)
        return self.o_proj(context.transpose(1, 2).reshape(self.merged_shape))


class EncoderLayer(nn.Module):
    """One pre-LayerNorm layer of ViT or DeiT, [B, S, D] -> [B, S, D]."""

    def __init__(self, layer: nn.Module, num_tokens: int):
        super().__init__()
        self.layernorm_before, self.layernorm_after = layer.layernorm_before, layer.layernorm_after
        self.attention = EncoderAttention(layer.attention, num_tokens)
        self.mlp = layer.mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.attention(self.layernorm_before(hidden_states)) + hidden_states
        return self.mlp(self.layernorm_after(hidden_states)) + hidden_states


class PadTokens(torch.autograd.Function):
    """Puts `count` rows of zeros before the tokens, [B, N, D] -> [B, count + N, D].

    A function only for its symbol: the exporter writes one Pad node with ten more that compute its amounts.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, count: int) -> Tensor:
        return nn.functional.pad(tokens, (0, 0, count, 0))

    @staticmethod
    def symbolic(g, tokens: torch.Value, count: int) -> torch.Value:
        return g.op("Pad", tokens, g.op("Constant", value_t=torch.tensor([0, count, 0, 0, 0, 0])))


class Embeddings(nn.Module):
    """Pixels [B, 3, height, width] -> class token(s) and patches with their positions, [B, S, D]."""

    def __init__(self, embeddings: nn.Module):
        super().__init__()
        self.projection = embeddings.patch_embeddings.projection
        self.patches_shape = (-1, self.projection.out_channels, embeddings.patch_embeddings.num_patches)
        special_tokens = [embeddings.cls_token]
        if hasattr(embeddings, "distillation_token"):
            special_tokens.append(embeddings.distillation_token)
        self.num_special_tokens = len(special_tokens)
        # The special tokens are the same in every image: added to their positions beforehand, they cost the
        # graph no concatenation over a dynamic batch.
        patches = torch.zeros_like(embeddings.position_embeddings[:, self.num_special_tokens :])
        self.register_buffer(
            "positions", torch.cat([*special_tokens, patches], dim=1) + embeddings.position_embeddings
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.projection(pixel_values)  # [B, D, rows, columns]
        patches = patches.reshape(self.patches_shape).transpose(1, 2)  # [B, N, D]
        return PadTokens.apply(patches, self.num_special_tokens) + self.positions


class Encoder(nn.Module):
    """The image encoder: `pixel_values` -> `last_hidden_state`."""

    def __init__(self, spec: ModelSpec, model: VisionEncoderDecoderModel):
        super().__init__()
        self.embeddings = Embeddings(model.encoder.embeddings)
        self.layers = nn.ModuleList(
            EncoderLayer(layer, spec.encoder.num_tokens) for layer in model.encoder.layers
        )
        self.layernorm = model.encoder.layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.layernorm(hidden_states)


class CrossKeyValueLayer(nn.Module):
    """One decoder layer's keys and values of the encoder's states: [B, S, D] -> 2 x [B, H, S, d]."""

    def __init__(self, attention: nn.Module, num_tokens: int):
        super().__init__()
        self.k_proj, self.v_proj = attention.k_proj, attention.v_proj
        self.split_shape = (-1, num_tokens, attention.num_heads, attention.head_dim)

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        key = self.k_proj(encoder_hidden_states).reshape(self.split_shape).transpose(1, 2)
        value = self.v_proj(encoder_hidden_states).reshape(self.split_shape).transpose(1, 2)
        return key, value


class CrossKeyValue(nn.Module):
    """Keys and values of all layers' cross-attention, which do not change while an image is decoded."""

    def __init__(self, spec: ModelSpec, model: VisionEncoderDecoderModel):
        super().__init__()
        # Only where the decoder's cross-attention does not take the encoder's width itself.
        self.enc_to_dec_proj = getattr(model, "enc_to_dec_proj", nn.Identity())
        self.layers = nn.ModuleList(
            CrossKeyValueLayer(layer.encoder_attn, spec.encoder.num_tokens)
            for layer in model.decoder.model.decoder.layers
        )

    def forward(self, encoder_hidden_states: Tensor) -> list[Tensor]:
        states = self.enc_to_dec_proj(encoder_hidden_states)
        return [tensor for layer in self.layers for tensor in layer(states)]


class CachedAttention(nn.Module):
    """Attention of one new token, [B, 1, D], over keys and values in the cache, [B, H, T, d].

    The new token may look at everything in the cache, so there is no mask. With one token, splitting and
    merging heads moves no data: reshapes do what Hugging Face's reshapes and transposes do.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.q_proj, self.out_proj = attention.q_proj, attention.out_proj
        self.scaling = attention.scaling
        self.split_shape = (-1, attention.num_heads, 1, attention.head_dim)
        self.merged_shape = (-1, 1, attention.embed_dim)

    def attend(self, hidden_states: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = (self.q_proj(hidden_states) * self.scaling).reshape(self.split_shape)  # [B, H, 1, d]
        scores = torch.matmul(query, key.transpose(2, 3))  # [B, H, 1, T]
        context = torch.matmul(scores.softmax(dim=-1), value)
        return self.out_proj(context.reshape(self.merged_shape))


class SelfAttention(CachedAttention):
    """Self-attention of the decoder: appends the new token's key and value to the cache."""

    def __init__(self, attention: nn.Module):
        super().__init__(attention)
        self.k_proj, self.v_proj = attention.k_proj, attention.v_proj

    def forward(
        self, hidden_states: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = torch.cat([past_key, self.k_proj(hidden_states).reshape(self.split_shape)], dim=2)
        value = torch.cat([past_value, self.v_proj(hidden_states).reshape(self.split_shape)], dim=2)
        return self.attend(hidden_states, key, value), key, value


class CrossAttention(CachedAttention):
    """Attention of the decoder to the image, over the keys and values of cross_kv.onnx."""

    def forward(self, hidden_states: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attend(hidden_states, key, value)


class DecoderLayer(nn.Module):
    """One post-LayerNorm decoder layer for one new token: [B, 1, D] -> [B, 1, D], and the longer cache."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.self_attn = SelfAttention(layer.self_attn)
        self.self_attn_layer_norm = layer.self_attn_layer_norm
        self.encoder_attn = CrossAttention(layer.encoder_attn)
        self.encoder_attn_layer_norm = layer.encoder_attn_layer_norm
        self.fc1, self.activation_fn, self.fc2 = layer.fc1, layer.activation_fn, layer.fc2
        self.final_layer_norm = layer.final_layer_norm

    def forward(
        self,
        hidden_states: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        cross_key: Tensor,
        cross_value: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.self_attn(hidden_states, past_key, past_value)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)
        attended = self.encoder_attn(hidden_states, cross_key, cross_value)
        hidden_states = self.encoder_attn_layer_norm(hidden_states + attended)
        expanded = self.activation_fn(self.fc1(hidden_states))
        return self.final_layer_norm(hidden_states + self.fc2(expanded)), key, value


class DecoderStep(nn.Module):
    """One step of the decoder: the next token's logits, and the cache with the new keys and values appended.

    `past` holds for every layer decoder key and value, [B, H, past_length, d], and encoder key and value,
    [B, H, S, d].
    """

    def __init__(self, model: VisionEncoderDecoderModel):
        super().__init__()
        decoder = model.decoder.model.decoder
        self.embed_tokens = nn.Embedding.from_pretrained(decoder.embed_tokens.weight)
        self.embed_scale = decoder.embed_tokens.embed_scale
        self.embed_positions = nn.Embedding.from_pretrained(position_table(decoder.embed_positions))
        self.layernorm_embedding = decoder.layernorm_embedding or nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(layer) for layer in decoder.layers)
        self.output_projection = model.decoder.output_projection

    def forward(self, input_ids: Tensor, position_ids: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        hidden_states = self.embed_tokens(input_ids)
        if self.embed_scale != 1:
            hidden_states = hidden_states * self.embed_scale
        hidden_states = self.layernorm_embedding(hidden_states + self.embed_positions(position_ids))
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            hidden_states, key, value = layer(hidden_states, *past[4 * index : 4 * index + 4])
            present += [key, value]
        return self.output_projection(hidden_states), *present


def position_table(positions: nn.Module) -> Tensor:
    """The position embedding [max_position_embeddings, D]: row p for the token after p tokens.

    Hugging Face has unused rows before it: two of learned, padding_idx + 1 of sinusoidal positions.
    """
    if isinstance(positions, nn.Embedding):
        return positions.weight[positions.offset :]
    return positions.weights[positions.padding_idx + 1 :]


def encoder_tensors(spec: ModelSpec, dtype: torch.dtype) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of encoder.onnx."""
    encoder = spec.encoder
    pixels = TensorInfo("pixel_values", dtype, ("batch", 3, encoder.image_height, encoder.image_width))
    states = TensorInfo("last_hidden_state", dtype, ("batch", encoder.num_tokens, encoder.hidden_size))
    return [pixels], [states]


def cross_kv_tensors(spec: ModelSpec, dtype: torch.dtype) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of cross_kv.onnx."""
    encoder = spec.encoder
    states = TensorInfo("encoder_hidden_states", dtype, ("batch", encoder.num_tokens, encoder.hidden_size))
    outputs = []
    for layer in range(spec.decoder.num_hidden_layers):
        outputs += _cache(spec, dtype, "present", layer, "encoder", encoder.num_tokens)
    return [states], outputs


def decoder_tensors(spec: ModelSpec, dtype: torch.dtype) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Inputs and outputs of decoder.onnx."""
    inputs = [TensorInfo(name, torch.int64, ("batch", 1)) for name in ("input_ids", "position_ids")]
    outputs = [TensorInfo("logits", dtype, ("batch", 1, spec.decoder.vocab_size))]
    for layer in range(spec.decoder.num_hidden_layers):
        inputs += _cache(spec, dtype, "past_key_values", layer, "decoder", "past_length")
        inputs += _cache(spec, dtype, "past_key_values", layer, "encoder", spec.encoder.num_tokens)
        outputs += _cache(spec, dtype, "present", layer, "decoder", "past_length + 1")
    return inputs, outputs


def _cache(
    spec: ModelSpec, dtype: torch.dtype, prefix: str, layer: int, part: str, length: int | str
) -> list[TensorInfo]:
    shape = ("batch", spec.decoder.num_attention_heads, length, spec.decoder.head_dim)
    return [TensorInfo(f"{prefix}.{layer}.{part}.{kind}", dtype, shape) for kind in ("key", "value")]


def export_graphs(
    spec: ModelSpec, model: VisionEncoderDecoderModel, precision: str
) -> dict[str, onnx.ModelProto]:
    """The three stock graphs of `model`, by name.

    `precision` ("fp32", "fp16", "bf16") must be the type that the model was loaded in. Weights are inside the
    graphs: the largest of the TrOCR family, a large encoder in fp32, has 1.2 GB, and ONNX allows 2 GB.
    """
    dtype = DTYPES[precision]
    if model.dtype != dtype:
        raise ValueError(f"the model is in {model.dtype}, not in {dtype} as precision {precision!r} asks")
    encoder_heads, decoder_heads = spec.encoder.num_attention_heads, spec.decoder.num_attention_heads
    modules = {
        "encoder": (Encoder(spec, model), encoder_tensors, encoder_heads, {"trocr.pixels": "normalised"}),
        "cross_kv": (CrossKeyValue(spec, model), cross_kv_tensors, decoder_heads, {}),
        "decoder": (DecoderStep(model), decoder_tensors, decoder_heads, {"trocr.cache": "growing"}),
    }
    graphs = {}
    for name, (module, tensors, num_heads, metadata) in tqdm(
        modules.items(), desc=f"export {spec.name} {precision}", unit="graph", disable=None
    ):
        graph = _trace(module.eval(), *tensors(spec, dtype))
        onnx.helper.set_model_props(
            graph,
            {
                "trocr.graph": name,
                "trocr.precision": precision,
                "trocr.num_heads": str(num_heads),
                **metadata,
            },
        )
        graphs[name] = graph
    return graphs


def export(
    spec: ModelSpec, model: VisionEncoderDecoderModel, precision: str, out_dir: Path
) -> dict[str, Path]:
    """Writes the graphs of `export_graphs` into `out_dir`; returns their files by name."""
    graphs = export_graphs(spec, model, precision)
    out_dir.mkdir(parents=True, exist_ok=True)
    return {name: _save(graph, out_dir / f"{name}.onnx") for name, graph in graphs.items()}


def _trace(module: nn.Module, inputs: list[TensorInfo], outputs: list[TensorInfo]) -> onnx.ModelProto:
    """Traces `module` into an ONNX model with exactly these inputs and outputs.

    The TorchScript exporter folds weights into the [in, out] order of MatMul, names nodes after modules
    (/layers.0/attention/q_proj/MatMul) and needs no further package; the newer one leaves Dropout nodes.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad(), _shared_weights_by_address():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the TorchScript exporter
        torch.onnx.export(
            module,
            tuple(tensor.example() for tensor in inputs),
            buffer,
            dynamo=False,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in inputs],
            output_names=[tensor.name for tensor in outputs],
            dynamic_axes={tensor.name: tensor.dynamic_axes for tensor in inputs},
        )
    model = onnx.load_model_from_string(buffer.getvalue())
    _tidy(model.graph)
    # The exporter invents names for dynamic output dimensions.
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(tensor.name, ONNX_DTYPES[tensor.dtype], tensor.shape)
        for tensor in outputs
    )
    onnx.checker.check_model(model)
    return model


@contextmanager
def _shared_weights_by_address() -> Iterator[None]:
    """Keeps the exporter from comparing all weights of one shape with each other, element by element.

    That takes most of its time. Weights that the model shares, as a tied output layer, are one tensor anyway.
    """
    deduplicate = torch._C._jit_pass_onnx_deduplicate_initializers
    torch._C._jit_pass_onnx_deduplicate_initializers = lambda graph, weights, _: deduplicate(
        graph, weights, True
    )
    try:
        yield
    finally:
        torch._C._jit_pass_onnx_deduplicate_initializers = deduplicate


def _tidy(graph: onnx.GraphProto) -> None:
    """Leaves only nodes that compute: constants become initializers, weights that are shared become one.

    Folded weights get the name of the parameter they come from (layers.0.attention.q_proj.weight).
    """
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    for node in graph.node:
        if node.op_type == "Constant":
            value = node.attribute[0].t
            value.name = node.output[0]
            graph.initializer.append(value)
        elif node.op_type == "MatMul" and node.input[1].startswith("onnx::"):
            source[node.input[1]] = node.name.strip("/").replace("/", ".").removesuffix("MatMul") + "weight"

    nodes = [node for node in graph.node if node.op_type not in ("Identity", "Constant")]
    for node in nodes:
        for index, name in enumerate(node.input):
            while name in source:
                name = source[name]
            node.input[index] = name
    for initializer in graph.initializer:
        initializer.name = source.get(initializer.name, initializer.name)
    del graph.node[:]
    graph.node.extend(nodes)


def _save(model: onnx.ModelProto, file: Path) -> Path:
    """Writes the file whole or not at all."""
    partial = file.with_suffix(".onnx.partial")
    onnx.save(model, partial)
    os.replace(partial, file)
    return file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Export a TrOCR checkpoint to stock ONNX graphs.")
    parser.add_argument("--model", required=True, help="folder of the checkpoint, or its Hugging Face hub id")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the graphs to")
    arguments = parser.parse_args(argv)
    try:
        spec = load_spec(arguments.model)
        model = load_model(spec, DTYPES[arguments.precision])
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for file in export(spec, model, arguments.precision, arguments.out).values():
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
