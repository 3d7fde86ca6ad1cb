"""Greedy and beam search over any backend, with the semantics of Hugging Face's `generate`."""

from __future__ import annotations

import json

import torch

from graph_surgery.checkpoint import ModelSpec
from runtime.backends.base import Backend, Encoding
from runtime.beam_search import BeamSearch
from runtime.search import (
    GREEDY,
    Generation,
    GenerationError,
    Search,
    SearchRequest,
    SearchSettings,
    ban_repeated_ngrams,
    length_penalties,
    make_generation,
)

# Settings of generation_config.json that change what `generate` chooses, and the value that means "off".
UNSUPPORTED = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def new_token_limit(spec: ModelSpec, max_new_tokens: int | None) -> int:
    """The most tokens to generate a row, end of text included: as given, or else the checkpoint's limit.

    Raises GenerationError for a limit outside 1 to the decoder's number of positions.
    """
    if max_new_tokens is None:
        return spec.max_new_tokens
    positions = spec.decoder.max_position_embeddings
    if not 1 <= max_new_tokens <= positions:
        raise GenerationError(
            f"max_new_tokens is {max_new_tokens}, and {spec.source} has positions for {positions} tokens; "
            f"choose 1 to {positions}"
        )
    return max_new_tokens


def unsupported_settings(spec: ModelSpec, settings: SearchSettings = GREEDY) -> list[str]:
    """The settings of the checkpoint's generation_config.json that a search ignores, as "name=value"."""
    file = spec.source / "generation_config.json"
    asked = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = ["num_beams", "no_repeat_ngram_size"]
    if settings.num_beams > 1:  # the others do nothing in greedy search
        names += ["length_penalty", "early_stopping"]
    used = {name: getattr(settings, name) for name in names} | UNSUPPORTED
    return [
        f"{name}={asked[name]}"
        for name, value in used.items()
        if asked.get(name) is not None and asked[name] != value
    ]


class GreedySearch(Search):
    """Greedy search for one batch size.

    Attributes:
        input_ids: int64 [B, 1], the last token of each row.
        position_ids: int64 [B, 1], its position.
        closed: bool [B, 1], the rows that have ended.
        lengths: int64 [B, 1], tokens generated a row.
        log_probs: float32 [B, 1], their summed log-probability.
        output_ids: int64 [B, 1 + max_new_tokens], the start token first: the form of `generate`'s result.
    """

    def __init__(self, backend: Backend, images: int, max_new_tokens: int, settings: SearchSettings = GREEDY):
        super().__init__(backend, images, max_new_tokens, settings)
        self.input_ids = self._tensor(1)
        self.position_ids = self._tensor(1)
        self.lengths = self._tensor(1)
        self.log_probs = self._tensor(1, dtype=torch.float32)
        self.output_ids = self._tensor(1 + max_new_tokens)

    def reset(self) -> None:
        self.input_ids.fill_(self.start_id)
        self.position_ids.zero_()
        self.closed.fill_(False)
        self.lengths.zero_()
        self.log_probs.zero_()
        self.output_ids.fill_(self.pad_id)
        self.output_ids[:, 0] = self.start_id

    def step(self) -> None:
        logits = self.backend.step(self.state, self.input_ids, self.position_ids).float()  # [B, V]
        normalizer = logits.logsumexp(dim=-1, keepdim=True)
        if self.settings.no_repeat_ngram_size:
            ban_repeated_ngrams(
                logits, self.output_ids, self.position_ids, self.settings.no_repeat_ngram_size
            )
        chosen = logits.argmax(dim=-1, keepdim=True)
        log_prob = logits.gather(1, chosen) - normalizer

        self.lengths += ~self.closed
        self.log_probs += log_prob.masked_fill(self.closed, 0.0)
        self.input_ids.copy_(chosen.masked_fill(self.closed, self.pad_id))
        self.position_ids += 1
        self.output_ids.scatter_(1, self.position_ids, self.input_ids)
        self.closed |= (self.input_ids == self.eos_ids).any(dim=1, keepdim=True)
        self.open_images.copy_((~self.closed).sum())

    def result(self) -> Generation:
        lengths = self.lengths.flatten()
        return make_generation(self.output_ids[:, 1:], lengths, self.log_probs.flatten() / lengths)


class Decoder:
    """Greedy or beam search for batches of any size.

    When at least half of the images are certain, the others go on in a batch of half the size, where the
    backend can do so.

    Raises:
        GenerationError: the backend's cache has no room for `max_new_tokens`, or its engines for `num_beams`;
            or no number holds the penalties of such lengths.
    """

    def __init__(self, backend: Backend, max_new_tokens: int, settings: SearchSettings = GREEDY):
        if backend.max_steps is not None and max_new_tokens > backend.max_steps:
            raise GenerationError(
                f"max_new_tokens is {max_new_tokens}, and the {backend.name} engine has room for "
                f"{backend.max_steps}; choose fewer, or build the engine for more"
            )
        if not backend.searches(settings) and backend.largest_batch(settings.num_beams) == 0:
            raise GenerationError(
                f"num_beams is {settings.num_beams}, and the {backend.name} engine decodes at most "
                f"{backend.max_rows} rows; choose fewer, or build the engine with --num-beams"
            )
        if settings.num_beams > 1:  # in greedy search there are none
            length_penalties(max_new_tokens, settings.length_penalty)
        self.backend = backend
        self.max_new_tokens = max_new_tokens
        self.settings = settings
        self._request = SearchRequest(max_new_tokens, settings)
        self._searches: dict[int, Search] = {}

    def __call__(self, pixel_values: torch.Tensor) -> Generation:
        """Recognise pixel_values [B, 3, height, width], as `Backend.encode` takes them."""
        return self.decode(self.encode(pixel_values, alone=True), len(pixel_values))

    def encode(self, pixel_values: torch.Tensor, alone: bool) -> Encoding:
        """Encode a batch for `decode`; `alone`: nothing else is encoded before it is decoded."""
        return self.backend.encode(pixel_values, self._request if alone else None)

    @torch.inference_mode()
    def decode(self, encoding: Encoding, images: int) -> Generation:
        """Recognise what `Backend.encode` made of so many images."""
        found = self.backend.search(encoding, self._request)
        if found is not None:
            found = found.on_host()
            return make_generation(found.tokens, found.lengths, found.log_probs / found.lengths)
        search = self.search(images)
        search.state = self.backend.begin(encoding, self.settings.num_beams)
        search.reset()
        self._run(search, 0)
        return search.result()

    def search(self, images: int) -> Search:
        """The search for so many images, always the same one."""
        if images not in self._searches:
            kind = GreedySearch if self.settings.num_beams == 1 else BeamSearch
            self._searches[images] = kind(self.backend, images, self.max_new_tokens, self.settings)
        return self._searches[images]

    def _run(self, search: Search, first_step: int) -> None:
        fewest = self.backend.min_selection
        half = search.images // 2
        advance = self.backend.capture(search.state, search.step)
        for step in range(first_step, self.max_new_tokens):
            advance()
            open_images = search.poll(step - first_step)
            if open_images == 0:
                break
            if fewest is not None and half >= fewest and open_images is not None and open_images <= half:
                images = search.closed.flatten().byte().argsort(stable=True)[:half]  # the open ones first
                smaller = self.search(half)
                smaller.take(search, images)
                smaller.state = self.backend.select(search.state, images)
                self._run(smaller, step + 1)
                smaller.put_back(search, images)
                break
