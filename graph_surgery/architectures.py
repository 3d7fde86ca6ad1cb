"""The published TrOCR checkpoints' architectures, and checkpoints of them with random weights.

    python -m graph_surgery.architectures small --out DIR
    python -m graph_surgery.architectures microsoft/trocr-large-printed --out DIR

Times do not depend on the weights' values: random weights are enough to measure an architecture whose trained
checkpoint is not at hand.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

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

# The encoder and the vocabulary are known: states [B, 578, 384], 11318 characters. The layers of the decoder
# stand only in the checkpoint's own config.json; these are those of small, whose encoder it has.
DECODER_CHINESE = DECODER_SMALL | {"vocab_size": 11318, "decoder_start_token_id": 0}

# Encoder and decoder by name, in the words of config.json.
ARCHITECTURES = {
    "small": (DEIT_SMALL, DECODER_SMALL),
    "base": (VIT_BASE, DECODER_GELU),
    "base-stage1": (VIT_BASE, DECODER_RELU),
    "large": (VIT_LARGE, DECODER_GELU),
    "large-printed": (VIT_LARGE, DECODER_RELU),
    "chinese": (DEIT_SMALL, DECODER_CHINESE),
}

# Every published checkpoint and its architecture. Those of one architecture differ in their training alone.
PUBLISHED = {
    "microsoft/trocr-small-printed": "small",
    "microsoft/trocr-small-handwritten": "small",
    "microsoft/trocr-small-stage1": "small",
    "microsoft/trocr-base-printed": "base",
    "microsoft/trocr-base-handwritten": "base",
    "microsoft/trocr-base-stage1": "base-stage1",
    "microsoft/trocr-large-printed": "large-printed",
    "microsoft/trocr-large-handwritten": "large",
    "microsoft/trocr-large-stage1": "large-printed",
    "chineseocr/trocr-chinese": "chinese",
}

# Of the tokenizer, with ids 0 to 3.
TEXT_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
PRINTABLE_ASCII = [chr(code) for code in range(ord(" "), ord("~") + 1)]


def random_checkpoint(
    name: str, folder: Path, dtype: torch.dtype = torch.float16, seed: int = 0, device: str = "cpu"
) -> Path:
    """Writes a full-size checkpoint with random weights; returns `folder`. `name` is one of ARCHITECTURES or
    of PUBLISHED. `device` is where the weights are drawn: on another device they are others."""
    architecture = PUBLISHED.get(name, name)
    return write_random_checkpoint(
        *ARCHITECTURES[architecture], folder, dtype, seed, architecture == "chinese", device
    )


def write_random_checkpoint(
    encoder: dict,
    decoder: dict,
    folder: Path,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    characters: bool = False,
    device: str = "cpu",
) -> Path:
    """Writes a complete checkpoint: configuration, random weights in `dtype`, image processor, tokenizer.

    `encoder` and `decoder` are sections of config.json. `characters` makes the vocabulary one of Chinese
    characters in vocab.json, as trocr-chinese has it. The same arguments give the same weights.
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
            "decoder_start_token_id": decoder.get("decoder_start_token_id", 2),
            "eos_token_id": 2,
            "pad_token_id": 1,
        }
    )
    with torch.device(device):
        model = VisionEncoderDecoderModel(config)
    model.encoder.pooler = None
    _randomize(model, seed, device)
    model.to(dtype).save_pretrained(folder)
    write_image_processor(config.encoder.model_type, config.encoder.image_size, folder)
    if characters:
        _write_character_vocabulary(config.decoder.vocab_size, folder)
    else:
        _write_tokenizer(config.decoder.vocab_size, folder)
    return folder


def _randomize(model: torch.nn.Module, seed: int, device: str) -> None:
    """Random weights that keep activations near 1 in any depth; biases and LayerNorms differ from 0 and 1.

    Hugging Face initialises biases to 0 and LayerNorms to 1, which hides a mistake in either.
    """
    generator = torch.Generator(device).manual_seed(seed)
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


def write_image_processor(encoder_type: str, image_size: int | list[int], folder: Path) -> None:
    """preprocessor_config.json as the published checkpoints have it: bicubic for DeiT, bilinear for ViT.

    `image_size` is that of config.json, pixels: one number, or [height, width].
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    content = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": {"deit": "DeiTFeatureExtractor", "vit": "ViTFeatureExtractor"}[
            encoder_type
        ],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": int({"deit": Image.Resampling.BICUBIC, "vit": Image.Resampling.BILINEAR}[encoder_type]),
        "size": height if height == width else {"height": height, "width": width},
    }
    if encoder_type == "deit":
        content["do_center_crop"] = False  # which a DeiT processor does by default
    _write_json(folder / "preprocessor_config.json", content)


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


def _write_character_vocabulary(vocab_size: int, folder: Path) -> None:
    """The files of trocr-chinese's tokenizer: vocab.json of characters under RoBERTa's name, no merges.

    The characters are those of Latin-1 and of GB 2312 (hanzi and their punctuation), then further hanzi in
    Unicode's order.
    """
    entries = [*TEXT_TOKENS.values(), "<mask>", *PRINTABLE_ASCII, *map(chr, range(0xA1, 0x100))]
    for row in range(0xA1, 0xF8):
        cells = (bytes((row, cell)).decode("gbk", "ignore") for cell in range(0xA1, 0xFF))
        entries += [cell for cell in cells if cell]
    entries += [chr(code) for code in range(0x4E00, 0xA000)]
    vocabulary = {entry: index for index, entry in enumerate(list(dict.fromkeys(entries))[:vocab_size])}
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer"})


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    names = [*ARCHITECTURES, *PUBLISHED]
    parser = argparse.ArgumentParser(description="Write a TrOCR checkpoint with random weights.")
    parser.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--precision", choices=DTYPES, default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(random_checkpoint(arguments.name, arguments.out, DTYPES[arguments.precision], arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
