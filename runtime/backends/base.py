"""What the greedy loop needs of a backend: encode images once, then one decoder step at a time.

Torch tensors are the common currency, on `Backend.device`. A CUDA backend works on torch's current stream, so
that the caller's tensor operations and the backend's are ordered without synchronisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from graph_surgery.checkpoint import ModelSpec, Normalization

DecoderState = Any
"""A batch under way: cross-attention keys and values, self-attention cache. Each backend has its own kind."""


class BackendError(RuntimeError):
    """A backend cannot be used here; the message says why, and what to do."""


def normalised(pixel_values: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    """What a graph that wants normalised values gets for the argument of `Backend.start`."""
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

    Attributes:
        name: as in `--backend`: "torch", "onnxruntime" or "tensorrt".
        device: where the tensors given to and returned by `step` live.
        spec: the model's sizes and token ids.
        max_batch: the most rows one batch may have; None where nothing but memory limits it.
        max_steps: the most decoder steps the self-attention cache has room for; None where it grows.
    """

    name: str
    device: torch.device
    spec: ModelSpec
    max_batch: int | None = None
    max_steps: int | None = None

    @abstractmethod
    def start(self, pixel_values: torch.Tensor) -> DecoderState:
        """Encode a batch and begin its decoding with an empty self-attention cache.

        Args:
            pixel_values: uint8 [B, 3, height, width], scaled but not normalised, on any device. The backend
                normalises where its graph wants that; then it also takes floats, as normalised already.

        Returns:
            The state to pass to `step`. It is valid until the next `start`: a backend may (and one that
            captures CUDA graphs must) hand out the same buffers again for the same B.
        """

    @abstractmethod
    def step(self, state: DecoderState, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Append one token to every row and score its successor.

        Args:
            state: from `start`; its cache is updated.
            input_ids: int64 [B, 1] on `device`.
            position_ids: int64 [B, 1] on `device`, the number of tokens already in each row's cache: 0 for
                the start token. All rows are at the same position where the cache is of the growing kind.

        Returns:
            logits [B, vocab] on `device`, in the model's type, valid until the next `step`. Nothing is
            synchronised.
        """

    def capture(self, state: DecoderState, step: Callable[[], None]) -> Callable[[], None]:
        """Make a repeatable form of one step of a search over `state`.

        Called once a batch size, with the first state of that size; the result serves the later ones too.

        Args:
            state: from `start`; left as it was found.
            step: calls `Backend.step` once on the current state, and otherwise only tensor operations on
                fixed addresses, without synchronisation: fit for a CUDA graph. It may be run here as a
                warm-up: the search resets its own tensors afterwards.

        Returns:
            A function called once a token in place of `step`, from the first token of a state on. The default
            is `step` itself.
        """
        return step
