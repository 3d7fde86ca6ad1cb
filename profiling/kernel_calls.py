"""The fused kernels as calls on torch tensors, and attention in plain PyTorch to hold them against."""

from __future__ import annotations

import math

import torch

from runtime.kernels import load_kernels

LAYERNORM_EPSILON = 1e-5


class FusedOps:
    """The kernels on contiguous GPU tensors; they write their outputs, on torch's current stream."""

    def __init__(self) -> None:
        self.kernels = load_kernels()

    def encoder_attention(
        self, qkv: torch.Tensor, context: torch.Tensor, heads: int, path: str = "auto"
    ) -> None:
        """context [B, S, D] from the packed qkv [B, S, 3*D]."""
        batch, tokens, width = context.shape
        self.kernels.encoder_attention(
            qkv.data_ptr(),
            context.data_ptr(),
            batch=batch,
            sequence_length=tokens,
            num_heads=heads,
            head_dim=width // heads,
            path=path,
            **_common(context),
        )

    def decoder_self_attention(
        self,
        qkv: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
        position_ids: torch.Tensor,
        context: torch.Tensor,
        present: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """context [B, 1, D] and present from qkv [B, 1, 3*D] and past; caches are key, value [B, H, C, d]."""
        batch, heads, capacity, head_dim = past[0].shape
        self.kernels.decoder_self_attention(
            qkv.data_ptr(),
            past[0].data_ptr(),
            past[1].data_ptr(),
            position_ids.data_ptr(),
            context.data_ptr(),
            present[0].data_ptr(),
            present[1].data_ptr(),
            batch=batch,
            capacity=capacity,
            num_heads=heads,
            head_dim=head_dim,
            **_common(context),
        )

    def cross_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: torch.Tensor
    ) -> None:
        """context [B, 1, D] from query [B, 1, D] and key, value [I, H, S, d], B a multiple of I."""
        images, heads, tokens, head_dim = key.shape
        self.kernels.cross_attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            context.data_ptr(),
            batch=len(query),
            images=images,
            sequence_length=tokens,
            num_heads=heads,
            head_dim=head_dim,
            **_common(context),
        )

    def cross_key_value(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tactic: int = 0,
    ) -> None:
        """key and value [B, H, S, d] from x [B, S, K], weight [2*D, K] and bias float32 [2*D]."""
        batch, _, tokens, head_dim = key.shape
        self.kernels.linear(
            x.data_ptr(),
            weight.data_ptr(),
            key.data_ptr(),
            bias=bias.data_ptr(),
            values=value.data_ptr(),
            rows=batch * tokens,
            outputs=len(weight),
            inputs=x.shape[-1],
            tokens=tokens,
            head_dim=head_dim,
            tactic=tactic,
            **_common(x),
        )

    def residual_layernorm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        normed: torch.Tensor,
        sum: torch.Tensor | None = None,
        epsilon: float = LAYERNORM_EPSILON,
    ) -> None:
        """normed and, if given, sum [..., N] from x and residual [..., N], gamma and beta [N]."""
        self.kernels.residual_layernorm(
            x.data_ptr(),
            residual.data_ptr(),
            gamma.data_ptr(),
            beta.data_ptr(),
            normed.data_ptr(),
            0 if sum is None else sum.data_ptr(),
            rows=x.numel() // x.shape[-1],
            width=x.shape[-1],
            epsilon=epsilon,
            **_common(x),
        )

    def layernorm(
        self,
        x: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        normed: torch.Tensor,
        epsilon: float = LAYERNORM_EPSILON,
        overlap: bool = False,
    ) -> None:
        """normed [..., N] from x [..., N], gamma and beta [N]; `overlap` asks for a dependent launch."""
        self.kernels.layernorm(
            x.data_ptr(),
            gamma.data_ptr(),
            beta.data_ptr(),
            normed.data_ptr(),
            rows=x.numel() // x.shape[-1],
            width=x.shape[-1],
            epsilon=epsilon,
            overlap_predecessor=overlap,
            **_common(x),
        )

    def bias_activation(self, x: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, activation: str) -> None:
        """y [..., N] from x [..., N] and bias [N]; activation 'gelu' or 'relu'."""
        self.kernels.bias_activation(
            x.data_ptr(),
            bias.data_ptr(),
            y.data_ptr(),
            rows=x.numel() // x.shape[-1],
            width=x.shape[-1],
            activation=activation,
            **_common(x),
        )


def _common(tensor: torch.Tensor) -> dict[str, object]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v on [B, H, S, d], step by step in the tensors' own type.

    `visible`, where given, is a mask of the keys, bool [B, 1, 1, S].
    """
    scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]))
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ value


def split_qkv(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed [B, S, 3*D] -> query, key, value [B, H, S, d], views."""
    batch, tokens, width = qkv.shape
    packed = qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
    return packed[0], packed[1], packed[2]


def merge_heads(context: torch.Tensor) -> torch.Tensor:
    """[B, H, S, d] -> [B, S, D]"""
    batch, heads, tokens, head_dim = context.shape
    return context.transpose(1, 2).reshape(batch, tokens, heads * head_dim)
