"""The device decoder (plugins/device_decoder) on torch tensors: packs its weights, holds its buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.backends.base import SearchResult
from runtime.search import SearchSettings, length_penalties

CHUNK = 32  # inputs of a product that a lane of the kernel reads at once, times four lanes
TILE = 8  # outputs of a tile
TEAM_HEADS = 8  # of the team decoder, and its feed-forward columns a head
TEAM_INNER = 128
STATE_ROWS = 64  # the most slots of a search that attends to the encoder's states
STATE_WEIGHTS = ("cross_key_weight", "cross_value_weight", "cross_value_bias")


def pack_blobs(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """The weights as the decoder that serves these sizes reads them: one contiguous piece a block.

    Args:
        weights: as `decoder_weights.pack_decoder` makes them, on any device.
        config: as `decoder_weights.decoder_config` makes it.

    Returns:
        For heads of 32 what the team decoder takes, else what the chain takes, and with it the wide decoder
        where that serves (plugins/device_decoder/README.md).
    """
    if config["hidden_size"] == 32 * config["num_heads"]:
        return _pack_for_teams(weights, config)
    return _pack_for_chain(weights, config)


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


def _pack_for_chain(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """The weights as the chain's kernels read them: for every block of a kernel one contiguous piece.

    Returns:
        "self" and "cross" uint8 [L, H, C, bytes], "feed_forward" uint8 [L, F / 32, bytes],
        "feed_forward_bias" float32 [L, D], "head" T [ceil(V / 8), D / 32, 8, 32], "norms" T [1 + 3 L, 2, D],
        "embedding" T [V, D], "position_embedding" T [positions, D]; and where there are weights of
        cross-attention's keys and values, "cross_keys" T [L, H, 8, d / 32, E / 64, 8, 32], "cross_values"
        T [L, H, C, E / 32, 8, 32], "cross_value_bias" float32 [L, D]; and what `_pack_for_wide` makes, where
        there is a wide decoder for these sizes. See plugins/device_decoder/README.md.
    """
    layers, width, heads = config["num_layers"], config["hidden_size"], config["num_heads"]
    size = width // heads
    blocks, columns = size // TILE, width * TILE // size  # of a head; output columns of a block
    inputs = width // CHUNK

    def output_part(name: str) -> tuple[Tensor, Tensor]:
        weight = weights[f"{name}_weight"].view(layers, heads, size // CHUNK, CHUNK, blocks, columns)
        bias = weights[f"{name}_bias"].view(layers, 1, blocks, columns).expand(layers, heads, blocks, columns)
        return weight.permute(0, 1, 4, 2, 5, 3), bias

    qkv = weights["self_qkv_weight"].view(layers, 3, heads, blocks, TILE, inputs, CHUNK)
    qkv_bias = weights["self_qkv_bias"].view(layers, 3, heads, blocks, TILE)
    query = weights["cross_query_weight"].view(layers, heads, blocks, TILE, inputs, CHUNK)
    query_bias = weights["cross_query_bias"].view(layers, heads, blocks, TILE)
    self_out, self_out_bias = output_part("self_out")
    cross_out, cross_out_bias = output_part("cross_out")
    fc1 = weights["fc1_weight"].view(layers, -1, CHUNK, inputs, CHUNK)
    fc2 = weights["fc2_weight"].view(layers, -1, CHUNK, width)
    head = weights["head_weight"]
    head = F.pad(head, (0, 0, 0, -len(head) % TILE)).view(-1, TILE, inputs, CHUNK)

    norms = torch.stack([weights["norm_gamma"], weights["norm_beta"]], 2).flatten(0, 1)  # [3 L, 2, D]
    states = {}
    if "cross_key_weight" in weights and "encoder_size" in config:
        encoded = config["encoder_size"]
        # A head's part of the query, d inputs, becomes a query of the encoder's states, E outputs; and back.
        keys = weights["cross_key_weight"].view(layers, heads, size // CHUNK, CHUNK, 8, encoded // 64, TILE)
        values = weights["cross_value_weight"].view(layers, heads, blocks, TILE, encoded // CHUNK, CHUNK)
        states = {
            "cross_keys": keys.permute(0, 1, 4, 2, 5, 6, 3).contiguous(),
            "cross_values": values.permute(0, 1, 2, 4, 3, 5).contiguous(),
            "cross_value_bias": weights["cross_value_bias"].contiguous(),
        }
    inner = config["ffn_size"]
    wide = (
        _pack_for_wide(weights, config) if width in (256, 1024) and size == 64 and inner == 4 * width else {}
    )
    first = [
        weights.get(f"embedding_norm_{name}", torch.zeros_like(norms[0, 0])) for name in ("gamma", "beta")
    ]
    return (
        {
            "self": _blobs(
                3,
                qkv_bias.permute(0, 2, 3, 1, 4),
                self_out_bias,
                qkv.permute(0, 2, 3, 5, 1, 4, 6),
                self_out,
            ),
            "cross": _blobs(3, query_bias, cross_out_bias, query.permute(0, 1, 2, 4, 3, 5), cross_out),
            "feed_forward": _blobs(
                2,
                weights["fc1_bias"].view(layers, -1, CHUNK),
                fc1.permute(0, 1, 3, 2, 4),
                fc2.permute(0, 1, 3, 2),
            ),
            "feed_forward_bias": weights["fc2_bias"].contiguous(),
            "head": head.permute(0, 2, 1, 3).contiguous(),
            "norms": torch.cat([torch.stack(first)[None], norms]).contiguous(),
            "embedding": weights["token_embedding"].contiguous(),
            "position_embedding": weights["position_embedding"].contiguous(),
        }
        | states
        | wide
    )


def _pack_for_wide(weights: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """The layers as the wide decoder's blocks stream them: a share is 8 columns of the width.

    Each sublayer's first product has the LayerNorm before it folded in: gamma in its weights, beta in its
    bias.

    Returns:
        "wide_layers" T [L, 14 slots, D / 8, 8 D] and "wide_constants" float32 [L, D / 8, 200].
    """
    layers, shares = config["num_layers"], config["hidden_size"] // TILE
    # Of what each sublayer begins with, [L, 3, D]: the embedding's or the layer before's last, and two more.
    gamma, beta = (
        torch.cat([first[None], weights[f"norm_{name}"].flatten(0, 1)[:-1]]).unflatten(0, (layers, 3))
        for name, first in (
            ("gamma", weights.get("embedding_norm_gamma", torch.ones_like(weights["norm_gamma"][0, 0]))),
            ("beta", weights.get("embedding_norm_beta", torch.zeros_like(weights["norm_beta"][0, 0]))),
        )
    )

    def tiles(weight: Tensor) -> Tensor:  # [L, out, in] -> [L, out / 8, in / 32, 8, 32]
        return weight.unflatten(2, (-1, CHUNK)).unflatten(1, (-1, TILE)).transpose(2, 3)

    def of_shares(columns: Tensor) -> Tensor:  # [L, parts x D, ...] -> [L, shares, parts x 8, ...]
        return columns.unflatten(1, (-1, shares, TILE)).transpose(1, 2).flatten(2, 3)

    slots, constants = [], []
    sublayers = (("self_qkv", "self_out"), ("cross_query", "cross_out"), ("fc1", "fc2"))
    for number, (name, output) in enumerate(sublayers):
        weight = weights[f"{name}_weight"].float()  # [L, out, in]
        bias = weights[f"{name}_bias"].float() + (weight @ beta[:, number].float()[..., None])[..., 0]
        folded = (weight * gamma[:, number].float()[:, None]).to(weights[f"{name}_weight"].dtype)
        sums = folded.float().sum(2)
        if name == "fc1":  # a share's four tiles lie side by side, as inputs of the second product
            slots.append(tiles(folded).unflatten(1, (shares, -1)))
            constants += [columns.view(layers, shares, -1) for columns in (bias, sums)]
        else:
            slots.append(tiles(folded).unflatten(1, (-1, shares)).transpose(1, 2))
            constants += [of_shares(columns) for columns in (bias, sums)]
        out = tiles(weights[f"{output}_weight"].transpose(1, 2))
        slots.append(out.unflatten(2, (-1, config["hidden_size"] // CHUNK)))
        rows = (weights[f"{output}_bias"], gamma[:, number], beta[:, number])
        constants += [of_shares(columns.float()) for columns in rows]
    # All shares' pieces of a slot lie side by side: all blocks fetch them at about the same time.
    layer = torch.cat([part.flatten(3) for part in slots], 2).transpose(1, 2)
    return {"wide_layers": layer.contiguous(), "wide_constants": torch.cat(constants, 2).contiguous()}


def _blobs(dims: int, *parts: Tensor) -> Tensor:
    """uint8: what the parts have behind their first `dims` dimensions, one behind the other."""
    return torch.cat([part.contiguous().flatten(dims).view(torch.uint8) for part in parts], dim=-1)


class DeviceDecoder:
    """Decodes a batch of lines in one launch.

    Attributes:
        max_slots: the most rows at a time.
        max_new_tokens: the most tokens a line.
        attends_to_states: whether it takes the encoder's states in place of keys and values.
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
            weights: as `decoder_weights.pack_decoder` makes them, on the GPU; may be freed afterwards.
            config: as `decoder_weights.decoder_config` makes it.

        Raises:
            RuntimeError: the GPU or the sizes are not served; the message says why.
        """
        obstacle = kernels.device_decoder_obstacle(dict(config))
        if obstacle is not None:
            raise RuntimeError(f"cannot decode on the GPU because {obstacle}")
        self.max_slots, self.max_new_tokens = max_slots, max_new_tokens
        if kernels.device_decoder_states_obstacle(dict(config)) is not None:
            weights = {name: weight for name, weight in weights.items() if name not in STATE_WEIGHTS}
        self._blobs = pack_blobs(weights, config)
        self.attends_to_states = "cross_keys" in self._blobs
        self._device = self._blobs["head"].device
        self._kernels, self._config = kernels, dict(config)
        self._penalties: dict[tuple[int, float], Tensor] = {}
        self._decoder = kernels.DeviceDecoder(
            dict(config),
            {name: blob.data_ptr() for name, blob in self._blobs.items()},
            max_slots=max_slots,
            capacity=max_new_tokens,
        )

    def outputs(self, lines: int, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int32 [lines, max_new_tokens], log_probs float32 [lines] and lengths int32 [lines]."""
        result = SearchResult.empty(lines, max_new_tokens, self._device)
        return result.tokens, result.log_probs, result.lengths

    def runs_as_a_kernel(self, slots: int, states: bool) -> bool:
        """Whether `run` enqueues nothing but a kernel, so that it may become part of a CUDA graph."""
        return self._decoder.runs_as_a_kernel(min(slots, self.max_slots), states)

    def takes_e4m3(self, slots: int) -> bool:
        """Whether `run` takes keys and values of e4m3 in so many slots."""
        return self._decoder.takes_e4m3(min(slots, self.max_slots))

    def round_to_e4m3(
        self,
        cross: tuple[Sequence[Tensor], Sequence[Tensor]],
        rounded: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> None:
        """Enqueue, on torch's current stream, the rounding of keys and values from float16 to e4m3.

        There is no scale: e4m3 has 2^-9 to 448, and what is beyond becomes 448.

        Args:
            cross: a layer's float16 [lines, H, S, d] each, contiguous.
            rounded: float8_e4m3fn of the same shapes, contiguous.
        """
        sources, results = ([*keys, *values] for keys, values in (cross, rounded))
        self._kernels.round_to_e4m3(
            from_=[tensor.data_ptr() for tensor in sources],
            to=[tensor.data_ptr() for tensor in results],
            count=results[0].numel(),
            stream=_stream_of(results[0]),
        )

    def run(
        self,
        attended: Tensor | tuple[Sequence[Tensor], Sequence[Tensor]],
        outputs: tuple[Tensor, Tensor, Tensor],
        slots: int | None = None,
        stop: bool = True,
    ) -> None:
        """Enqueue the search on torch's current stream.

        Args:
            attended: what cross-attention reads: keys and values, a layer's [lines, H, S, d] each, of T, or
                of e4m3 where `takes_e4m3`; or, where `attends_to_states`, the encoder's states
                T [lines, S, E], for at most STATE_ROWS slots. Contiguous.
            outputs: from `outputs`, or contiguous tensors like them. Tokens are padded behind a line's end;
                log_probs are sums over a line's tokens, the end of text included, as lengths count it.
            slots: lines at a time; a finished line's row takes the next one. Default: as many as there are.
            stop: False for texts of exactly max_new_tokens, whatever ends them: for measurements.
        """
        lines = len(outputs[0])
        slots = min(lines, slots or self.max_slots, self.max_slots)
        self._decoder.run(lines=lines, slots=slots, **_pointers(attended, outputs, stop))

    def searches_beams(self, beams: int) -> bool:
        """Whether `search_beams` has so many beams."""
        return self._kernels.beam_search_obstacle(self._config, beams) is None

    def search_beams(
        self,
        attended: Tensor | tuple[Sequence[Tensor], Sequence[Tensor]],
        outputs: tuple[Tensor, Tensor, Tensor],
        settings: SearchSettings,
        stop: bool = True,
    ) -> None:
        """As `run`, but beam search, as runtime.beam_search.BeamSearch has it."""
        images, max_new_tokens = outputs[0].shape
        key = (max_new_tokens, settings.length_penalty)
        if key not in self._penalties:
            penalties = length_penalties(max_new_tokens, settings.length_penalty)
            self._penalties[key] = penalties.to(self._device)
        most = min(self._decoder.most_rows, STATE_ROWS) // settings.num_beams
        groups = -(-images // most)
        for group in range(groups):
            part = slice(images * group // groups, images * (group + 1) // groups)
            if isinstance(attended, Tensor):
                mine = attended[part]
            else:
                mine = tuple([tensor[part] for tensor in tensors] for tensors in attended)
            self._decoder.search_beams(
                images=part.stop - part.start,
                beams=settings.num_beams,
                no_repeat_ngram=settings.no_repeat_ngram_size,
                stops_early=settings.early_stopping is True,
                hopes_long=settings.hopes_long,
                penalties=self._penalties[key].data_ptr(),
                **_pointers(mine, tuple(tensor[part] for tensor in outputs), stop),
            )


def _pointers(
    attended: Tensor | tuple[Sequence[Tensor], Sequence[Tensor]],
    outputs: tuple[Tensor, Tensor, Tensor],
    stop: bool,
) -> dict:
    """What every search of the kernels' decoder is given."""
    if isinstance(attended, Tensor):
        sources = {"states": attended.data_ptr()}
    else:
        keys, values = ([tensor.data_ptr() for tensor in tensors] for tensors in attended)
        sources = {"cross_keys": keys, "cross_values": values}
        if attended[0][0].dtype == torch.float8_e4m3fn:
            sources["cross_is_e4m3"] = True
    names = ("tokens", "log_probs", "lengths")
    pointers = {name: tensor.data_ptr() for name, tensor in zip(names, outputs, strict=True)}
    return {
        **sources,
        **pointers,
        "max_new_tokens": outputs[0].shape[1],
        "stops": stop,
        "stream": _stream_of(outputs[0]),
    }


def _stream_of(tensor: Tensor) -> int:
    """torch's current stream of the tensor's device; on a CPU there is none."""
    return torch.cuda.current_stream().cuda_stream if tensor.is_cuda else 0
