"""The decoder's weights as the device decoder takes them: one tensor a kind, stacked over the layers.

They lie in one file of an engine folder, `device_decoder.safetensors`, together with the decoder's sizes. T
is float16 or bfloat16; L layers of width d, feed-forward width f, V tokens:

    token_embedding [V, d] T              position_embedding [positions, d] T, row p: after p tokens
    embedding_norm_gamma, _beta [d] T     only with `embedding_norm`
    self_qkv_weight [L, 3 d, d] T         self_qkv_bias [L, 3 d] float32         query, key, value
    self_out_weight [L, d, d] T           self_out_bias [L, d] float32
    cross_query_weight [L, d, d] T        cross_query_bias [L, d] float32
    cross_key_weight [L, d, e] T          e: the encoder's width; the keys' bias changes no softmax
    cross_value_weight [L, d, e] T        cross_value_bias [L, d] float32
    cross_out_weight [L, d, d] T          cross_out_bias [L, d] float32
    fc1_weight [L, f, d] T                fc1_bias [L, f] float32
    fc2_weight [L, f, d] T                fc2_bias [L, d] float32
    norm_gamma, norm_beta [L, 3, d] T     after self-attention, cross-attention and feed-forward
    head_weight [V, d] T                  `token_embedding` itself where the checkpoint ties the two

self_qkv, cross_query and fc1 are [out, in]; self_out, cross_out and fc2 are [in, out]. Nothing is folded in:
queries are still to be scaled by 1/sqrt(d / heads), token embeddings by `embed_scale`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import VisionEncoderDecoderModel

from graph_surgery.checkpoint import ModelSpec
from graph_surgery.export import position_table

FILE_NAME = "device_decoder.safetensors"
ACTIVATIONS = ("relu", "gelu")
DTYPES = (torch.float16, torch.bfloat16)

Config = dict[str, int | float | str | list[int]]


class DecoderWeightsError(ValueError):
    """A file of packed weights that cannot be used; the message names it and the remedy."""


def obstacle(spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """Why the device decoder cannot run this checkpoint in `dtype`; None where it can."""
    if dtype not in DTYPES:
        return f"it computes in float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if spec.decoder.activation_function not in ACTIVATIONS:
        return f"it has {' and '.join(ACTIVATIONS)}, not {spec.decoder.activation_function}"
    return None


def decoder_config(spec: ModelSpec, model: VisionEncoderDecoderModel) -> Config:
    """What the device decoder needs to know beside the weights; `eos_ids` only if there are several."""
    decoder = model.decoder.model.decoder
    several = {"eos_ids": list(spec.eos_token_ids)} if len(spec.eos_token_ids) > 1 else {}
    return {
        "num_layers": spec.decoder.num_hidden_layers,
        "hidden_size": spec.decoder.d_model,
        "num_heads": spec.decoder.num_attention_heads,
        "ffn_size": spec.decoder.decoder_ffn_dim,
        "vocab_size": spec.decoder.vocab_size,
        "source_length": spec.encoder.num_tokens,
        "encoder_size": spec.encoder.hidden_size,
        "max_positions": spec.decoder.max_position_embeddings,
        "activation": spec.decoder.activation_function,
        "dtype": str(model.dtype).removeprefix("torch."),
        "embed_scale": float(decoder.embed_tokens.embed_scale),
        "epsilon": decoder.layers[0].final_layer_norm.eps,
        "start_id": spec.decoder_start_token_id,
        "pad_id": spec.pad_token_id,
        "eos_id": spec.eos_token_ids[0],
        "embedding_norm": int(spec.decoder.layernorm_embedding),
    } | several


def pack_decoder(model: VisionEncoderDecoderModel) -> dict[str, Tensor]:
    """The decoder's weights by the names above, contiguous, T being the model's type.

    `head_weight` is the same tensor as `token_embedding` where the two are tied.
    """
    decoder = model.decoder.model.decoder
    layers = decoder.layers
    self_attention = [layer.self_attn for layer in layers]
    cross_attention = [layer.encoder_attn for layer in layers]
    projections = [(a.q_proj, a.k_proj, a.v_proj) for a in self_attention]
    norms = [(x.self_attn_layer_norm, x.encoder_attn_layer_norm, x.final_layer_norm) for x in layers]

    def weights(modules: list[nn.Module], transposed: bool = False) -> Tensor:
        return torch.stack([m.weight.T if transposed else m.weight for m in modules])

    def biases(modules: list[nn.Module]) -> Tensor:
        return torch.stack([m.bias for m in modules]).float()

    outs = [a.out_proj for a in self_attention], [a.out_proj for a in cross_attention]
    queries = [a.q_proj for a in cross_attention]
    fc1, fc2 = [layer.fc1 for layer in layers], [layer.fc2 for layer in layers]
    with torch.no_grad():
        packed = {
            "token_embedding": decoder.embed_tokens.weight,
            "position_embedding": position_table(decoder.embed_positions).to(model.dtype),
            "self_qkv_weight": torch.stack([torch.cat([m.weight for m in qkv]) for qkv in projections]),
            "self_qkv_bias": torch.stack([torch.cat([m.bias for m in qkv]) for qkv in projections]).float(),
            "self_out_weight": weights(outs[0], transposed=True),
            "self_out_bias": biases(outs[0]),
            "cross_query_weight": weights(queries),
            "cross_query_bias": biases(queries),
            "cross_key_weight": weights([a.k_proj for a in cross_attention]),
            "cross_value_weight": weights([a.v_proj for a in cross_attention]),
            "cross_value_bias": biases([a.v_proj for a in cross_attention]),
            "cross_out_weight": weights(outs[1], transposed=True),
            "cross_out_bias": biases(outs[1]),
            "fc1_weight": weights(fc1),
            "fc1_bias": biases(fc1),
            "fc2_weight": weights(fc2, transposed=True),
            "fc2_bias": biases(fc2),
            "norm_gamma": torch.stack([torch.stack([norm.weight for norm in three]) for three in norms]),
            "norm_beta": torch.stack([torch.stack([norm.bias for norm in three]) for three in norms]),
        }
        if decoder.layernorm_embedding is not None:
            packed["embedding_norm_gamma"] = decoder.layernorm_embedding.weight
            packed["embedding_norm_beta"] = decoder.layernorm_embedding.bias
        packed = {name: tensor.detach().contiguous() for name, tensor in packed.items()}
        head = model.decoder.output_projection.weight
        tied = head.data_ptr() == decoder.embed_tokens.weight.data_ptr()
        packed["head_weight"] = packed["token_embedding"] if tied else head.detach().contiguous()
    return packed


def save_decoder(weights: dict[str, Tensor], config: Config, folder: Path) -> Path:
    """Writes FILE_NAME into `folder`, whole or not at all; tied weights once."""
    stored = dict(weights)
    if stored["head_weight"] is stored["token_embedding"]:
        del stored["head_weight"]
    file = folder / FILE_NAME
    partial = file.with_suffix(".partial")
    save_file(stored, partial, metadata={"config": json.dumps(config)})
    os.replace(partial, file)
    return file


def load_decoder(folder: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Config]:
    """The weights of `folder` on `device`, and the configuration.

    Raises DecoderWeightsError for a file that is missing or damaged.
    """
    file = folder / FILE_NAME
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            config = json.loads(opened.metadata()["config"])
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DecoderWeightsError(
            f"{file} is missing or damaged ({error}); build the folder again: python build.py --force"
        ) from error
    weights.setdefault("head_weight", weights["token_embedding"])
    return weights, config
