"""Beam search by runtime.beam_search over a PyTorch decoder: what the kernels' beam search is held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from profiling.reference_decoder import ReferenceDecoder, forced_logits, greedy_reference
from runtime.beam_search import BeamSearch
from runtime.search import Generation, SearchSettings

Cross = tuple[Sequence[Tensor], Sequence[Tensor]]


class ReferenceBackend:
    """A `ReferenceDecoder` in float32 as BeamSearch wants it."""

    name = "reference"

    def __init__(self, weights: Mapping[str, Tensor], config: Mapping, cross: Cross, beams: int):
        self.device = cross[0][0].device
        repeated = [[tensor.repeat_interleave(beams, 0) for tensor in tensors] for tensors in cross]
        self.decoder = ReferenceDecoder(weights, config, *repeated)
        self.spec = SimpleNamespace(
            decoder=SimpleNamespace(vocab_size=config["vocab_size"]),
            decoder_start_token_id=config["start_id"],
            pad_token_id=config["pad_id"],
            eos_token_ids=tuple(config["eos_ids"]),
        )

    def step(self, state, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.decoder.step(input_ids[:, 0])

    def reorder(self, state, rows: Tensor, position_ids: Tensor) -> None:
        for cache in (*self.decoder.keys, *self.decoder.values):
            cache[:] = [tensor[rows] for tensor in cache]


def likely_ends(weights: Mapping[str, Tensor], config: Mapping, cross: Cross, ends: int) -> list[int]:
    """So many ids to end texts: what many say, none at its beginning."""
    tokens, _ = greedy_reference(weights, config, *cross, max_new_tokens=12)
    early = set(tokens[:, :3].flatten().tolist())
    texts = Counter(token for text in tokens.tolist() for token in set(text) - early)
    return [token for token, _ in texts.most_common(ends)]


@torch.inference_mode()
def host_search(backend, images: int, steps: int, settings: SearchSettings) -> Generation:
    """runtime.beam_search over any backend that has `step`, `reorder`, `spec` and `device`."""
    search = BeamSearch(backend, images, steps, settings)
    search.reset()
    for _ in range(steps):
        search.step()
        if search.open_images == 0:
            break
    return search.result()


def assert_right(
    weights: Mapping[str, Tensor],
    config: Mapping,
    cross: Cross,
    outputs: tuple[Tensor, Tensor, Tensor],
    settings: SearchSettings,
) -> None:
    """Every score is that of its tokens, and hardly any hypothesis is worth less than the reference's."""
    tokens, log_probs, lengths = outputs
    images, steps = tokens.shape
    start = torch.full_like(tokens[:, :1], config["start_id"])
    inputs = torch.cat([start, tokens[:, :-1]], 1).clamp(0, config["vocab_size"] - 1)
    exact = forced_logits(weights, config, *cross, inputs)
    rounded = forced_logits(weights, config, *cross, inputs, dtype=weights["head_weight"].dtype).float()
    margin = 2 * (rounded - exact).abs().max() + 1e-3
    valid = torch.arange(steps, device=tokens.device) < lengths[:, None]
    assert (lengths >= 1).all() and (lengths <= steps).all()
    assert (tokens[~valid] == config["pad_id"]).all()
    chosen = tokens.clamp(0, config["vocab_size"] - 1).long()[..., None]
    expected = (exact.log_softmax(-1).gather(-1, chosen)[..., 0] * valid).sum(1)
    assert ((log_probs - expected).abs() / lengths).max() <= 2 * margin

    backend = ReferenceBackend(weights, config, cross, settings.num_beams)
    found = host_search(backend, images, steps, settings)
    worse = []
    for image, theirs in enumerate(found.token_ids):
        length = int(lengths[image])
        value = expected[image] / length**settings.length_penalty
        best = found.mean_log_probs[image] * len(theirs) / len(theirs) ** settings.length_penalty
        if tokens[image, :length].tolist() != theirs and value < best - margin * length:
            worse.append(
                f"image {image}: {length} tokens worth {value:.5f}, not {len(theirs)} worth {best:.5f}, "
                f"with {margin:.5f} a token allowed"
            )
    # A hypothesis that rounding drops, though it belongs among those kept, takes its continuations with it.
    assert len(worse) <= images // 8, "; ".join(worse)
