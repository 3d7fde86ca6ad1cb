"""NVTX ranges of recognition, in the domain "trocr": the timeline that `nsys profile` shows.

A range's message is its stage and the shape it works on, "decode step [64, 1]"; its payload is the batch.
Under torch.profiler the same ranges are recorded there too. Without a profiler a range costs
3 us at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import nvtx
import torch

DOMAIN = "trocr"
COLOURS = {
    "preprocess": "green",
    "encode": "navy",
    "encoder": "blue",
    "cross_kv": "purple",
    "decode step": "orange",
    "search": "orange",
    "encode and search": "orange",
    "detokenise": "red",
}

F = TypeVar("F", bound=Callable)


def stage(name: str, shape: Sequence[int]) -> AbstractContextManager[None]:
    """A range around one of the stages in COLOURS, working on `shape`, whose first dimension is the batch."""
    message = f"{name} {list(shape)}"
    annotation = nvtx.annotate(message, color=COLOURS[name], domain=DOMAIN, payload=shape[0])
    return _also_in_torch(message, annotation) if _torch_records() else annotation


def staged(name: str, shape: Sequence[int] | None = None) -> Callable[[F], F]:
    """`stage` around every call of a function; the shape is that of its first tensor, where none is given."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            tensors = (arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor))
            with stage(name, shape or next(tensors).shape):
                return function(*args, **kwargs)

        if shape is None:
            return wrapper
        # A decode step at batch 1 is short: 0.2 us for the range in place of 3.
        message = f"{name} {list(shape)}"
        annotate = nvtx.annotate(message, color=COLOURS[name], domain=DOMAIN, payload=shape[0])
        annotated = annotate(function)
        return lambda *args, **kwargs: (wrapper if _torch_records() else annotated)(*args, **kwargs)

    return decorate


def _torch_records() -> bool:
    return torch.autograd.profiler._is_profiler_enabled


@contextmanager
def _also_in_torch(message: str, annotation: AbstractContextManager) -> Iterator[None]:
    with annotation, torch.profiler.record_function(f"{DOMAIN}: {message}"):
        yield
