#!/usr/bin/env python3
"""Converts a TrOCR checkpoint of its authors (unilm's fairseq .pt file) into Hugging Face's format.

    python scripts/convert_unilm.py trocr-base-handwritten.pt --tokenizer DIR --out DIR

Sizes come from the weights, and what cannot be seen in them (activation, heads, scaled embeddings) from the
settings that fairseq saved, or else from the published checkpoint of that kind. `--tokenizer` is a folder
with Hugging Face's tokenizer files: those of roberta-large for base and large, of a small TrOCR for small.
The file is read with torch.load(weights_only=True), which runs no code of it.

Exit codes: 0 converted; 2 wrong use or input, and nothing is written.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from graph_surgery.architectures import (  # noqa: E402
    DECODER_GELU,
    DECODER_RELU,
    DECODER_SMALL,
    write_image_processor,
)
from graph_surgery.checkpoint import PROCESSOR_FILES, load_model, load_spec  # noqa: E402

TOKENIZER_FILES = tuple(
    name
    for name in PROCESSOR_FILES
    if name
    not in ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
)

ENCODER_HEAD_DIM = 64  # of every ViT and DeiT

# fairseq's names -> modules of VisionEncoderDecoderModel. What is not listed here is an error.
RENAMED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"encoder\.deit\.cls_token", "encoder.embeddings.cls_token"),
        (r"encoder\.deit\.dist_token", "encoder.embeddings.distillation_token"),
        (r"encoder\.deit\.pos_embed", "encoder.embeddings.position_embeddings"),
        (r"encoder\.deit\.patch_embed\.proj\.(\w+)", r"encoder.embeddings.patch_embeddings.projection.\1"),
        (r"encoder\.deit\.norm\.(\w+)", r"encoder.layernorm.\1"),
        (r"encoder\.deit\.blocks\.(\d+)\.norm1\.(\w+)", r"encoder.layers.\1.layernorm_before.\2"),
        (r"encoder\.deit\.blocks\.(\d+)\.norm2\.(\w+)", r"encoder.layers.\1.layernorm_after.\2"),
        (r"encoder\.deit\.blocks\.(\d+)\.attn\.proj\.(\w+)", r"encoder.layers.\1.attention.o_proj.\2"),
        (r"encoder\.deit\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)", r"encoder.layers.\1.mlp.\2.\3"),
        (r"decoder\.output_projection\.weight", "decoder.output_projection.weight"),
        (
            r"decoder\.((?:embed_tokens|embed_positions|layernorm_embedding)\.\w+)",
            r"decoder.model.decoder.\1",
        ),
        (
            r"decoder\.(layers\.\d+\.(?:self_attn|encoder_attn)\.(?:[qkv]|out)_proj\.\w+)",
            r"decoder.model.decoder.\1",
        ),
        (
            r"decoder\.(layers\.\d+\.(?:(?:self_attn|encoder_attn|final)_layer_norm|fc[12])\.\w+)",
            r"decoder.model.decoder.\1",
        ),
    )
]
PACKED = re.compile(r"encoder\.deit\.blocks\.(\d+)\.attn\.qkv\.(\w+)")
# The classifiers of DeiT's training, and tables and numbers that are computed.
DROPPED = re.compile(
    r"encoder\.deit\.head(_dist)?\.\w+|decoder\.version|decoder\.embed_positions\._float_tensor"
)


class ConversionError(Exception):
    """A file that cannot be converted. The message names it, what is wrong, and the remedy."""


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a fairseq checkpoint, and the model's settings as far as it saved any."""
    try:
        # fairseq keeps its command line in the file: names and values, like a dictionary.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file} is damaged, or holds more than weights and settings, and code of a checkpoint is never "
            "run; fetch it again"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{file} is missing, truncated or damaged ({reason}); fetch it again"
        ) from error
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or "encoder.deit.pos_embed" not in weights:
        raise ConversionError(
            f"{file} has no weights of TrOCR under 'model' (encoder.deit.pos_embed is not there); "
            "give a .pt file of unilm's TrOCR"
        )
    return weights, _settings(content)


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's settings of the model: in `args` of old files, in `cfg` of newer ones, under `model`."""
    config = content.get("cfg")
    for settings in (content.get("args"), config.get("model") if isinstance(config, dict) else None):
        if isinstance(settings, argparse.Namespace):
            return vars(settings)
        if isinstance(settings, dict):
            return settings
    return {}


