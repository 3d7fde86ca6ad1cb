"""Hugging Face's own PyTorch model, one decoder step at a time: the reference for the other backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, EncoderDecoderCache

from graph_surgery.checkpoint import DTYPES, ModelSpec, load_model, load_normalization
from runtime.backends.base import Backend, image_rows, normalised
from runtime.ranges import staged
from runtime.search import SearchRequest


@dataclass
class TorchState:
    """Encoder states [R, S, encoder_hidden], a copy a row, and Hugging Face's cache of both attentions."""

    encoder_hidden_states: torch.Tensor
    cache: EncoderDecoderCache
    beams: int


class TorchBackend(Backend):
    """Runs on the GPU where there is one; the cache grows with every step.

    Args:
        spec: of a checkpoint with weights.
        precision: "fp32", "fp16" or "bf16".
    """

    name = "torch"

    def __init__(self, spec: ModelSpec, precision: str = "fp32"):
        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(spec, DTYPES[precision]).to(self.device)
        self.normalization = load_normalization(spec)

    @torch.inference_mode()
    @staged("encoder")
    def encode(self, pixel_values: torch.Tensor, then: SearchRequest | None = None) -> torch.Tensor:
        pixel_values = normalised(pixel_values.to(self.device), self.normalization).to(self.model.dtype)
        states = self.model.encoder(pixel_values=pixel_values).last_hidden_state
        if hasattr(self.model, "enc_to_dec_proj"):
            states = self.model.enc_to_dec_proj(states)
        return states

    def begin(self, encoding: torch.Tensor, beams: int = 1) -> TorchState:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return TorchState(encoding.repeat_interleave(beams, dim=0), cache, beams)

    @torch.inference_mode()
    @staged("decode step")
    def step(self, state: TorchState, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        # Hugging Face's decoder counts positions by the length of its cache.
        output = self.model.decoder(
            input_ids=input_ids,
            encoder_hidden_states=state.encoder_hidden_states,
            past_key_values=state.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def reorder(self, state: TorchState, rows: torch.Tensor, position_ids: torch.Tensor) -> None:
        state.cache.self_attention_cache.reorder_cache(rows)

    def select(self, state: TorchState, images: torch.Tensor) -> TorchState:
        rows = image_rows(images, state.beams)
        state.cache.batch_select_indices(rows)
        return TorchState(state.encoder_hidden_states[rows], state.cache, state.beams)
