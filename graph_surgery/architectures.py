"""The published TrOCR architectures, and checkpoints of them with random weights.

    python -m graph_surgery.architectures small --out DIR

Times do not depend on the weights' values: random weights are enough to measure an architecture whose trained
checkpoint is not at hand.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTImageProcessor,
)

from graph_surgery.checkpoint import DTYPES

DEIT_SMALL = {
    "model_type": "deit",
    "image_size": 384,
    "patch_size": 16,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "qkv_bias": True,
}
VIT_BASE = {
    "model_type": "vit",
    "image_size": 384,
    "patch_size": 16,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "qkv_bias": False,
}
VIT_LARGE = VIT_BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
DECODER_SMALL = {
    "model_type": "trocr",
    "vocab_size": 64044,
    "d_model": 256,
    "decoder_layers": 6,
    "decoder_attention_heads": 8,
    "decoder_ffn_dim": 1024,
    "activation_function": "relu",
    "use_learned_position_embeddings": True,
    "max_position_embeddings": 512,
    "scale_embedding": True,
    "layernorm_embedding": True,
    "tie_word_embeddings": False,
    "use_cache": False,  # as published
}
# base-printed, base-handwritten and large-handwritten
DECODER_GELU = {
    "model_type": "trocr",
    "vocab_size": 50265,
    "d_model": 1024,
    "decoder_layers": 12,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "activation_function": "gelu",
    "use_learned_position_embeddings": True,
    "max_position_embeddings": 512,
    "scale_embedding": False,
    "layernorm_embedding": True,
    "tie_word_embeddings": True,
}
# base-stage1, large-stage1 and large-printed
DECODER_RELU = DECODER_GELU | {
    "activation_function": "relu",
    "use_learned_position_embeddings": False,
    "max_position_embeddings": 1024,
    "scale_embedding": True,
    "layernorm_embedding": False,
    "tie_word_embeddings": False,
}

# Encoder and decoder by name, in the words of config.json.
ARCHITECTURES = {
    "small": (DEIT_SMALL, DECODER_SMALL),
    "base": (VIT_BASE, DECODER_GELU),
    "base-stage1": (VIT_BASE, DECODER_RELU),
    "large": (VIT_LARGE, DECODER_GELU),
    "large-printed": (VIT_LARGE, DECODER_RELU),
}

# Of the tokenizer, with ids 0 to 3.
TEXT_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
PRINTABLE_ASCII = [chr(code) for code in range(ord(" "), ord("~") + 1)]


def random_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Writes a full-size checkpoint of ARCHITECTURES[name] with random weights; returns `folder`."""
    return write_random_checkpoint(*ARCHITECTURES[name], folder, dtype, seed)


def write_random_checkpoint(
    encoder: dict, decoder: dict, folder: Path, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Path:
    """Writes a complete checkpoint: configuration, random weights in `dtype`, image processor, tokenizer.

    `encoder` and `decoder` are sections of config.json. The same arguments give the same weights.
    """
    config = VisionEncoderDecoderConfig.from_dict(
        {
            "encoder": dict(encoder),  # a copy: reading takes keys out
            "decoder": {
                "cross_attention_hidden_size": encoder["hidden_size"],
                "is_decoder": True,
                "add_cross_attention": True,
                **decoder,
            },
            "decoder_start_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        }
    )
    model = VisionEncoderDecoderModel(config)
    model.encoder.pooler = None
    _randomize(model, seed)
    model.to(dtype).save_pretrained(folder)
    _write_image_processor(config.encoder.image_size, folder)
    _write_tokenizer(config.decoder.vocab_size, folder)
    return folder


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1 in any depth; biases and LayerNorms differ from 0 and 1.

    Hugging Face initialises biases to 0 and LayerNorms to 1, which hides a mistake in either.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tqdm(list(model.named_parameters()), desc="random weights", disable=None):
            if weight.ndim == 1:
                weight.normal_(0, 0.1, generator=generator)
                if "norm" in name and name.endswith("weight"):
                    weight += 1
            elif weight.ndim == 3:  # the encoder's special tokens and positions, added once
                weight.normal_(0, 1, generator=generator)
            else:
                weight.normal_(0, 1 / math.sqrt(math.prod(weight.shape[1:])), generator=generator)


def _write_image_processor(image_size: int | list[int], folder: Path) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


def _write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A tokenizer of single characters; entries beyond printable ASCII are numbered."""
    entries = [*TEXT_TOKENS.values(), *PRINTABLE_ASCII]
    entries += [f"[{index}]" for index in range(len(entries), vocab_size)]
    vocabulary = {entry: index for index, entry in enumerate(entries[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=TEXT_TOKENS["unk_token"]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in TEXT_TOKENS.values()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **TEXT_TOKENS
    ).save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a TrOCR checkpoint with random weights.")
    parser.add_argument("name", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--precision", choices=DTYPES, default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(random_checkpoint(arguments.name, arguments.out, DTYPES[arguments.precision], arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