def configuration(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> VisionEncoderDecoderConfig:
    """config.json of a checkpoint with these weights and settings of fairseq."""
    distilled = "encoder.deit.dist_token" in weights
    learned = "decoder.embed_positions.weight" in weights
    family = DECODER_SMALL if distilled else DECODER_GELU if learned else DECODER_RELU

    _, num_tokens, hidden_size = weights["encoder.deit.pos_embed"].shape
    patch_size = weights["encoder.deit.patch_embed.proj.weight"].shape[-1]
    rows = math.isqrt(num_tokens - 1 - distilled)
    if rows * rows != num_tokens - 1 - distilled:
        raise ConversionError(
            f"encoder.deit.pos_embed has {num_tokens} positions, which are not those of a square image; "
            "only square ones are in this format"
        )
    vocab_size, d_model = weights["decoder.embed_tokens.weight"].shape
    head_dim = family["d_model"] // family["decoder_attention_heads"]
    projection = weights.get("decoder.output_projection.weight")
    tied = projection is None or torch.equal(projection, weights["decoder.embed_tokens.weight"])
    scaled = (
        not settings["no_scale_embedding"] if "no_scale_embedding" in settings else family["scale_embedding"]
    )
    return VisionEncoderDecoderConfig.from_dict(
        {
            "encoder": {
                "model_type": "deit" if distilled else "vit",
                "image_size": rows * patch_size,
                "patch_size": patch_size,
                "hidden_size": hidden_size,
                "num_hidden_layers": _count(weights, "encoder.deit.blocks"),
                "num_attention_heads": hidden_size // ENCODER_HEAD_DIM,
                "intermediate_size": weights["encoder.deit.blocks.0.mlp.fc1.weight"].shape[0],
                "qkv_bias": "encoder.deit.blocks.0.attn.qkv.bias" in weights,
            },
            "decoder": {
                "model_type": "trocr",
                "is_decoder": True,
                "add_cross_attention": True,
                "vocab_size": vocab_size,
                "d_model": d_model,
                "decoder_layers": _count(weights, "decoder.layers"),
                "decoder_attention_heads": settings.get("decoder_attention_heads") or d_model // head_dim,
                "decoder_ffn_dim": weights["decoder.layers.0.fc1.weight"].shape[0],
                "activation_function": settings.get("activation_fn") or family["activation_function"],
                "use_learned_position_embeddings": learned,
                # fairseq counts positions from the padding's id, 1, onwards.
                "max_position_embeddings": len(weights["decoder.embed_positions.weight"]) - 2
                if learned
                else settings.get("max_target_positions") or family["max_position_embeddings"],
                "scale_embedding": scaled,
                "layernorm_embedding": "decoder.layernorm_embedding.weight" in weights,
                "tie_word_embeddings": tied,
                "cross_attention_hidden_size": hidden_size,
            },
            "decoder_start_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "tie_word_embeddings": tied,
        }
    )


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max(int(match[1]) for name in weights if (match := pattern.match(name)))


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names of VisionEncoderDecoderModel's modules; packed projections are taken apart."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if DROPPED.fullmatch(name):
            continue
        if match := PACKED.fullmatch(name):
            parts = zip(("q_proj", "k_proj", "v_proj"), weight.chunk(3), strict=True)
            renamed |= {
                f"encoder.layers.{match[1]}.attention.{part}.{match[2]}": rows for part, rows in parts
            }
            continue
        for pattern, replacement in RENAMED:
            if pattern.fullmatch(name):
                renamed[pattern.sub(replacement, name)] = weight
                break
        else:
            raise ConversionError(f"weight {name} has no place in TrOCR; give a .pt file of unilm's TrOCR")
    return renamed


def convert(file: Path, tokenizer: Path, out: Path) -> Path:
    """Writes the checkpoint folder `out`, whole or not at all; returns it."""
    tokenizer_files = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
    if not tokenizer_files:
        raise ConversionError(f"{tokenizer} has no tokenizer files; give a folder in Hugging Face's format")
    if out.exists():
        raise ConversionError(f"{out} exists; remove it, or give another --out")
    weights, settings = read(file)
    try:
        config = configuration(weights, settings)
        model = VisionEncoderDecoderModel(config)
        model.encoder.pooler = None
        renamed = rename(weights)
        if config.decoder.tie_word_embeddings:
            renamed["decoder.output_projection.weight"] = weights["decoder.embed_tokens.weight"]
        model.load_state_dict(renamed)
    except KeyError as error:
        raise ConversionError(f"{file} has no weight {error}; fetch it again") from error
    except RuntimeError as error:  # load_state_dict's list of what is missing or of another shape
        raise ConversionError(
            f"{file}: {' '.join(str(error).split())}; give a .pt file of unilm's TrOCR"
        ) from error
    except ConversionError as error:
        raise ConversionError(f"{file}: {error}") from error

    model.generation_config = GenerationConfig(
        bos_token_id=0, decoder_start_token_id=2, eos_token_id=2, pad_token_id=1
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        model.save_pretrained(folder)
        write_image_processor(config.encoder.model_type, config.encoder.image_size, folder)
        for source in tokenizer_files:
            shutil.copyfile(source, folder / source.name)
        load_model(load_spec(folder))
        folder.rename(out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a TrOCR .pt file of unilm to Hugging Face's format."
    )
    parser.add_argument("checkpoint", type=Path, metavar="FILE", help="the .pt file")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="folder of the tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args(argv)
    try:
        print(convert(arguments.checkpoint, arguments.tokenizer, arguments.out))
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
