"""What a search needs of a backend: encode images once, then one decoder step at a time.

Torch tensors are the common currency, on `Backend.device`. A CUDA backend works on torch's current stream, so
that the caller's tensor operations and the backend's are ordered without synchronisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from graph_surgery.checkpoint import ModelSpec, Normalization
    from runtime.search import SearchRequest, SearchSettings

Encoding = Any
"""Images that are encoded: what the decoder's cross-attention reads. Each backend has its own kind."""

DecoderState = Any
"""A batch under way: an encoding and the self-attention cache. Each backend has its own kind."""


class BackendError(RuntimeError):
    """A backend cannot be used here; the message says why, and what to do."""


def image_rows(images: torch.Tensor, beams: int) -> torch.Tensor:
    """The rows int64 [n * beams] of these images int64 [n]."""
    return (images[:, None] * beams + torch.arange(beams, device=images.device)).flatten()


@dataclass(frozen=True)
class SearchResult:
    """What `Backend.search` found, in one memory, which one copy brings to the host.

    Attributes:
        memory: int32 [B * (max_new_tokens + 2)]: tokens, log_probs and lengths, one behind the other.
        images: B.
        tokens: int32 [B, max_new_tokens], without the start token, padded after the end of text.
        log_probs: float32 [B], summed over a row's tokens.
        lengths: int32 [B], a row's tokens, end of text included.
    """

    memory: torch.Tensor
    images: int

    @classmethod
    def empty(cls, images: int, max_new_tokens: int, device: torch.device, pinned=False) -> SearchResult:
        size = images * (max_new_tokens + 2)
        return cls(torch.empty(size, dtype=torch.int32, device=device, pin_memory=pinned), images)

    @cached_property
    def tokens(self) -> torch.Tensor:
        return self.memory[: -2 * self.images].view(self.images, -1)

    @cached_property
    def log_probs(self) -> torch.Tensor:
        return self.memory[-2 * self.images : -self.images].view(torch.float32)

    @cached_property
    def lengths(self) -> torch.Tensor:
        return self.memory[-self.images :]

    def on_host(self) -> SearchResult:
        """This, on the host; waits for the search where it is not there already."""
        return SearchResult(self.memory.cpu(), self.images)


def normalised(pixel_values: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """What a graph that wants normalised values gets for the argument of `Backend.encode`."""
    return pixel_values if pixel_values.is_floating_point() else normalization(pixel_values)


def check_bytes(pixel_values: torch.Tensor) -> None:
    """Raise BackendError for pixels that a graph of uint8 pixels cannot take."""
    if pixel_values.dtype != torch.uint8:
        raise BackendError(
            f"pixel_values are {pixel_values.dtype}, and this encoder takes uint8, scaled but not "
            "normalised; give these, or build without patch_embedding in --plugins"
        )


class Backend(ABC):
    """A model ready to run.

    An image takes one row of the decoder in greedy search, and `beams` neighbouring rows in beam search: rows
    b * beams to b * beams + beams - 1 are image b's, and share its encoding.

    Attributes:
        name: as in `--backend`: "torch", "onnxruntime" or "tensorrt".
        device: where the tensors given to and returned by `step` live.
        spec: the model's sizes and token ids.
        max_batch: the most images one batch may have; None where nothing but memory limits it.
        max_rows: the most rows of the decoder; None likewise.
        max_steps: the most decoder steps the self-attention cache has room for; None where it grows.
        encodings: how many encodings may be in use at once: with two, the next batch is encoded while one is
            decoded.
        min_selection: the fewest images that `select` is worth its time for; None where it is not possible.
    """

    name: str
    device: torch.device
    spec: ModelSpec
    max_batch: int | None = None
    max_rows: int | None = None
    max_steps: int | None = None
    encodings: int = 1
    min_selection: int | None = 1

    def largest_batch(self, beams: int, whole: bool = False) -> int | None:
        """The most images a batch with so many beams; 0 where the beams alone are too many, None: any.

        `whole`: of a search as a whole that the backend has (`searches`), else step by step.
        """
        return None if self.max_batch is None else min(self.max_batch, self.max_rows // beams)

    def start(self, pixel_values: torch.Tensor, beams: int = 1) -> DecoderState:
        """Encode a batch and begin its decoding: `encode` and `begin` in one."""
        return self.begin(self.encode(pixel_values), beams)

    @abstractmethod
    def encode(self, pixel_values: torch.Tensor, then: SearchRequest | None = None) -> Encoding:
        """Encode a batch.

        Args:
            pixel_values: uint8 [B, 3, height, width], scaled but not normalised, on any device. The backend
                normalises where its graph wants that; then it also takes floats, as normalised already.
            then: the `search` that comes next, before anything else is encoded: a backend may launch both at
                once.

        Returns:
            What `begin` and `search` take. It is valid until `encodings` more were made. The decoding of one
            that it displaces must have been read by the host before; otherwise nothing is synchronised, and a
            CUDA backend may work on a stream of its own.
        """

    @abstractmethod
    def begin(self, encoding: Encoding, beams: int = 1) -> DecoderState:
        """Begin to decode with an empty self-attention cache, `beams` rows an image.

        Returns:
            The state to pass to `step`. It is valid until the next `begin`: a backend may (and one that
            captures CUDA graphs must) hand out the same buffers again for the same sizes.
        """

    @abstractmethod
    def step(self, state: DecoderState, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Append one token to every row and score its successor.

        Args:
            state: from `begin`; its cache is updated.
            input_ids: int64 [R, 1] on `device`, for R rows.
            position_ids: int64 [R, 1] on `device`, the number of tokens already in each row's cache: 0 for
                the start token. All rows are at the same position where the cache is of the growing kind.

        Returns:
            logits [R, vocab] on `device`, in the model's type, valid until the next `step`. Nothing is
            synchronised.
        """

    @abstractmethod
    def reorder(self, state: DecoderState, rows: torch.Tensor, position_ids: torch.Tensor) -> None:
        """Give every row the self-attention cache of a row of the same image.

        Args:
            state: from `begin`; its cache is updated.
            rows: int64 [R] on `device`: row r goes on from what row `rows[r]` has been.
            position_ids: int64 [R, 1] on `device`, the number of tokens in the cache. Nothing is
                synchronised.
        """

    def select(self, state: DecoderState, images: torch.Tensor) -> DecoderState:
        """Go on with some of the images only, where `min_selection` says that it is possible.

        Args:
            state: from `begin` or `select`; not to be used any more.
            images: int64 on `device`, different images in any order: the new state's image i is the old one's
                image `images[i]`, with all its rows.
        """
        raise NotImplementedError

    def searches(self, settings: SearchSettings) -> bool:
        """Whether the backend has such searches as a whole, and `search` is faster than step by step."""
        return False

    def search(self, encoding: Encoding, request: SearchRequest) -> SearchResult | None:
        """A search as a whole, where the backend has it for these settings and so many images; else None.

        What it finds is valid until the next search.
        """
        return None

    def capture(self, state: DecoderState, step: Callable[[], None]) -> Callable[[], None]:
        """Make a repeatable form of one step of a search over `state`.

        Args:
            state: from `begin` or `select`.
            step: a bound method that calls `Backend.step` and then perhaps `Backend.reorder` once on `state`,
                and otherwise only tensor operations on fixed addresses, without synchronisation: fit for a
                CUDA graph. The same method always does the same with the same state.

        Returns:
            A function called once a token in place of `step`, from the state's next token on. The default is
            `step` itself.
        """
        return step
