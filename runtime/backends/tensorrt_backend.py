"""TensorRT engines behind the backend interface: static buffers, CUDA graphs of encoding and search."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import torch

from graph_surgery.checkpoint import load_normalization, load_spec
from graph_surgery.fused_ops import CROSS_ATTENTION
from runtime.backends.base import Backend, SearchResult, check_bytes, image_rows, normalised
from runtime.decoder_weights import FILE_NAME, DecoderWeightsError, load_decoder
from runtime.device_decoder import DeviceDecoder
from runtime.engine import ALIGNMENT, BoundEngine, Engine, EngineError, capture
from runtime.kernels import optional_kernels
from runtime.manifest import Manifest, ManifestError
from runtime.ranges import stage, staged
from runtime.search import GREEDY, SearchRequest, SearchSettings

T = TypeVar("T")


# Rows that the device decoder works on at a time; it refills those that have ended.
DEVICE_SLOTS = 64
# Lines that it is given at a time: a page. One search of many lines keeps its rows busier than two of fewer.
DEVICE_LINES = 128
# The most images that it decodes by keys and values where heads have 64 elements: what the wide decoder
# takes; and of the chain, whose time grows with every 8 rows. For more it attends to the encoder's states,
# or, where it cannot, leaves them to the step engine.
DEVICE_MOST_WIDE = 16
DEVICE_MOST_CHAIN = 8

# The most images that are encoded and searched in one launch: it saves 60 us, of more images less than 1 %.
MOST_IN_ONE_LAUNCH = 16
MOST_BEAMS = 16  # of the kernel reorder_cache


@dataclass(eq=False)
class Encoding:
    """Encoded images: which of the buffers for states and for cross-attention's keys and values is theirs.

    Attributes:
        images: that the caller sees.
        slot: number of the buffers.
        ready: recorded when they are written.
        has_keys: whether keys and values are among them; the encoder's states always are.
        found: what a search finds that was launched with the encoding, on the host when `ready`.
        request: of that search.
    """

    images: int
    slot: int
    ready: torch.cuda.Event
    has_keys: bool
    found: SearchResult | None = None
    request: SearchRequest | None = None


@dataclass(eq=False)
class State:
    """A batch under way. There is one object for each combination of sizes and buffers.

    Attributes:
        images: that the caller sees.
        beams: rows an image.
        slot: number of the buffers with cross-attention's keys and values.
        engine_images: images that the engines run, at least the profile's minimum.
        length: steps done, the length of the self-attention cache.
    """

    images: int
    beams: int
    slot: int
    engine_images: int
    length: int = 0

    @property
    def rows(self) -> int:
        """Rows that the caller sees."""
        return self.images * self.beams

    @property
    def engine_rows(self) -> int:
        return self.engine_images * self.beams


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

    Encoding has a stream of its own and cross-attention's keys and values have two sets of buffers: the next
    batch is encoded where decoding leaves the GPU idle. Decoding, many short kernels that wait for each
    other, goes first.
    """

    name = "tensorrt"

    def __init__(
        self,
        folder: Path | str,
        cuda_graphs: bool = True,
        overlap: bool = True,
        device_decoder: bool = True,
        engines: Sequence[Engine] | None = None,
        e4m3_cross: bool = False,
    ):
        """
        Args:
            folder: made by build.py.
            cuda_graphs: replay graphs in place of enqueueing engines.
            overlap: encode one batch while another is decoded.
            device_decoder: search with the CUDA decoder, greedily and with beams, where the folder has its
                weights.
            engines: encoder, cross_kv and decoder in place of the folder's own.
            e4m3_cross: round cross-attention's keys and values to e4m3 for greedy searches of the CUDA
                decoder, for as many images as `reads_e4m3`. Other searches are as without.

        Raises:
            EngineError: see `Engine.load`; or e4m3_cross is asked for, and no search here reads e4m3.
        """
        self.encoder, self.cross_kv, self.decoder = engines or (
            Engine.load(folder, name) for name in ("encoder", "cross_kv", "decoder")
        )
        self.manifest = Manifest.read(folder)
        self.spec = load_spec(folder)
        self.device = torch.device("cuda", torch.cuda.current_device())
        # On the default stream TensorRT synchronises at every enqueue: this thread leaves it for good.
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            torch.cuda.set_stream(torch.cuda.Stream(priority=-1))
        self.cuda_graphs = cuda_graphs
        self.fixed_cache = self.manifest.cache == "fixed"
        self.max_batch, self.max_rows = self.encoder.max_batch, self.decoder.max_batch
        self.max_steps = self.manifest.cache_capacity or self.manifest.max_length - 1
        self.encodings = 2 if overlap else 1
        # Below, a step takes as long whatever the number of rows. With a growing cache each size would need
        # graphs of its own for every position.
        self.min_selection = 16 if self.fixed_cache else None
        self._beams_share_images = CROSS_ATTENTION.name in {op.op for op in self.manifest.fused_ops}

        self.normalization = load_normalization(self.spec)
        dtype = self.encoder.dtypes["last_hidden_state"]
        encoder, decoder, images = self.spec.encoder, self.spec.decoder, self.max_batch
        self._heads, self._head_dim = decoder.num_attention_heads, decoder.head_dim
        self._tensors = [
            (layer, kind) for layer in range(decoder.num_hidden_layers) for kind in ("key", "value")
        ]

        self._kernels = optional_kernels()
        self._device_search = None
        if device_decoder and self._kernels is not None:
            self._device_search = DeviceSearch.load(
                self._kernels,
                folder,
                self.manifest,
                self.device,
                self.max_batch,
                self.max_steps,
                e4m3_cross,
            )
        if e4m3_cross and not self.reads_e4m3(1):
            raise EngineError(
                f"{folder}: no search here reads cross-attention's keys and values in e4m3; build it with "
                "--plugins fused and --precision fp16 or fp8 on a Hopper GPU, or leave e4m3_cross out"
            )
        _, _, pixels_shape = self.encoder.profile("pixel_values")
        self._cross_shape = (self._heads, encoder.num_tokens, self._head_dim)
        self._states_shape = (encoder.num_tokens, encoder.hidden_size)
        self._max_lines = self._most_lines(pixels_shape[1:])

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self._pixels = buffer(self._max_lines, *pixels_shape[1:]).to(self.encoder.dtypes["pixel_values"])
        self._hidden = [buffer(self._max_lines, *self._states_shape) for _ in range(self.encodings)]
        self._logits = buffer(self.max_rows, 1, decoder.vocab_size)
        lines = images if self._wants_states(self._max_lines) else self._max_lines
        self._cross = [self._cross_buffers(lines) for _ in range(self.encodings)]
        # Keys and values repeated for every row, where the engine does not share them: made when needed.
        self._repeated: dict[str, torch.Tensor] | None = None
        # Flat, because a growing cache of t tokens is [rows, heads, t, head_dim] without gaps. One memory for
        # all layers: one kernel reorders them.
        cache_size = self.max_rows * self._heads * self.max_steps * self._head_dim
        cache_size = -(-cache_size // ALIGNMENT) * ALIGNMENT
        self._memory = [buffer(len(self._tensors), cache_size) for _ in range(1 if self.fixed_cache else 2)]
        self._caches = [
            {f"{layer}.decoder.{kind}": memory[i] for i, (layer, kind) in enumerate(self._tensors)}
            for memory in self._memory
        ]

        self._encoder_stream = torch.cuda.Stream() if overlap else torch.cuda.current_stream()
        self._next_slot = 0
        self._states: dict[tuple[int, int, int], State] = {}
        self._bound: LeastRecentlyUsed[BoundEngine] = LeastRecentlyUsed(128)
        self._decoders: LeastRecentlyUsed[BoundEngine] = LeastRecentlyUsed(512)
        # With what a graph was captured from, which has to live as long.
        self._graphs: LeastRecentlyUsed[tuple[torch.cuda.CUDAGraph, object]] = LeastRecentlyUsed(512)
        self._results: dict[tuple[int, int, int], SearchResult] = {}
        # Graphs that may run at the same time must not share their memory.
        self._encode_pool = torch.cuda.graph_pool_handle()
        self._step_pool = torch.cuda.graph_pool_handle()

    def _most_lines(self, pixels: Sequence[int]) -> int:
        """The most lines that are encoded for one search.

        More than the engines' largest batch where the device decoder takes them and TensorRT can begin at any
        image's pixels, states, keys and values.
        """
        pixel, state = (self.encoder.dtypes[name].itemsize for name in ("pixel_values", "last_hidden_state"))
        sizes = [math.prod(pixels) * pixel]
        sizes += [math.prod(shape) * state for shape in (self._states_shape, self._cross_shape)]
        divisible = (
            all(size % ALIGNMENT == 0 for size in sizes) and 2 * self.encoder.min_batch <= self.max_batch
        )
        if self._device_search is None or self._device_search.most_images is not None or not divisible:
            return self.max_batch
        return max(self.max_batch, DEVICE_LINES)

    def _wants_states(self, images: int) -> bool:
        """Whether a greedy search of so many images reads the encoder's states, and no keys and values."""
        return self._device_search is not None and self._device_search.wants_states(images)

    def reads_e4m3(self, images: int) -> bool:
        """Whether a greedy search of so many images reads cross-attention's keys and values in e4m3."""
        return self._device_search is not None and self._device_search.reads_e4m3(images)

    def largest_batch(self, beams: int, whole: bool = False) -> int:
        return self._max_lines if whole else super().largest_batch(beams)

    def _cross_buffers(self, rows: int) -> dict[str, torch.Tensor]:
        dtype = self.encoder.dtypes["last_hidden_state"]
        return {
            f"{layer}.encoder.{kind}": torch.zeros(rows, *self._cross_shape, dtype=dtype, device=self.device)
            for layer, kind in self._tensors
        }

    def encode(self, pixel_values: torch.Tensor, then: SearchRequest | None = None) -> Encoding:
        batch = len(pixel_values)
        if batch > self._max_lines:
            self.encoder.check_batch(batch)
        if then is not None and self._becomes_one_graph(batch, then):
            return self._encode_and_search(pixel_values, then)
        return self._encode(pixel_values)

    @staged("encode")
    def _encode(self, pixel_values: torch.Tensor) -> Encoding:
        batch = len(pixel_values)
        # Keys and values that only a search of another kind would read are left to `begin`.
        keys = not self._wants_states(batch)
        encoding = Encoding(batch, self._take_slot(), torch.cuda.Event(), keys)
        rows = max(batch, self.encoder.min_batch)
        # After what made the pixels, and after the decoding that read these buffers last.
        self._encoder_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._encoder_stream):
            if pixel_values.is_cuda:
                pixel_values.record_stream(self._encoder_stream)
            self._pixels[:batch].copy_(self.encoder_input(pixel_values))
            self._run(_engines(keys), rows, encoding.slot)
            encoding.ready.record()
        return encoding

    def _take_slot(self) -> int:
        slot, self._next_slot = self._next_slot, (self._next_slot + 1) % self.encodings
        return slot

    def _becomes_one_graph(self, images: int, request: SearchRequest) -> bool:
        """Whether encoding and the search are launched together."""
        return (
            self.cuda_graphs
            and images <= MOST_IN_ONE_LAUNCH
            and self.searches(request.settings)
            and self._device_search.takes(images)
            and self._device_search.runs_as_a_kernel(images, request.settings)
        )

    @staged("encode and search")
    def _encode_and_search(self, pixel_values: torch.Tensor, request: SearchRequest) -> Encoding:
        """All from pixels to tokens on the host, on the current stream, in one graph from the second time on.

        Launched one after the other, the host's part of encoding and the copies of the results are on the
        way: 60 us and more of batch 1.
        """
        batch = len(pixel_values)
        keys, slot = not self._wants_states(batch), self._take_slot()
        rows = max(batch, self.encoder.min_batch)
        found = self._on_host(batch, slot, request)
        encoding = Encoding(batch, slot, torch.cuda.Event(), keys, found, request)

        def run() -> list[BoundEngine]:
            bound = self._enqueue(_engines(keys), rows, slot)
            result = self._search(batch, slot, request)
            found.memory.copy_(result.memory, non_blocking=True)
            return bound

        # Pixels and the engines' scratch memory are those of what the other stream encodes.
        torch.cuda.current_stream().wait_stream(self._encoder_stream)
        self._pixels[:batch].copy_(self.encoder_input(pixel_values))
        self._replay(("encode and search", batch, slot, request), run, self._encode_pool)
        encoding.ready.record()
        return encoding

    def _on_host(self, images: int, slot: int, request: SearchRequest) -> SearchResult:
        """The memory that such searches leave their results in: its address is part of their graphs."""
        key = (images, request.max_new_tokens, slot)
        if key not in self._results:
            self._results[key] = SearchResult.empty(*key[:2], torch.device("cpu"), pinned=True)
        return self._results[key]

    def _run(self, engines: Sequence[str], rows: int, slot: int) -> None:
        """Run these of encoder and cross_kv for `rows` images, as a CUDA graph from the second time on."""
        pool = self._encode_pool if "encoder" in engines else self._step_pool
        self._replay((*engines, rows, slot), lambda: self._enqueue(engines, rows, slot), pool)

    def _enqueue(self, engines: Sequence[str], rows: int, slot: int) -> list[BoundEngine]:
        """Enqueue these of encoder and cross_kv for `rows` images; returns what was enqueued."""
        enqueued = []
        for piece in self._pieces(rows):
            for name in engines:
                with stage(name, (piece[1] - piece[0], *self._inputs_of(name))):
                    bound = self._bound_engine(name, *piece, slot)
                    bound()
                    enqueued.append(bound)
        return enqueued

    def _replay(self, key: Hashable, run: Callable[[], object], pool) -> None:
        """`run` as the CUDA graph `key`, the first time as it is; the graph keeps what it returns.

        So what `run` allocates once and keeps, as a search does for keys and values of e4m3, is in no graph's
        memory.
        """
        captured = self._graphs.use(key)
        if captured:
            captured[0].replay()
            return
        kept = run()
        if self.cuda_graphs:
            self._graphs.add(key, (capture(run, pool), kept))

    def begin(self, encoding: Encoding, beams: int = 1) -> State:
        torch.cuda.current_stream().wait_event(encoding.ready)
        state = self._state(encoding.images, beams, encoding.slot)
        if state.engine_rows > self.max_rows:
            raise EngineError(
                f"{self.decoder.path}: {state.images} images of {beams} beams are {state.engine_rows} rows, "
                f"above {self.max_rows}, the most it was built for; give smaller batches, or rebuild with a "
                f"larger --num-beams: {self.manifest.command}"
            )
        state.length = 0
        if not encoding.has_keys:
            self._run(("cross_kv",), state.engine_images, state.slot)
            encoding.has_keys = True
        if beams > 1 and not self._beams_share_images:
            if self._repeated is None:
                self._repeated = self._cross_buffers(self.max_rows)
            for name, tensor in self._cross[state.slot].items():
                repeated = self._repeated[name][: state.engine_rows]
                by_image = repeated.view(state.engine_images, beams, *repeated.shape[1:])
                by_image.copy_(tensor[: state.engine_images, None].expand_as(by_image))
        return state

    def encoder_input(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The argument of `encode` as the encoder's engine takes it, on the GPU."""
        pixels = pixel_values.to(self.device, non_blocking=True)  # first: the rest happens there
        dtype = self.encoder.dtypes["pixel_values"]
        if dtype.is_floating_point:
            return normalised(pixels, self.normalization).to(dtype)
        check_bytes(pixels)
        return pixels.contiguous().view(dtype)  # words of four pixels, see fuse.strip_functions

    def step(self, state: State, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        ids = {
            "input_ids": _bindable(input_ids, state.engine_rows),
            "position_ids": _bindable(position_ids, state.engine_rows),
        }
        past = self._past(state)
        decoder = self._decoders.use((state, past))
        if decoder is None:
            bound = self.decoder.bind(ids | self._decoder_tensors(state, past))
            decoder = self._decoders.add((state, past), bound)
        for name, tensor in ids.items():
            decoder.rebind(name, tensor)
        decoder()
        state.length += 1
        return self._logits[: state.rows, 0]

    def reorder(self, state: State, rows: torch.Tensor, position_ids: torch.Tensor) -> None:
        if self.fixed_cache and self._kernels is not None and state.beams <= MOST_BEAMS:
            memory = self._memory[0]
            self._kernels.reorder_cache(
                memory.data_ptr(),
                rows.data_ptr(),
                position_ids.data_ptr(),
                tensor_bytes=memory[0].nbytes,
                tensors=len(memory),
                batch=state.rows,
                beams=state.beams,
                num_heads=self._heads,
                capacity=self.max_steps,
                row_bytes=self._head_dim * memory.element_size(),
                stream=torch.cuda.current_stream().cuda_stream,
            )
            return
        for cache in self._present(state):
            cache[: state.rows] = cache.index_select(0, rows)

    def select(self, state: State, images: torch.Tensor) -> State:
        selected = self._state(len(images), state.beams, state.slot)
        selected.length = state.length
        rows = image_rows(images, state.beams)
        for old, new in zip(self._present(state), self._present(selected), strict=True):
            new[: selected.rows] = old.index_select(0, rows)
        repeated = state.beams > 1 and not self._beams_share_images
        cross, kept = (self._repeated, rows) if repeated else (self._cross[state.slot], images)
        for tensor in cross.values():
            tensor[: len(kept)] = tensor.index_select(0, kept)
        return selected

    def searches(self, settings: SearchSettings) -> bool:
        return self._device_search is not None and self._device_search.searches(settings)

    def search(self, encoding: Encoding, request: SearchRequest) -> SearchResult | None:
        if encoding.request == request:
            encoding.ready.synchronize()
            return encoding.found
        if not self.searches(request.settings) or not self._device_search.takes(encoding.images):
            return None
        torch.cuda.current_stream().wait_event(encoding.ready)
        return self._search(encoding.images, encoding.slot, request)

    def _search(self, images: int, slot: int, request: SearchRequest) -> SearchResult:
        with stage("search", (images, request.settings.num_beams, request.max_new_tokens)):
            return self._device_search(self._hidden[slot], self._cross[slot], images, request)

    def capture(self, state: State, step: Callable[[], None]) -> Callable[[], None]:
        """One CUDA graph a state; with a growing cache, whose shapes change, one a position.

        A graph is captured when it is first needed: the step runs once as it is, which also is the enqueue
        that TensorRT wants before a capture, and is recorded after that for the next time.
        """
        ranged = staged("decode step", (state.rows, 1))
        if not self.cuda_graphs:
            return ranged(step)

        @ranged
        def advance() -> None:
            past = self._past(state)
            captured = self._graphs.use((state, step, past))
            if captured:
                captured[0].replay()
                state.length += 1
            else:
                step()
                state.length -= 1
                graph = capture(step, self._step_pool)
                self._graphs.add((state, step, past), (graph, self._decoders[state, past]))

        return advance

    def _state(self, images: int, beams: int, slot: int) -> State:
        state = State(images, beams, slot, max(images, self.encoder.min_batch))
        return self._states.setdefault((images, beams, slot), state)

    def _past(self, state: State) -> int | None:
        """The length that the decoder's input shapes depend on; None where they are fixed."""
        return None if self.fixed_cache else state.length

    def _pieces(self, rows: int) -> list[tuple[int, int]]:
        """First image and end of each of the engines' batches that `rows` images take."""
        count = -(-rows // self.max_batch)
        edges = [rows * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))

    def _inputs_of(self, name: str) -> Sequence[int]:
        """The shape of an image's inputs of the encoder or cross_kv."""
        return self._pixels.shape[1:] if name == "encoder" else self._states_shape

    def _bound_engine(self, name: str, first: int, end: int, slot: int) -> BoundEngine:
        """The encoder or cross_kv on images `first` to `end` of the buffers `slot`."""
        key = (name, first, end, slot)
        return self._bound.use(key) or self._bound.add(key, self._bind(*key))

    def _bind(self, name: str, first: int, end: int, slot: int) -> BoundEngine:
        hidden = self._hidden[slot][first:end]
        if name == "encoder":
            return self.encoder.bind({"pixel_values": self._pixels[first:end], "last_hidden_state": hidden})
        cross = {f"present.{name}": tensor[first:end] for name, tensor in self._cross[slot].items()}
        return self.cross_kv.bind({"encoder_hidden_states": hidden} | cross)

    def _decoder_tensors(self, state: State, past: int | None) -> dict[str, torch.Tensor]:
        """The decoder's logits, cross-attention keys and values, and its cache before and after the step."""
        if past is None:
            past_cache = present_cache = self._cache_views(state, 0, self.max_steps)
        else:
            past_cache = self._cache_views(state, past % 2, past)
            present_cache = self._cache_views(state, (past + 1) % 2, past + 1)
        cross, rows = self._cross[state.slot], state.engine_images
        if state.beams > 1 and not self._beams_share_images:
            cross, rows = self._repeated, state.engine_rows
        return (
            {"logits": self._logits[: state.engine_rows]}
            | {f"past_key_values.{name}": tensor[:rows] for name, tensor in cross.items()}
            | {f"past_key_values.{name}": tensor for name, tensor in past_cache.items()}
            | {f"present.{name}": tensor for name, tensor in present_cache.items()}
        )

    def _cache_views(self, state: State, number: int, length: int) -> dict[str, torch.Tensor]:
        shape = (state.engine_rows, self._heads, length, self._head_dim)
        flat = self._caches[number].items()
        return {name: tensor[: math.prod(shape)].view(shape) for name, tensor in flat}

    def _present(self, state: State) -> list[torch.Tensor]:
        """The self-attention cache after the last step, [rows, heads, length or capacity, head_dim] each."""
        number, length = (0, self.max_steps) if self.fixed_cache else (state.length % 2, state.length)
        return list(self._cache_views(state, number, length).values())


class DeviceSearch:
    """The CUDA decoder with one folder's weights.

    Its outputs are one set of tensors for each number of images: addresses are part of the decoder's graphs.
    """

    def __init__(
        self, decoder: DeviceDecoder, layers: int, most_by_keys: int | None, e4m3_cross: bool = False
    ):
        """
        Args:
            most_by_keys: images a search by keys and values has at most; None: any number.
            e4m3_cross: round keys and values to e4m3 for greedy searches that read them so.
        """
        self._decoder = decoder
        self._layers = layers
        self._most_by_keys = most_by_keys
        self._e4m3_cross = e4m3_cross
        self._rounded: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        self._results: dict[tuple[int, int], SearchResult] = {}

    @classmethod
    def load(
        cls,
        kernels: ModuleType,
        folder: Path | str,
        manifest: Manifest,
        device: torch.device,
        max_batch: int,
        max_new_tokens: int,
        e4m3_cross: bool = False,
    ) -> DeviceSearch | None:
        """None where the folder has no weights for it, or the GPU or the decoder's sizes are not served.

        Raises EngineError where the weights are damaged.
        """
        if FILE_NAME not in manifest.files:
            return None
        try:
            manifest.check_file(Path(folder), FILE_NAME)
            weights, config = load_decoder(Path(folder), device)
        except (ManifestError, DecoderWeightsError) as error:
            raise EngineError(str(error)) from error
        if kernels.device_decoder_obstacle(config) is not None:
            return None
        decoder = DeviceDecoder(kernels, weights, config, DEVICE_SLOTS, max_new_tokens)
        if config["hidden_size"] == 32 * config["num_heads"]:
            return cls(decoder, config["num_layers"], None, e4m3_cross)
        is_wide = decoder.runs_as_a_kernel(DEVICE_MOST_WIDE, states=False)
        most = DEVICE_MOST_WIDE if is_wide else DEVICE_MOST_CHAIN
        return cls(decoder, config["num_layers"], min(most, max_batch), e4m3_cross)

    @property
    def most_images(self) -> int | None:
        """That it is given at a time; None: any number."""
        return None if self._decoder.attends_to_states else self._most_by_keys

    def searches(self, settings: SearchSettings) -> bool:
        """Whether it has such searches."""
        if settings.num_beams == 1:
            return settings == GREEDY
        return self.most_images is None and self._decoder.searches_beams(settings.num_beams)

    def takes(self, images: int) -> bool:
        """Whether one search of so many images is faster here than step by step."""
        return self.most_images is None or images <= self.most_images

    def runs_as_a_kernel(self, images: int, settings: SearchSettings) -> bool:
        """Whether such a search may become part of a CUDA graph: those in a WHILE node may not."""
        return settings.num_beams == 1 and self._decoder.runs_as_a_kernel(images, self.wants_states(images))

    def wants_states(self, rows: int) -> bool:
        """Whether a search in so many rows reads the encoder's states, and no keys and values."""
        return self._decoder.attends_to_states and rows > self._most_by_keys

    def reads_e4m3(self, images: int) -> bool:
        """Whether a greedy search of so many images reads keys and values in e4m3."""
        by_keys = self.takes(images) and not self.wants_states(images)
        return self._e4m3_cross and by_keys and self._decoder.takes_e4m3(images)

    def __call__(
        self,
        states: torch.Tensor,
        cross: dict[str, torch.Tensor],
        images: int,
        request: SearchRequest,
    ) -> SearchResult:
        """Decode images whose states, keys and values begin these; valid until the next call."""
        settings, size = request.settings, (images, request.max_new_tokens)
        if size not in self._results:
            self._results[size] = SearchResult.empty(*size, states.device)
        result = self._results[size]
        outputs = (result.tokens, result.log_probs, result.lengths)
        if self.wants_states(images * settings.num_beams):
            attended = states
        else:
            attended = tuple(
                [cross[f"{layer}.encoder.{kind}"] for layer in range(self._layers)]
                for kind in ("key", "value")
            )
        if settings.num_beams > 1:
            self._decoder.search_beams(attended, outputs, settings, request.stops)
            return result
        if self.reads_e4m3(images):
            attended = self._in_e4m3(attended, images)
        self._decoder.run(attended, outputs, stop=request.stops)
        return result

    def _in_e4m3(
        self, cross: tuple[list[torch.Tensor], list[torch.Tensor]], images: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Enqueue the rounding of the first `images` lines.

        Args:
            cross: keys and values, a layer's float16 [lines, H, S, d] each, of the same lines in every call.

        Returns:
            float8_e4m3fn [images, H, S, d], at the same addresses in every call; valid until the next.
        """
        if self._rounded is None:
            self._rounded = tuple(
                [torch.empty_like(tensor[: self._most_by_keys], dtype=torch.float8_e4m3fn) for tensor in part]
                for part in cross
            )
        exact, rounded = (
            tuple([tensor[:images] for tensor in part] for part in parts) for parts in (cross, self._rounded)
        )
        self._decoder.round_to_e4m3(exact, rounded)
        return rounded


def _engines(keys: bool) -> Sequence[str]:
    """Those that encode, with or without cross-attention's keys and values."""
    return ("encoder", "cross_kv") if keys else ("encoder",)


def _bindable(ids: torch.Tensor, rows: int) -> torch.Tensor:
    """ids [B, 1] as TensorRT takes them, [rows, 1]: the tensor itself where it can be."""
    if len(ids) < rows:
        return torch.nn.functional.pad(ids, (0, 0, 0, rows - len(ids)))
    aligned = ids.is_contiguous() and ids.data_ptr() % ALIGNMENT == 0
    return ids if aligned else ids.clone(memory_format=torch.contiguous_format)
