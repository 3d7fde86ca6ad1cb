"""Small checkpoints with random weights: every published TrOCR configuration, and some beyond."""

from pathlib import Path

import torch

from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint

# Two layers each, and heads of the published size: 64 everywhere but in small's decoder, which has 32.
ENCODER = {
    "image_size": 48,
    "patch_size": 16,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
DECODER = {
    "vocab_size": 120,
    "d_model": 192,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 320,
    "max_position_embeddings": 24,
}
SMALL_DECODER = DECODER | {"decoder_attention_heads": 6}

# Name -> architecture, changes to its encoder, changes to its decoder.
CASES = {
    "small": ("small", ENCODER, SMALL_DECODER),
    "base": ("base", ENCODER, DECODER),
    "base-stage1": ("base-stage1", ENCODER, DECODER),
    "large": ("large", ENCODER | {"num_hidden_layers": 3}, DECODER),
    "large-printed": ("large-printed", ENCODER | {"num_hidden_layers": 3}, DECODER),
    # Lines are wide: trained on images that are not square.
    "wide": ("small", ENCODER | {"image_size": [32, 96]}, SMALL_DECODER),
    # The decoder takes the encoder's states through a projection (no cross_attention_hidden_size).
    "projected": ("base", ENCODER, DECODER | {"cross_attention_hidden_size": None}),
    # Every switch the other way round than in the architecture.
    "small-inverted": (
        "small",
        ENCODER | {"qkv_bias": False},
        DECODER
        | {
            "activation_function": "gelu",
            "use_learned_position_embeddings": False,
            "scale_embedding": False,
            "layernorm_embedding": False,
            "tie_word_embeddings": True,
            "use_cache": True,
        },
    ),
    "base-inverted": (
        "base",
        ENCODER | {"qkv_bias": True},
        SMALL_DECODER
        | {
            "activation_function": "relu",
            "scale_embedding": True,
            "layernorm_embedding": False,
            "tie_word_embeddings": False,
        },
    ),
}


def random_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Writes the checkpoint CASES[name] into `folder`; returns `folder`. Equal arguments, equal weights."""
    architecture, encoder_changes, decoder_changes = CASES[name]
    encoder, decoder = ARCHITECTURES[architecture]
    return write_random_checkpoint(encoder | encoder_changes, decoder | decoder_changes, folder, dtype, seed)
