"""A decoder's weights as the kernel greedy_decode takes them (plugins/greedy_decode/layout.h); its call."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

TILE = 8  # outputs
GROUP = 32  # inputs
MAX_BATCH = 64


@dataclass(frozen=True)
class GreedyShape:
    """The decoder's sizes, under the names of the binding's arguments."""

    d_model: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    vocab_size: int
    sequence_length: int
    activation: str
    layernorm_embedding: bool
    embed_scale: float
    dtype: str

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


@dataclass(frozen=True)
class GreedyPlan:
    """Blocks of the launch, and how many of them share a team's rows."""

    blocks: int
    team_blocks: int

    @property
    def by_head(self) -> bool:
        """Whether a block computes whole heads' queries, keys and values: teams are clusters."""
        return self.team_blocks < self.blocks


@dataclass(frozen=True)
class GreedyWeights:
    """Packed weights on one device; fields as in GreedyDecodeParams."""

    shape: GreedyShape
    plan: GreedyPlan
    layer_weights: Tensor  # uint8 [team_blocks, bytes]
    head_weights: Tensor  # uint8 [blocks, bytes]
    norms: Tensor  # T [1 + 3 L, 2, D]
    embedding: Tensor  # T [V, D]
    positions: Tensor  # T [max_position_embeddings, D]


def decoder_shape(decoder: nn.Module, sequence_length: int) -> GreedyShape:
    """The shape of `decoder`, a TrOCRForCausalLM that attends to `sequence_length` encoder states."""
    config = decoder.config
    return GreedyShape(
        d_model=config.d_model,
        num_layers=config.decoder_layers,
        num_heads=config.decoder_attention_heads,
        ffn_dim=config.decoder_ffn_dim,
        vocab_size=config.vocab_size,
        sequence_length=sequence_length,
        activation=config.activation_function,
        layernorm_embedding=decoder.model.decoder.layernorm_embedding is not None,
        embed_scale=float(decoder.model.decoder.embed_tokens.embed_scale),
        dtype=str(decoder.dtype).removeprefix("torch."),
    )


def plan(kernels: ModuleType, shape: GreedyShape) -> GreedyPlan:
    """The current GPU's plan for `shape`."""
    return GreedyPlan(*kernels.plan_greedy_decode(**vars(shape)))


def pack_decoder(decoder: nn.Module, shape: GreedyShape, plan: GreedyPlan) -> GreedyWeights:
    """Packs the weights of `decoder`, a TrOCRForCausalLM in float16 or bfloat16, on their device."""
    model = decoder.model.decoder
    layers = []
    for layer in model.layers:
        attention, cross = layer.self_attn, layer.encoder_attn
        qkv_weight = torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        qkv_bias = torch.cat([p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj)])
        layers += [
            _pack(qkv_weight, qkv_bias, _head_rows(shape, plan, 3)),
            _pack(*_weights(attention.out_proj), _even_rows(shape.d_model, plan.team_blocks)),
            _pack(*_weights(cross.q_proj), _head_rows(shape, plan, 1)),
            _pack(*_weights(cross.out_proj), _even_rows(shape.d_model, plan.team_blocks)),
            _pack(*_weights(layer.fc1), _even_rows(shape.ffn_dim, plan.team_blocks)),
            _pack(*_weights(layer.fc2), _even_rows(shape.d_model, plan.team_blocks)),
        ]
    head = decoder.output_projection.weight
    norms = [model.layernorm_embedding] if shape.layernorm_embedding else [model.layers[0].final_layer_norm]
    for layer in model.layers:
        norms += [layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm]
    return GreedyWeights(
        shape=shape,
        plan=plan,
        layer_weights=torch.cat(layers, 1),
        head_weights=_pack(head, torch.zeros_like(head[:, 0]), _even_rows(shape.vocab_size, plan.blocks)),
        norms=torch.stack([torch.stack([norm.weight, norm.bias]) for norm in norms]).detach().contiguous(),
        embedding=model.embed_tokens.weight.detach().contiguous(),
        positions=position_table(model.embed_positions).to(head).contiguous(),
    )


