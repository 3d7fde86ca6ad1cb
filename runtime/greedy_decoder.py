"""The CUDA greedy decoder (plugins/greedy_decoder) on torch tensors: packs its weights, holds its buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32  # inputs of a product that a lane of the kernel reads at once, times four lanes
TILE = 8  # outputs of a tile
TEAM_HEADS = 8  # of the team decoder, and its feed-forward columns a head
TEAM_INNER = 128
WIDE_WIDTH = 1024  # of the wide decoder, and its feed-forward columns
WIDE_INNER = 4096


def pack_blobs(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """The weights as the decoder that serves these sizes reads them: one contiguous piece a block.

    Args:
        weights: as `greedy_weights.pack_decoder` makes them, on any device.
        config: as `greedy_weights.decoder_config` makes it.

    Returns:
        For heads of 32 what the team decoder takes, else what the wide decoder takes
        (plugins/greedy_decoder/README.md).
    """
    if config["hidden_size"] == 32 * config["num_heads"]:
        return _pack_for_teams(weights, config)
    return _pack_for_wide(weights, config)


def _units(weight: Tensor) -> Tensor:
    """Units [..., out / 16, in / 32, 512] of T [..., out, in]: in each, what the 32 lanes of a warp hold.

    Lane 4 g + t has, for each of two matrix products, inputs 8 t + 4 s + (0, 1), then (2, 3), of outputs g
    and g + 8.
    """
    *rest, outputs, inputs = weight.shape
    n = len(rest)
    parts = weight.reshape(*rest, outputs // 16, 2, 8, inputs // 32, 4, 2, 2, 2)  # h, g; t, s, q, e
    order = (*range(n), *(n + i for i in (0, 3, 5, 2, 4, 6, 1, 7)))
    return parts.permute(order).reshape(*rest, outputs // 16, inputs // 32, 512)


def _pack_for_teams(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """The weights in the order in which the team decoder's eight blocks, one a head, stream them.

    Narrower decoders are padded with zeros: heads to 8, with them the width to 256, feed-forward columns to
    128 a head.

    Returns:
        "layers" uint8 [L, 8, bytes], "constants" uint8 [L, 8, bytes], "head" T [ceil(V / 32), 2, 8, 512],
        "embedding_norm" T [2, 256], "embedding" T [V, 256], "position_embedding" T [positions, 256].
    """
    layers, width, inner = config["num_layers"], TEAM_HEADS * CHUNK, TEAM_HEADS * TEAM_INNER
    missing = width - config["hidden_size"]

    def wide(name: str, parts: int = 1) -> Tensor:  # [..., parts * D] -> [..., parts, 256]
        return F.pad(weights[name].unflatten(-1, (parts, -1)), (0, missing))

    def first(name: str, parts: int) -> Tensor:  # [L, parts * D, D] -> [L, 8, parts * 32, 256]
        weight = F.pad(weights[name].unflatten(1, (parts, -1)), (0, missing, 0, missing))
        weight = weight.view(layers, parts, TEAM_HEADS, CHUNK, width)
        return weight.transpose(1, 2).reshape(layers, TEAM_HEADS, parts * CHUNK, width)

    def output(name: str) -> Tensor:  # [L, D in, D out] -> [L, 8, 256 out, 32 in]
        weight = F.pad(weights[name], (0, missing, 0, missing))
        return weight.view(layers, TEAM_HEADS, CHUNK, width).transpose(2, 3)

    def feed_forward(name: str) -> Tensor:  # [L, F, D] -> [L, 8, 128, 256]
        weight = F.pad(weights[name], (0, missing, 0, inner - config["ffn_size"]))
        return weight.view(layers, TEAM_HEADS, TEAM_INNER, width)

    def for_all(tensor: Tensor) -> Tensor:
        return tensor[:, None].expand(layers, TEAM_HEADS, *tensor.shape[1:])

    def rows(name: str) -> Tensor:
        return F.pad(weights[name], (0, missing)).contiguous()

    norms = torch.stack([rows("norm_gamma"), rows("norm_beta")], 2)  # [L, 3, 2, 256]
    first_bias = F.pad(weights["fc1_bias"], (0, inner - config["ffn_size"]))
    head = rows("head_weight")
    head = F.pad(head, (0, 0, 0, -len(head) % (2 * 16)))
    norm = [rows(f"embedding_norm_{name}") for name in ("gamma", "beta") if config["embedding_norm"]]
    return {
        "layers": _blobs(
            2,
            _units(first("self_qkv_weight", 3)),
            _units(output("self_out_weight")),
            _units(first("cross_query_weight", 1)),
            _units(output("cross_out_weight")),
            _units(feed_forward("fc1_weight")),
            _units(feed_forward("fc2_weight").transpose(2, 3)),
        ),
        "constants": _blobs(
            2,
            wide("self_qkv_bias", 3).view(layers, 3, TEAM_HEADS, CHUNK).transpose(1, 2),
            wide("cross_query_bias").view(layers, TEAM_HEADS, CHUNK),
            first_bias.view(layers, TEAM_HEADS, TEAM_INNER),
            *(for_all(wide(f"{name}_bias")) for name in ("self_out", "cross_out", "fc2")),
            for_all(norms),
        ),
        "head": _units(head).view(-1, 2, width // CHUNK, 512),
        "embedding_norm": torch.stack(norm or [norms[0, 0, 0]] * 2),
        "embedding": rows("token_embedding"),
        "position_embedding": rows("position_embedding"),
    }


def _tiles(weight: Tensor) -> Tensor:
    """Tiles [..., out / 8, in / 32, 8, 32] of [..., out, in]."""
    *rest, outputs, inputs = weight.shape
    return weight.reshape(*rest, outputs // TILE, TILE, inputs // CHUNK, CHUNK).transpose(-3, -2)


def _pack_for_wide(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """The weights in the order in which the wide decoder's blocks stream them: a share is 8 columns of the width.

    Narrower decoders are padded with zeros to a width of 1024 and 4096 feed-forward columns.

    Returns:
        "layers" uint8 [L, 128, bytes], "constants" uint8 [L, 128, bytes], "head" T [ceil(V / 8), 32, 8, 32],
        "norms" T [1 + 3 L, 2, 1024], "embedding" T [V, 1024], "position_embedding" T [positions, 1024].
    """
    layers, shares = config["num_layers"], WIDE_WIDTH // TILE
    missing, missing_inner = WIDE_WIDTH - config["hidden_size"], WIDE_INNER - config["ffn_size"]

    def rows(name: str) -> Tensor:
        return F.pad(weights[name], (0, missing))

    def bias(name: str, parts: int = 1) -> Tensor:  # -> [L, 128, parts * 8]
        of = F.pad(weights[name].unflatten(-1, (parts, -1)), (0, missing))
        return of.view(layers, parts, shares, TILE).transpose(1, 2).flatten(2)

    def product(name: str, parts: int = 1) -> Tensor:  # [L, parts * D, D] -> tiles [L, 128, parts, ...]
        weight = F.pad(weights[name].unflatten(1, (parts, -1)), (0, missing, 0, missing))
        return _tiles(weight).transpose(1, 2)

    def output(name: str) -> Tensor:  # [L, D in, D out] -> tiles [L, 128, ...]
        return _tiles(F.pad(weights[name], (0, missing, 0, missing)).transpose(1, 2))

    fc1 = _tiles(F.pad(weights["fc1_weight"], (0, missing, 0, missing_inner)))
    fc2 = _tiles(F.pad(weights["fc2_weight"], (0, missing, 0, missing_inner)).transpose(1, 2))
    norms = torch.stack([rows("norm_gamma"), rows("norm_beta")], 2).flatten(0, 1)  # [3 L, 2, 1024]
    first = torch.stack([torch.ones_like(norms[0, 0]), torch.zeros_like(norms[0, 0])])
    if config["embedding_norm"]:
        first = torch.stack([rows("embedding_norm_gamma"), rows("embedding_norm_beta")])
    head = rows("head_weight")
    return {
        "layers": _blobs(
            2,
            product("self_qkv_weight", 3),
            output("self_out_weight"),
            product("cross_query_weight"),
            output("cross_out_weight"),
            fc1.unflatten(1, (shares, -1)),
            fc2,
        ),
        "constants": _blobs(
            2,
            bias("self_qkv_bias", 3),
            bias("self_out_bias"),
            bias("cross_query_bias"),
            bias("cross_out_bias"),
            F.pad(weights["fc1_bias"], (0, missing_inner)).view(layers, shares, -1),
            bias("fc2_bias"),
        ),
        "head": _tiles(F.pad(head, (0, 0, 0, -len(head) % TILE))).contiguous(),
        "norms": torch.cat([first[None], norms]).contiguous(),
        "embedding": rows("token_embedding").contiguous(),
        "position_embedding": rows("position_embedding").contiguous(),
    }


def _blobs(dims: int, *parts: Tensor) -> Tensor:
    """uint8: what the parts have behind their first `dims` dimensions, one behind the other."""
    return torch.cat([part.contiguous().flatten(dims).view(torch.uint8) for part in parts], dim=-1)


class GreedyDecoder:
    """Decodes a batch of lines in one launch.

    Attributes:
        max_slots: the most rows at a time.
        max_new_tokens: the most tokens a line.
    """

    def __init__(
        self,
        kernels: ModuleType,
        weights: Mapping[str, Tensor],
        config: Mapping,
        max_slots: int,
        max_new_tokens: int,
    ):
        """
        Args:
            kernels: the module `trocr_kernels`.
            weights: as `greedy_weights.pack_decoder` makes them, on the GPU; may be freed afterwards.
            config: as `greedy_weights.decoder_config` makes it.

        Raises:
            RuntimeError: the GPU or the sizes are not served; the message says why.
        """
        obstacle = kernels.greedy_decoder_obstacle(dict(config))
        if obstacle is not None:
            raise RuntimeError(f"cannot decode on the GPU because {obstacle}")
        self.max_slots, self.max_new_tokens = max_slots, max_new_tokens
        self._blobs = pack_blobs(weights, config)
        self._device = self._blobs["head"].device
        self._decoder = kernels.GreedyDecoder(
            dict(config),
            {name: blob.data_ptr() for name, blob in self._blobs.items()},
            max_slots=max_slots,
            capacity=max_new_tokens,
        )

    def outputs(self, lines: int, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int32 [lines, max_new_tokens], log_probs float32 [lines] and lengths int32 [lines]."""
        tokens = torch.empty(lines, max_new_tokens, dtype=torch.int32, device=self._device)
        return tokens, torch.empty_like(tokens[:, 0], dtype=torch.float32), torch.empty_like(tokens[:, 0])

    def run(
        self,
        cross_keys: Sequence[Tensor],
        cross_values: Sequence[Tensor],
        outputs: tuple[Tensor, Tensor, Tensor],
        slots: int | None = None,
        stop: bool = True,
    ) -> None:
        """Enqueue the search on torch's current stream.

        Args:
            cross_keys, cross_values: a layer's T [lines, H, S, d], contiguous.
            outputs: from `outputs`, or contiguous tensors like them. Tokens are padded behind a line's end;
                log_probs are sums over a line's tokens, the end of text included, as lengths count it.
            slots: lines at a time; a finished line's row takes the next one. Default: as many as there are.
            stop: False for texts of exactly max_new_tokens, whatever ends them: for measurements.
        """
        tokens, log_probs, lengths = outputs
        lines, max_new_tokens = tokens.shape
        self._decoder.run(
            lines=lines,
            slots=min(lines, slots or self.max_slots, self.max_slots),
            cross_keys=[tensor.data_ptr() for tensor in cross_keys],
            cross_values=[tensor.data_ptr() for tensor in cross_values],
            tokens=tokens.data_ptr(),
            log_probs=log_probs.data_ptr(),
            lengths=lengths.data_ptr(),
            max_new_tokens=max_new_tokens,
            stops=stop,
            stream=torch.cuda.current_stream().cuda_stream,
        )
