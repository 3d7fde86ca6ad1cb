"""A decoder in plain PyTorch on the packed weights of runtime/decoder_weights.py: the kernels' reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STACKED = ("self_", "cross_", "fc1_", "fc2_", "norm_")  # the names of the tensors that have a row a layer


class ReferenceDecoder:
    """One token a row at a time, every operation rounded to `dtype`.

    Args:
        weights: as `pack_decoder` makes them, on any device.
        config: as `decoder_config` makes it.
        cross_keys, cross_values: of each layer [B, H, S, d].
        dtype: float32 or float64 for a reference, the weights' own for the tolerance that a kernel is due.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        config: Mapping,
        cross_keys: Sequence[Tensor],
        cross_values: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.dtype = config, dtype
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.cross = [(k.to(dtype), v.to(dtype)) for k, v in zip(cross_keys, cross_values, strict=True)]
        self.batch = len(cross_keys[0])
        self.heads, self.layers = config["num_heads"], config["num_layers"]
        self.head_dim = config["hidden_size"] // self.heads
        self.keys: list[list[Tensor]] = [[] for _ in range(self.layers)]  # each [B, H, d]
        self.values: list[list[Tensor]] = [[] for _ in range(self.layers)]
        self.position = 0

    def step(self, input_ids: Tensor) -> Tensor:
        """The logits [B, V] after one more token a row, input_ids int [B]."""
        w, config = self.weights, self.config
        hidden = w["token_embedding"][input_ids.long()] * config["embed_scale"]
        hidden = hidden + w["position_embedding"][self.position]
        if config["embedding_norm"]:
            hidden = self._norm(hidden, w["embedding_norm_gamma"], w["embedding_norm_beta"])
        for layer in range(self.layers):
            hidden = self._layer(layer, hidden)
        self.position += 1
        return hidden @ w["head_weight"].T

    def _layer(self, i: int, hidden: Tensor) -> Tensor:
        w = {name: tensor[i] for name, tensor in self.weights.items() if name.startswith(STACKED)}
        gamma, beta = w["norm_gamma"], w["norm_beta"]
        qkv = F.linear(hidden, w["self_qkv_weight"], w["self_qkv_bias"])
        query, key, value = qkv.view(self.batch, 3, self.heads, self.head_dim).unbind(1)
        self.keys[i].append(key)
        self.values[i].append(value)
        context = self._attend(query, torch.stack(self.keys[i], 2), torch.stack(self.values[i], 2))
        attended = context @ w["self_out_weight"] + w["self_out_bias"]
        hidden = self._norm(hidden + attended, gamma[0], beta[0])

        query = F.linear(hidden, w["cross_query_weight"], w["cross_query_bias"])
        context = self._attend(query.view(self.batch, self.heads, self.head_dim), *self.cross[i])
        attended = context @ w["cross_out_weight"] + w["cross_out_bias"]
        hidden = self._norm(hidden + attended, gamma[1], beta[1])

        activation = {"relu": F.relu, "gelu": F.gelu}[self.config["activation"]]
        expanded = activation(F.linear(hidden, w["fc1_weight"], w["fc1_bias"]))
        return self._norm(hidden + (expanded @ w["fc2_weight"] + w["fc2_bias"]), gamma[2], beta[2])

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[B, H, d] over [B, H, T, d] -> [B, H * d]."""
        scores = (query * self.head_dim**-0.5)[:, :, None] @ keys.transpose(2, 3)  # [B, H, 1, T]
        return (scores.softmax(-1) @ values).reshape(self.batch, -1)

    def _norm(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], gamma, beta, self.config["epsilon"])


@torch.no_grad()
def forced_logits(
    weights: Mapping[str, Tensor],
    config: Mapping,
    cross_keys: Sequence[Tensor],
    cross_values: Sequence[Tensor],
    input_ids: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The logits [B, T, V] after each of the tokens input_ids [B, T]."""
    decoder = ReferenceDecoder(weights, config, cross_keys, cross_values, dtype)
    return torch.stack([decoder.step(token) for token in input_ids.T], dim=1)


@torch.no_grad()
def greedy_reference(
    weights: Mapping[str, Tensor],
    config: Mapping,
    cross_keys: Sequence[Tensor],
    cross_values: Sequence[Tensor],
    max_new_tokens: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Greedy search, with the results of `DeviceDecoder.run`.

    Returns:
        tokens int32 [B, max_new_tokens], padded after the end of text; log_probs float32 [B], summed over the
        tokens of a row, end of text included.
    """
    decoder = ReferenceDecoder(weights, config, cross_keys, cross_values, dtype)
    device = cross_keys[0].device
    ends = torch.tensor(config.get("eos_ids", [config["eos_id"]]), device=device)
    token = torch.full((decoder.batch,), config["start_id"], device=device)
    finished = torch.zeros(decoder.batch, dtype=torch.bool, device=device)
    tokens = torch.full((decoder.batch, max_new_tokens), config["pad_id"], dtype=torch.int32, device=device)
    log_probs = torch.zeros(decoder.batch, device=device)
    for step in range(max_new_tokens):
        scores = decoder.step(token).float().log_softmax(-1)
        token = scores.argmax(-1)
        log_probs += scores.gather(1, token[:, None])[:, 0].masked_fill(finished, 0.0)
        token = token.masked_fill(finished, config["pad_id"])
        tokens[:, step] = token
        finished |= torch.isin(token, ends)
        if finished.all():
            break
    return tokens, log_probs