def _weights(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias


def _even_rows(outputs: int, blocks: int) -> Tensor:
    """int64 [blocks, tiles * 8]: each block's outputs, tiles dealt out in order; -1 beyond the last."""
    tiles = -(-outputs // TILE)
    rows = torch.arange(blocks * -(-tiles // blocks) * TILE).view(blocks, -1)
    return rows.masked_fill(rows >= outputs, -1)


def _head_rows(shape: GreedyShape, plan: GreedyPlan, parts: int) -> Tensor:
    """Likewise for `parts` concatenated projections, which a team that is a cluster splits by heads."""
    if not plan.by_head:
        return _even_rows(parts * shape.d_model, plan.team_blocks)
    rows = torch.arange(parts * shape.d_model).view(parts, shape.num_heads, shape.head_dim)
    by_head = rows.transpose(0, 1).flatten(1)  # [H, parts * d]
    return by_head.repeat_interleave(plan.team_blocks // shape.num_heads, 0)


def _pack(weight: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
    """uint8 [blocks, bytes]: the tiles of each block's outputs `rows` [blocks, tiles * 8]; -1 gives zeros.

    A tile is, for each 32 inputs, [8 outputs, 32 inputs] in order, then the 8 biases in float32.
    """
    blocks, inputs = len(rows), weight.shape[1]
    rows = rows.to(weight.device).flatten()
    outside = (rows < 0)[:, None]
    tiles = weight.detach()[rows.clamp(min=0)].masked_fill(outside, 0)
    tiles = tiles.view(-1, TILE, inputs // GROUP, GROUP).transpose(1, 2).contiguous()
    biases = bias.detach()[rows.clamp(min=0)].masked_fill(outside[:, 0], 0).float().view(-1, TILE)
    packed = torch.cat([tiles.view(len(tiles), -1).view(torch.uint8), biases.view(torch.uint8)], 1)
    return packed.view(blocks, -1)


def position_table(positions: nn.Module) -> Tensor:
    """Row p: the position embedding of the token after p tokens. Hugging Face has unused rows before it."""
    if isinstance(positions, nn.Embedding):
        return positions.weight.detach()[positions.offset :]
    return positions.weights[positions.padding_idx + 1 :]


class GreedyDecode:
    """The kernel with its buffers, for one batch size and number of steps.

    Attributes:
        token_ids: int32 [B, 1 + max_steps], the start token first, padding behind a row's end.
        log_probs: float32 [B, max_steps], of the chosen tokens; 0 behind a row's end.
        steps: int32 [1], steps taken.
    """

    def __init__(
        self,
        kernels: ModuleType,
        weights: GreedyWeights,
        batch: int,
        max_steps: int,
        start_id: int,
        pad_id: int,
        end_ids: list[int],
    ):
        """Without `end_ids` every row gets `max_steps` tokens."""
        if max_steps > len(weights.positions):
            raise ValueError(
                f"max_steps is {max_steps}, and the decoder has {len(weights.positions)} positions: "
                "choose fewer"
            )
        device = weights.norms.device
        self.kernels, self.weights, self.batch, self.max_steps = kernels, weights, batch, max_steps
        self.token_ids = torch.empty(batch, 1 + max_steps, dtype=torch.int32, device=device)
        self.log_probs = torch.empty(batch, max_steps, dtype=torch.float32, device=device)
        self.steps = torch.empty(1, dtype=torch.int32, device=device)
        self._fixed = {
            **vars(weights.shape),
            "blocks": weights.plan.blocks,
            "team_blocks": weights.plan.team_blocks,
            "layer_weights": weights.layer_weights.data_ptr(),
            "head_weights": weights.head_weights.data_ptr(),
            "norms": weights.norms.data_ptr(),
            "embedding": weights.embedding.data_ptr(),
            "positions": weights.positions.data_ptr(),
            "batch": batch,
            "max_steps": max_steps,
            "start_id": start_id,
            "pad_id": pad_id,
            "end_ids": end_ids,
            "token_ids": self.token_ids.data_ptr(),
            "log_probs": self.log_probs.data_ptr(),
            "steps": self.steps.data_ptr(),
        }
        layers, blocks = weights.shape.num_layers, weights.plan.blocks
        sizes = kernels.greedy_decode_sizes(
            **vars(weights.shape),
            blocks=blocks,
            team_blocks=weights.plan.team_blocks,
            batch=batch,
            max_steps=max_steps,
        )
        expected = (weights.layer_weights.shape[1], weights.head_weights.shape[1])
        if expected != sizes[1:]:
            raise ValueError(f"a block's weights have {expected} bytes ({layers} layers), not {sizes[1:]}")
        self.workspace = torch.empty(sizes[0], dtype=torch.uint8, device=device)

    def __call__(self, cross_keys: list[Tensor], cross_values: list[Tensor], stream: int) -> None:
        """Enqueues the search on `stream`; each layer's key and value are T [B, H, S, d], contiguous."""
        self.kernels.greedy_decode(
            **self._fixed,
            cross_keys=[key.data_ptr() for key in cross_keys],
            cross_values=[value.data_ptr() for value in cross_values],
            workspace=self.workspace.data_ptr(),
            stream=stream,
        )
