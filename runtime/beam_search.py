"""Beam search over any backend, with the semantics of Hugging Face's `generate(num_beams=...)`.

A step extends every hypothesis by every token and keeps the best of an image: those that end (by end of text
or at the limit) compete for `num_beams` places of complete hypotheses, those that do not become the running
ones. What it computes in, and in which order, is as in transformers 5: even near ties go the same way.
"""

from __future__ import annotations

import torch

from runtime.backends.base import Backend
from runtime.search import (
    Generation,
    GenerationError,
    Search,
    SearchSettings,
    ban_repeated_ngrams,
    length_penalties,
    make_generation,
)

IMPOSSIBLE = -1.0e9  # added to scores that must not win; finite, as there


class BeamSearch(Search):
    """Beam search for one number of images B, with n beams.

    Attributes:
        input_ids: int64 [B, n], the last token of every running hypothesis.
        position_ids: int64 [B, n], its position: the number of tokens generated.
        running_ids: int64 [B, n, 1 + max_new_tokens], all its tokens, the start token first.
        running_scores: float32 [B, n], its log-probability, in descending order.
        complete_ids, complete_scores: likewise of the complete ones, with the length penalty.
        complete_lengths: int64 [B, n], tokens generated.
        is_complete: bool [B, n], false for a place that is still free.
    """

    def __init__(self, backend: Backend, images: int, max_new_tokens: int, settings: SearchSettings):
        super().__init__(backend, images, max_new_tokens, settings)
        beams = settings.num_beams
        # So many that enough are left to run on if all the best ones end.
        self.candidates = max(2, 1 + len(self.eos_ids)) * beams
        if self.candidates > backend.spec.decoder.vocab_size:
            raise GenerationError(
                f"num_beams is {beams}: {self.candidates} candidates a step, and the vocabulary has "
                f"{backend.spec.decoder.vocab_size} tokens; choose fewer"
            )
        self.input_ids = self._tensor(beams)
        self.position_ids = self._tensor(beams)
        self.running_ids = self._tensor(beams, 1 + max_new_tokens)
        self.running_scores = self._tensor(beams, dtype=torch.float32)
        self.complete_ids = self._tensor(beams, 1 + max_new_tokens)
        self.complete_scores = self._tensor(beams, dtype=torch.float32)
        self.complete_lengths = self._tensor(beams)
        self.is_complete = self._tensor(beams, dtype=torch.bool)
        self.improvable = self._tensor(1, dtype=torch.bool)

        device = backend.device
        self.penalties = length_penalties(max_new_tokens, settings.length_penalty).to(device)
        self.first_rows = torch.arange(images, device=device)[:, None] * beams
        self.is_best = torch.arange(self.candidates, device=device) < beams

    def reset(self) -> None:
        self.input_ids.fill_(self.start_id)
        self.position_ids.zero_()
        for ids in (self.running_ids, self.complete_ids):
            ids.fill_(self.pad_id)
            ids[:, :, 0] = self.start_id
        self.running_scores.fill_(IMPOSSIBLE)  # the beams are equal: the first one alone is to branch
        self.running_scores[:, 0] = 0
        self.complete_scores.fill_(IMPOSSIBLE)
        self.complete_lengths.zero_()
        self.is_complete.fill_(False)
        self.improvable.fill_(True)
        self.closed.fill_(False)

    def step(self) -> None:
        settings, beams = self.settings, self.settings.num_beams
        input_ids, position_ids = self.input_ids.view(-1, 1), self.position_ids.view(-1, 1)
        logits = self.backend.step(self.state, input_ids, position_ids).float()  # [B * n, V]
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        if settings.no_repeat_ngram_size:
            ban_repeated_ngrams(
                logits, self.running_ids.flatten(0, 1), position_ids, settings.no_repeat_ngram_size
            )

        # The best of an image are among the best of its rows.
        best_logits, best_tokens = logits.topk(self.candidates, dim=-1)
        scores = (best_logits - normalizer).view(self.images, beams, -1) + self.running_scores[:, :, None]
        scores, choice = scores.flatten(1).topk(self.candidates, dim=-1)  # [B, candidates]
        beam = choice // self.candidates
        tokens = best_tokens.view(self.images, -1).gather(1, choice)

        self.position_ids += 1
        length = self.position_ids[:, :1]  # [B, 1]
        ids = _pick(self.running_ids, beam)
        ids.scatter_(2, length[:, :, None].expand(-1, self.candidates, 1), tokens[:, :, None])
        ends = (tokens[:, :, None] == self.eos_ids).any(dim=-1) | (length >= self.max_new_tokens)

        running_scores = scores + ends * IMPOSSIBLE
        running = running_scores.topk(beams, dim=-1).indices
        self.running_scores.copy_(running_scores.gather(1, running))
        self.running_ids.copy_(_pick(ids, running))
        self.input_ids.copy_(tokens.gather(1, running))
        rows = (beam.gather(1, running) + self.first_rows).flatten()
        self.backend.reorder(self.state, rows, position_ids)

        penalty = self.penalties[length]
        self._complete(ids, scores / penalty, ends & self.is_best, length)
        if settings.hopes_long:
            penalty = self.penalties[-1]
        worst = self.complete_scores.amin(dim=1, keepdim=True).expand_as(self.is_complete)
        worst = worst.masked_fill(~self.is_complete, IMPOSSIBLE)
        self.improvable &= (self.running_scores[:, :1] / penalty > worst).any(dim=1, keepdim=True)
        self.closed.copy_(~self.improvable | self._full())
        self.open_images.copy_((~self.closed).sum())

    def _complete(
        self, ids: torch.Tensor, scores: torch.Tensor, ends: torch.Tensor, length: torch.Tensor
    ) -> None:
        """Let candidates that end compete for the places of complete hypotheses.

        ids [B, candidates, 1 + max_new_tokens], scores float32 and ends bool [B, candidates], length [B, 1].
        """
        scores = scores + self._full() * IMPOSSIBLE
        scores += ~self.improvable * IMPOSSIBLE
        scores += ~ends * IMPOSSIBLE
        scores = torch.cat((self.complete_scores, scores), dim=1)
        best = scores.topk(self.settings.num_beams, dim=-1).indices
        self.complete_scores.copy_(scores.gather(1, best))
        for mine, new in (
            (self.complete_ids, ids),
            (self.complete_lengths, length.expand_as(ends)),
            (self.is_complete, ends),
        ):
            mine.copy_(_pick(torch.cat((mine, new), dim=1), best))

    def _full(self) -> torch.Tensor:
        """bool [B, 1]: images that take no more complete hypotheses, by early stopping."""
        if self.settings.early_stopping is True:
            return self.is_complete.all(dim=1, keepdim=True)
        return torch.zeros_like(self.improvable)

    @property
    def output_ids(self) -> torch.Tensor:
        """int64 [B, 1 + max_new_tokens], the best complete hypotheses: the form of `generate`'s result."""
        return self.complete_ids[:, 0]

    def result(self) -> Generation:
        lengths = self.complete_lengths[:, 0]
        log_probs = self.complete_scores[:, 0] * self.penalties[lengths]
        return make_generation(self.complete_ids[:, 0, 1:], lengths, log_probs / lengths)


def _pick(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """tensor [B, m, ...] at indices [B, k] of its second dimension: [B, k, ...]."""
    if tensor.dim() == 3:
        indices = indices[:, :, None].expand(-1, -1, tensor.shape[2])
    return tensor.gather(1, indices)
