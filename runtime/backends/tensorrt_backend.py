"""TensorRT engines behind the backend interface: static buffers, CUDA graphs of encoding and search."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import nvtx
import torch

from graph_surgery.checkpoint import load_normalization, load_spec
from runtime.backends.base import Backend, check_bytes, normalised
from runtime.engine import ALIGNMENT, BoundEngine, Engine, capture
from runtime.manifest import Manifest

T = TypeVar("T")


@dataclass
class State:
    """A batch under way.

    Attributes:
        batch: rows that the caller sees.
        rows: rows that the engines run, at least the profile's minimum.
        length: steps done, the length of the self-attention cache.
    """

    batch: int
    rows: int
    length: int = 0


class LeastRecentlyUsed(OrderedDict[Hashable, T]):
    """Keeps the `limit` entries used last: contexts and graphs hold GPU memory."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def use(self, key: Hashable) -> T | None:
        if key in self:
            self.move_to_end(key)
        return self.get(key)

    def add(self, key: Hashable, value: T) -> T:
        self[key] = value
        if len(self) > self.limit:
            self.popitem(last=False)
        return value


class TensorRTBackend(Backend):
    """The engines of one folder.

    All buffers are made once, for the largest batch; a smaller batch uses their beginning. So every address
    is fixed, and a CUDA graph of one batch size stays valid whatever ran in between.

    A fixed cache is read and written in place. A growing one alternates between two sets of buffers: what
    step t writes is what step t + 1 reads.
    """

    name = "tensorrt"

    def __init__(self, folder: Path | str, cuda_graphs: bool = True):
        """
        Raises:
            EngineError: see `Engine.load`.
        """
        self.encoder, self.cross_kv, self.decoder = (
            Engine.load(folder, name) for name in ("encoder", "cross_kv", "decoder")
        )
        self.manifest = Manifest.read(folder)
        self.spec = load_spec(folder)
        self.device = torch.device("cuda", torch.cuda.current_device())
        # On the default stream TensorRT synchronises at every enqueue: this thread leaves it for good.
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            torch.cuda.set_stream(torch.cuda.Stream())
        self.cuda_graphs = cuda_graphs
        self.fixed_cache = self.manifest.cache == "fixed"
        self.max_batch = self.encoder.max_batch
        self.max_steps = self.manifest.cache_capacity or self.manifest.max_length - 1

        self.normalization = load_normalization(self.spec)

        dtype = self.encoder.dtypes["last_hidden_state"]
        encoder, decoder, rows = self.spec.encoder, self.spec.decoder, self.max_batch
        self._heads, self._head_dim = decoder.num_attention_heads, decoder.head_dim

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        _, _, pixels_shape = self.encoder.profile("pixel_values")
        self._pixels = buffer(*pixels_shape).to(self.encoder.dtypes["pixel_values"])
        self._hidden = buffer(rows, encoder.num_tokens, encoder.hidden_size)
        self._logits = buffer(rows, 1, decoder.vocab_size)
        tensors = [(layer, kind) for layer in range(decoder.num_hidden_layers) for kind in ("key", "value")]
        self._cross = {
            f"{layer}.encoder.{kind}": buffer(rows, self._heads, encoder.num_tokens, self._head_dim)
            for layer, kind in tensors
        }
        # Flat, because a growing cache of t tokens is [rows, heads, t, head_dim] without gaps.
        self._caches = [
            {
                f"{layer}.decoder.{kind}": buffer(rows * self._heads * self.max_steps * self._head_dim)
                for layer, kind in tensors
            }
            for _ in range(1 if self.fixed_cache else 2)
        ]

        self._states: dict[int, State] = {}
        self._encoders: LeastRecentlyUsed[tuple[BoundEngine, BoundEngine]] = LeastRecentlyUsed(64)
        self._decoders: LeastRecentlyUsed[BoundEngine] = LeastRecentlyUsed(256)
        # With what a graph was captured from, which has to live as long.
        self._graphs: LeastRecentlyUsed[tuple[torch.cuda.CUDAGraph, object]] = LeastRecentlyUsed(256)
        self._pool = torch.cuda.graph_pool_handle()

    @nvtx.annotate("encode", domain="trocr")
    def start(self, pixel_values: torch.Tensor) -> State:
        batch = len(pixel_values)
        self.encoder.check_batch(batch)
        state = self._states.setdefault(batch, State(batch, max(batch, self.encoder.min_batch)))
        state.length = 0
        self._pixels[:batch].copy_(self.encoder_input(pixel_values))
        captured = self._graphs.use(("encode", state.rows))
        if captured:
            captured[0].replay()
        else:
            self._encode(state.rows)
            if self.cuda_graphs:
                graph = capture(lambda: self._encode(state.rows), self._pool)
                self._graphs.add(("encode", state.rows), (graph, self._encoders[state.rows]))
        return state

    def encoder_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The argument of `start` as the encoder's engine takes it, on the GPU."""
        pixels = pixel_values.to(self.device, non_blocking=True)  # first: the rest happens there
        dtype = self.encoder.dtypes["pixel_values"]
        if dtype.is_floating_point:
            return normalised(pixels, self.normalization).to(dtype)
        check_bytes(pixels)
        return pixels.contiguous().view(dtype)  # words of four pixels, see fuse.strip_functions

    def step(self, state: State, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        ids = {
            "input_ids": _bindable(input_ids, state.rows),
            "position_ids": _bindable(position_ids, state.rows),
        }
        past = self._past(state)
        decoder = self._decoders.use((state.rows, past))
        if decoder is None:
            bound = self.decoder.bind(ids | self._decoder_tensors(state.rows, past))
            decoder = self._decoders.add((state.rows, past), bound)
        for name, tensor in ids.items():
            decoder.rebind(name, tensor)
        decoder()
        state.length += 1
        return self._logits[: state.batch, 0]

    def capture(self, state: State, step: Callable[[], None]) -> Callable[[], None]:
        """One CUDA graph a batch size; with a growing cache, whose shapes change, one a position.

        A graph is captured when it is first needed: the step runs once as it is, which also is the enqueue
        that TensorRT wants before a capture, and is recorded after that for the next time.
        """
        if not self.cuda_graphs:
            return step

        @nvtx.annotate("decode step", domain="trocr")
        def advance() -> None:
            past = self._past(state)
            captured = self._graphs.use((advance, past))
            if captured:
                captured[0].replay()
                state.length += 1
            else:
                step()
                state.length -= 1
                graph = capture(step, self._pool)
                self._graphs.add((advance, past), (graph, self._decoders[state.rows, past]))

        return advance

    def _past(self, state: State) -> int | None:
        """The length that the decoder's input shapes depend on; None where they are fixed."""
        return None if self.fixed_cache else state.length

    def _encode(self, rows: int) -> None:
        bound = self._encoders.use(rows)
        if bound is None:
            hidden = self._hidden[:rows]
            cross = {f"present.{name}": tensor[:rows] for name, tensor in self._cross.items()}
            encoder = self.encoder.bind({"pixel_values": self._pixels[:rows], "last_hidden_state": hidden})
            cross_kv = self.cross_kv.bind({"encoder_hidden_states": hidden} | cross)
            bound = self._encoders.add(rows, (encoder, cross_kv))
        encoder, cross_kv = bound
        with nvtx.annotate("encoder", domain="trocr"):
            encoder()
        with nvtx.annotate("cross_kv", domain="trocr"):
            cross_kv()

    def _decoder_tensors(self, rows: int, past: int | None) -> dict[str, torch.Tensor]:
        """The decoder's logits, cross-attention keys and values, and its cache before and after the step."""
        if past is None:
            past_length, present_length = self.max_steps, self.max_steps
            past_cache = present_cache = self._caches[0]
        else:
            past_length, present_length = past, past + 1
            past_cache, present_cache = self._caches[past % 2], self._caches[present_length % 2]

        def view(flat: torch.Tensor, length: int) -> torch.Tensor:
            shape = (rows, self._heads, length, self._head_dim)
            return flat[: math.prod(shape)].view(shape)

        return (
            {"logits": self._logits[:rows]}
            | {f"past_key_values.{name}": tensor[:rows] for name, tensor in self._cross.items()}
            | {f"past_key_values.{name}": view(flat, past_length) for name, flat in past_cache.items()}
            | {f"present.{name}": view(flat, present_length) for name, flat in present_cache.items()}
        )


def _bindable(ids: torch.Tensor, rows: int) -> torch.Tensor:
    """ids [B, 1] as TensorRT takes them, [rows, 1]: the tensor itself where it can be."""
    if len(ids) < rows:
        return torch.nn.functional.pad(ids, (0, 0, 0, rows - len(ids)))
    aligned = ids.is_contiguous() and ids.data_ptr() % ALIGNMENT == 0
    return ids if aligned else ids.clone(memory_format=torch.contiguous_format)
