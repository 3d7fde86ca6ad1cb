"""The fusion passes, by their names in `--plugins`, in the order in which they run."""

from collections.abc import Mapping

from graph_surgery.passes.base import FusionPass, PassReport
from graph_surgery.passes.bias_activation import BiasActivationPass
from graph_surgery.passes.cross_attention import CrossAttentionPass
from graph_surgery.passes.cross_key_value import CrossKeyValuePass
from graph_surgery.passes.decoder_self_attention import DecoderSelfAttentionPass
from graph_surgery.passes.encoder_attention import EncoderAttentionPass
from graph_surgery.passes.layernorm import LayerNormPass
from graph_surgery.passes.linear import LinearPass
from graph_surgery.passes.patch_embedding import PatchEmbeddingPass

PASSES: Mapping[str, FusionPass] = {
    fusion.op.plugin: fusion
    for fusion in (
        EncoderAttentionPass(),
        DecoderSelfAttentionPass(),
        CrossAttentionPass(),
        CrossKeyValuePass(),
        LinearPass(),
        PatchEmbeddingPass(),
        LayerNormPass(),
        BiasActivationPass(),
    )
}

__all__ = ["PASSES", "FusionPass", "PassReport"]
