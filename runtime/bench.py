#!/usr/bin/env python3
"""Times the parts of recognition, variant against variant, and checks their results in the same run.

    runtime/bench.py                                  end to end on the bundled checkpoint
    python -m runtime.bench encoder --model small --batch 1,8,16,64 --variants stock,fused,torch --json FILE
    nsys profile -t nvtx,cuda --cuda-graph-trace=node runtime/bench.py
    nsys profile -t nvtx,cuda runtime/bench.py --no-cuda-graphs

Under nsys there are NVTX ranges, in the domain "trocr"; without CUDA graphs also TensorRT's own, one a layer:
a graph is replayed without them. `python -m profiling.nsys` makes tables of the recording.

Parts: encoder (pixel values to hidden states), decoder (all decode steps), end_to_end (pixels on the
device to token ids on the host), page (labelled lines, decoded images in memory, to texts), all. Every line
gets the same number of tokens: end of text does not stop the search, except in a page, whose lines end where
their text does. Input is random, except in a page. With --num-beams all but the encoder is beam search.

Every variant gets the same uint8 pixels. The encoder's time begins with them on the device in the form that
the variant's encoder takes, normalised beforehand where that is normalised; end to end begins with uint8
pixels on the device, and includes normalising in every variant that needs it.

Variants:
    stock, fused    the engine folders of build.py; `fused` decodes with the device decoder where that
    serves
                    the GPU and the checkpoint
    fused_steps     the same engines, the decoder's a step at a time
    fused_e4m3      the same engines, cross-attention's keys and values rounded to e4m3 (greedy search only)
    stock_naive     TensorRT from PyTorch's own export of the encoder (profiling/peers.py)
    torch, compile  Hugging Face's model; the same under torch.compile, with a cache of fixed size
    onnxruntime     the fused graphs on a CPU; on a GPU machine the stock graphs on the CUDA provider
    tensorrt_rtx    the stock graphs as engines of TensorRT-RTX; in a process without TensorRT, so ask for
    it alone

With --precision fp8 only the variants of the fused graphs are measured: no other has fp8.

Engines: CUDA events around replays of CUDA graphs. PyTorch on a GPU: CUDA events around calls. CPU: wall
clock.

On a GPU two rates are measured first (profiling/rates.py), and the results held against them: the encoder's
TFLOP/s against those of a large matrix product in the same precision (of_matrix_rate; for fp8 in e4m3, though
attention stays in float16), the time a token against the bytes of a decode step at the bandwidth of a large
copy (of_floor). End to end a token's time includes its share of the encoder's, the floor does not: there
of_floor is the share of the whole time that decoding would take at its floor. Beam search has no floor.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's root in place of runtime/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import nvtx
import onnxruntime as ort
import torch
from tabulate import tabulate
from tqdm import tqdm
from transformers import AttentionInterface, AutoImageProcessor, AutoTokenizer, CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput

from build import PRECISIONS, BuildError, build, default_folder
from graph_surgery.checkpoint import (
    BASE_PRECISION,
    DTYPES,
    CheckpointError,
    EncoderSpec,
    ModelSpec,
    load_model,
    load_normalization,
    load_spec,
)
from graph_surgery.fused_ops import SurgeryError
from profiling.accuracy import LinesError, line_images
from profiling.models import find_model
from profiling.peers import build_naive, naive_engine, naive_folder, rtx_engines
from profiling.rates import Rates, decoder_bytes, measure_rates
from profiling.records import PARTS, VARIANTS, Record, environment, write
from runtime.backends.base import Backend, BackendError
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.tensorrt_backend import TensorRTBackend
from runtime.beam_search import BeamSearch
from runtime.engine import Engine, EngineError, capture
from runtime.generation import Decoder, GreedySearch
from runtime.images import load_image
from runtime.recognizer import Recognizer
from runtime.search import GenerationError, SearchRequest, SearchSettings
from runtime.tensorrt_loader import TensorRTError

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DEFAULT_VARIANTS = "stock,fused,torch" if ON_GPU else "onnxruntime,torch"
DEFAULT_BATCHES = "1,8,16,64" if ON_GPU else "1"
DEFAULT_PRECISION = "fp16" if ON_GPU else "fp32"
PAGE_LINES = 100 if ON_GPU else 8
PEERS = {"compile", "onnxruntime", "stock_naive", "tensorrt_rtx"}  # others' failures are no reason to stop
# Variants that have fp8, without a GPU and with one: on a GPU ONNX Runtime gets the stock graphs.
FP8_VARIANTS = (
    {"fused", "fused_steps", "fused_e4m3", "onnxruntime"},
    {"fused", "fused_steps", "fused_e4m3"},
)
TENSORRT = {"stock", "stock_naive", "fused", "fused_steps", "fused_e4m3"}  # variants that load it
PROFILE = (1, 16, 64)  # minimum, optimum and maximum batch of engines that are built here
COMPILE_MODE = "reduce-overhead"
UNMASKED = "sdpa_unmasked"  # attention of the compiled encoder
REFERENCE_ROWS = 8  # of a batch are held against PyTorch in float32
WARMUPS = 3
MIN_REPEATS, MAX_REPEATS, SECONDS = 10, 100, 0.5  # of one measurement


class Unavailable(Exception):
    """This machine or variant cannot do the measurement; the message says why."""


@dataclass(frozen=True)
class Case:
    """One measurement to make."""

    part: str
    batch: int
    tokens: int | None
    num_beams: int = 1
    lines: int | None = None
    overlap: bool = True


@dataclass(frozen=True)
class Measurement:
    """Times of one batch, in milliseconds, and what was computed.

    output: of the encoder float [B, S, D]; of the decoder and end to end the token ids [B, tokens]; of a page
        nothing.
    """

    times_ms: list[float]
    output: torch.Tensor


def encoder_flops(spec: EncoderSpec) -> float:
    """Floating-point operations of one image in the encoder's products, two a multiply-add.

    A layer of width d over S tokens takes 8 S d^2 (query, key, value, output), 4 S^2 d (attention) and
    4 S d f (feed-forward of width f); the patches take 2 N (3 p^2) d.
    """
    tokens, width = spec.num_tokens, spec.hidden_size
    layer = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * spec.intermediate_size
    patches = tokens - spec.num_special_tokens
    return spec.num_hidden_layers * layer + 2 * patches * 3 * spec.patch_height * spec.patch_width * width


def measure(
    run: Callable[[], None], before: Callable[[], None] = lambda: None, device: torch.device = DEVICE
) -> list[float]:
    """Milliseconds of repeated runs on `device`. `before` prepares each and is not timed."""
    time_once = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    for _ in range(WARMUPS):
        before()
        run()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < MIN_REPEATS or (len(times) < MAX_REPEATS and time.perf_counter() < end):
        before()
        times.append(time_once(run))
    return times


def _time_on_gpu(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _time_on_cpu(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def random_pixels(spec: ModelSpec, batch: int) -> torch.Tensor:
    """uint8 [B, 3, height, width] on the host: the same values for the same batch."""
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, 3, spec.encoder.image_height, spec.encoder.image_width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


class BackendVariant:
    """Engines or ONNX graphs, with this project's greedy search."""

    e4m3_cross = False  # of a page's recognizer

    def __init__(self, backend: Backend, folder: Path):
        self.backend = backend
        self.folder = folder

    def check(self, case: Case) -> None:
        largest = self.backend.max_batch
        if case.part != "encoder":
            whole = self.backend.searches(SearchSettings(case.num_beams))
            largest = self.backend.largest_batch(case.num_beams, whole)
        limits = [("batch", case.batch, largest)]
        if case.tokens is not None:
            limits.append(("tokens", case.tokens, self.backend.max_steps))
        for what, value, limit in limits:
            if limit is not None and value > limit:
                beams = f" with {case.num_beams} beams" if case.num_beams > 1 else ""
                raise Unavailable(f"{self.folder} is built for {what} up to {limit}{beams}")

    def decoder(self, pixels: torch.Tensor, tokens: int, num_beams: int) -> Measurement:
        request = SearchRequest(tokens, SearchSettings(num_beams))
        if self._searches_whole(pixels, request):
            encoding = self.backend.encode(pixels)
            times = measure(lambda: self.backend.search(encoding, replace(request, stops=False)))
            return Measurement(times, self.backend.search(encoding, request).tokens.long())
        search, start, steps = self._search(pixels, tokens, num_beams)
        times = measure(steps, start, self.backend.device)
        return Measurement(times, search.output_ids[:, 1:])

    def end_to_end(self, pixels: torch.Tensor, tokens: int, num_beams: int) -> Measurement:
        pixels = pixels.to(self.backend.device)
        request = SearchRequest(tokens, SearchSettings(num_beams))
        if self._searches_whole(pixels, request):
            return self._whole_search(pixels, request)
        search, start, steps = self._search(pixels, tokens, num_beams)

        def run() -> None:
            start()
            steps()
            search.output_ids.tolist()

        times = measure(run, device=self.backend.device)
        return Measurement(times, search.output_ids[:, 1:])

    def _searches_whole(self, pixels: torch.Tensor, request: SearchRequest) -> bool:
        if not self.backend.searches(request.settings):
            return False
        return self.backend.search(self.backend.encode(pixels), request) is not None

    def _whole_search(self, pixels: torch.Tensor, request: SearchRequest) -> Measurement:
        """Encoding, and the backend's search as a whole; the tokens are those of a search that stops."""

        def run(request: SearchRequest) -> torch.Tensor:
            found = self.backend.search(self.backend.encode(pixels, request), request).on_host().tokens
            found.tolist()
            return found

        to_the_end = replace(request, stops=False)
        times = measure(lambda: run(to_the_end), device=self.backend.device)
        return Measurement(times, run(request).long())

    def page(self, lines: Sequence[np.ndarray], batch: int, num_beams: int, overlap: bool) -> Measurement:
        recognizer = Recognizer(
            self.folder,
            backend=self.backend.name,
            batch_size=batch,
            num_beams=num_beams,
            e4m3_cross=self.e4m3_cross,
        )
        if not overlap:
            recognizer.backend.encodings = 1
        return _measure_page(recognizer.recognize, lines)

    def _search(
        self, pixels: torch.Tensor, tokens: int, num_beams: int
    ) -> tuple[GreedySearch | BeamSearch, Callable, Callable]:
        """A search, a function that puts it at the start of a line, and one that runs all steps."""
        search = Decoder(self.backend, tokens, SearchSettings(num_beams)).search(len(pixels))

        def start() -> None:
            search.state = self.backend.start(pixels, num_beams)
            search.reset()

        start()

        def steps() -> None:
            advance = self.backend.capture(search.state, search.step)
            for _ in range(tokens):
                advance()

        return search, start, steps


class EngineVariant(BackendVariant):
    """The engines of a folder."""

    def __init__(self, folder: Path, cuda_graphs: bool, device_decoder: bool):
        super().__init__(TensorRTBackend(folder, cuda_graphs, device_decoder=device_decoder), folder)
        self.steps_only = not device_decoder and self.backend.manifest.cache == "fixed"

    def check(self, case: Case) -> None:
        if self.steps_only and case.part in ("encoder", "page"):
            # A page is read by a Recognizer, which decodes as `fused` does.
            raise Unavailable(f"the {case.part} is that of `fused`")
        super().check(case)

    def encoder(self, pixels: torch.Tensor) -> Measurement:
        return _measure_encoder(
            self.backend.encoder, self.backend.encoder_input(pixels), self.backend.cuda_graphs
        )


class E4m3Variant(EngineVariant):
    """The engines of a folder, and searches that read cross-attention's keys and values in e4m3."""

    e4m3_cross = True

    def __init__(self, folder: Path, cuda_graphs: bool):
        BackendVariant.__init__(self, TensorRTBackend(folder, cuda_graphs, e4m3_cross=True), folder)
        self.steps_only = False

    def check(self, case: Case) -> None:
        """No measurement that would be one of `fused` under another name."""
        if case.part == "encoder":
            raise Unavailable("the encoder is that of `fused`")
        if case.num_beams > 1:
            raise Unavailable("beam search reads no e4m3: it is that of `fused`")
        super().check(case)
        if not self.backend.reads_e4m3(case.batch):
            raise Unavailable(
                f"a search of {case.batch} lines reads no e4m3 (with heads of 64 those of few lines do): it "
                "is that of `fused`"
            )


class NaiveVariant:
    """TensorRT's engine of the encoder as PyTorch exports Hugging Face's module."""

    def __init__(self, engine: Engine, spec: ModelSpec, cuda_graphs: bool):
        self.engine, self.cuda_graphs = engine, cuda_graphs
        self.normalization = load_normalization(spec)
        torch.cuda.set_stream(torch.cuda.Stream())  # on the default stream TensorRT synchronises

    def check(self, case: Case) -> None:
        if case.part != "encoder":
            raise Unavailable("only the encoder is exported naively: a decoder's cache takes work by hand")
        if case.batch > self.engine.max_batch:
            raise Unavailable(f"{self.engine.path} is built for batch up to {self.engine.max_batch}")

    def encoder(self, pixels: torch.Tensor) -> Measurement:
        pixels = self.normalization(pixels.to(DEVICE)).to(self.engine.dtypes["pixel_values"])
        return _measure_encoder(self.engine, pixels, self.cuda_graphs)


class RtxVariant(EngineVariant):
    """The stock graphs as engines of TensorRT-RTX."""

    def __init__(self, folder: Path, cuda_graphs: bool):
        backend = TensorRTBackend(folder, cuda_graphs, device_decoder=False, engines=rtx_engines(folder))
        BackendVariant.__init__(self, backend, folder)
        self.steps_only = False

    def check(self, case: Case) -> None:
        if case.part == "page":
            raise Unavailable("a page is read by a Recognizer, which has TensorRT's engines")
        super().check(case)


def _measure_encoder(engine: Engine, pixels: torch.Tensor, cuda_graphs: bool) -> Measurement:
    inputs = {"pixel_values": pixels}
    outputs = engine.empty_outputs(inputs)
    bound = engine.bind(inputs | outputs)
    bound()
    run = capture(bound).replay if cuda_graphs else bound
    return Measurement(measure(run), outputs["last_hidden_state"])


class OnnxVariant(BackendVariant):
    """The ONNX graphs of a folder on ONNX Runtime's CPU."""

    def __init__(self, folder: Path):
        spec = load_spec(folder)
        super().__init__(OnnxRuntimeBackend(folder, spec, spec.max_new_tokens), folder)

    def encoder(self, pixels: torch.Tensor) -> Measurement:
        return _measure_session(self.folder, "CPUExecutionProvider", self.backend.encoder_input(pixels))


class OnnxCudaVariant:
    """The stock encoder on ONNX Runtime's CUDA provider; input and output stay on the GPU."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.normalization = load_normalization(load_spec(folder))

    def check(self, case: Case) -> None:
        if case.part != "encoder":
            raise Unavailable("measured for the encoder only: the decode loop has no CUDA provider")

    def encoder(self, pixels: torch.Tensor) -> Measurement:
        pixels = self.normalization(pixels).numpy()
        with_type = ort.InferenceSession(self.folder / "encoder.onnx", providers=["CPUExecutionProvider"])
        is_half = with_type.get_inputs()[0].type == "tensor(float16)"
        return _measure_session(
            self.folder, "CUDAExecutionProvider", pixels.astype(np.float16 if is_half else np.float32)
        )


def _measure_session(folder: Path, provider: str, pixels: np.ndarray) -> Measurement:
    """The folder's encoder on ONNX Runtime, with input and output where the provider computes."""
    session = ort.InferenceSession(folder / "encoder.onnx", providers=[provider])
    device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
    binding = session.io_binding()
    binding.bind_ortvalue_input("pixel_values", ort.OrtValue.ortvalue_from_numpy(pixels, device, 0))
    binding.bind_output("last_hidden_state", device)

    def run() -> None:  # waits for the end
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    times = measure(run, device=torch.device("cpu"))
    return Measurement(times, torch.from_numpy(binding.copy_outputs_to_cpu()[0]))


class TorchVariant:
    """Hugging Face's model and `generate`, with its cache and its fastest attention (sdpa in the encoder)."""

    def __init__(self, spec: ModelSpec, precision: str):
        self.spec, self.precision = spec, precision
        self.settings: dict[str, Any] = {}  # of `generate`
        self.model = load_model(spec, DTYPES[precision]).to(DEVICE)
        self.model.encoder.set_attn_implementation("sdpa")
        self.normalization = load_normalization(spec)

    def check(self, case: Case) -> None:
        pass

    def encoder(self, pixels: torch.Tensor) -> Measurement:
        pixels = self.normalise(pixels)
        hidden: list[torch.Tensor] = []

        def run() -> None:
            hidden[:] = [self.model.encoder(pixel_values=pixels).last_hidden_state]

        times = measure(run)
        return Measurement(times, hidden[0].clone())

    def decoder(self, pixels: torch.Tensor, tokens: int, num_beams: int) -> Measurement:
        hidden = self.model.encoder(pixel_values=self.normalise(pixels)).last_hidden_state

        def decode(stop: bool) -> torch.Tensor:  # `generate` expands what it is given for its beams
            return self.generate(tokens, num_beams, stop, encoder_outputs=BaseModelOutput(hidden))

        return Measurement(measure(lambda: decode(stop=False)), decode(stop=True))

    def end_to_end(self, pixels: torch.Tensor, tokens: int, num_beams: int) -> Measurement:
        pixels = pixels.to(DEVICE)

        def run() -> None:
            self.generate(tokens, num_beams, stop=False, pixel_values=self.normalise(pixels)).tolist()

        found = self.generate(tokens, num_beams, pixel_values=self.normalise(pixels))
        return Measurement(measure(run), found)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels as the model takes them."""
        return self.normalization(pixels.to(DEVICE)).to(self.model.dtype)

    def page(self, lines: Sequence[np.ndarray], batch: int, num_beams: int, overlap: bool) -> Measurement:
        return _measure_page(GeneratePage(self, batch, num_beams), lines)

    def generate(self, tokens: int, num_beams: int = 1, stop: bool = True, **inputs) -> torch.Tensor:
        """Token ids [B, tokens], padded after the end of text; without `stop` there is none."""
        least = 0 if stop else tokens
        settings = {"num_beams": num_beams, "do_sample": False, "use_cache": True, **self.settings}
        ids = self.model.generate(**inputs, **settings, min_new_tokens=least, max_new_tokens=tokens)[:, 1:]
        padding = self.model.generation_config.pad_token_id
        return torch.nn.functional.pad(ids, (0, tokens - ids.shape[1]), value=padding)


class GeneratePage:
    """Hugging Face's own way from images to texts: its processor, `generate` a batch, its tokenizer."""

    def __init__(self, variant: TorchVariant, batch: int, num_beams: int):
        source = variant.spec.source
        self.model, self.batch, self.num_beams = variant.model, batch, num_beams
        self.tokens = variant.spec.max_new_tokens
        self.processor = AutoImageProcessor.from_pretrained(source)
        self.tokenizer = AutoTokenizer.from_pretrained(source)

    def __call__(self, lines: Sequence[np.ndarray]) -> list[str]:
        texts: list[str] = []
        for first in range(0, len(lines), self.batch):
            inputs = self.processor(list(lines[first : first + self.batch]), return_tensors="pt")
            ids = self.model.generate(
                pixel_values=inputs.pixel_values.to(DEVICE, self.model.dtype),
                num_beams=self.num_beams,
                do_sample=False,
                use_cache=True,
                max_new_tokens=self.tokens,
            )
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


def _unmasked_attention(module, query, key, value, attention_mask, **settings):
    return sdpa_attention_forward(module, query, key, value, None, **settings)


class CompileVariant(TorchVariant):
    """Under torch.compile in mode reduce-overhead, every batch size compiled for itself.

    The encoder by us, decode steps by `generate`, which does that on a GPU where its cache has a fixed size.

    The encoder's attention gets no mask. While it is traced, Hugging Face gives it one that masks nothing;
    with a mask PyTorch has no flash attention, and for odd lengths none but products in float32.
    """

    def __init__(self, spec: ModelSpec, precision: str):
        super().__init__(spec, precision)
        AttentionInterface.register(UNMASKED, _unmasked_attention)
        self.model.encoder.set_attn_implementation(UNMASKED)
        self._encode = self.model.encoder.forward
        compilation = CompileConfig(mode=COMPILE_MODE, dynamic=False)
        compilation._compile_all_devices = True  # on a CPU too
        self.settings = {"cache_implementation": "static", "compile_config": compilation}

    def check(self, case: Case) -> None:
        if case.part == "page" or case.num_beams > 1:
            raise Unavailable("measured for batches of one size and greedy search only")

    def encoder(self, pixels: torch.Tensor) -> Measurement:
        self._compile()
        return super().encoder(pixels)

    def decoder(self, pixels: torch.Tensor, tokens: int, num_beams: int) -> Measurement:
        self._compile(searches=True)
        return super().decoder(pixels, tokens, num_beams)

    def end_to_end(self, pixels: torch.Tensor, tokens: int, num_beams: int) -> Measurement:
        self._compile(searches=True)
        return super().end_to_end(pixels, tokens, num_beams)

    def _compile(self, searches: bool = False) -> None:
        torch.compiler.reset()  # else a second batch size is taken for a dynamic one
        encode = torch.compile(self._encode, mode=COMPILE_MODE, dynamic=False)

        def encode_for_search(*pixels: torch.Tensor, **settings) -> BaseModelOutput:
            # A copy: compiled decode steps replay CUDA graphs, which may take the encoder's memory again.
            return BaseModelOutput(encode(*pixels, **settings).last_hidden_state.clone())

        self.model.encoder.forward = encode_for_search if searches else encode
        self.model.__dict__.pop("_compiled_call", None)  # what `generate` has compiled, for another size


class Reference:
    """PyTorch in float32: what the results of every variant are held against."""

    def __init__(self, spec: ModelSpec):
        torch.backends.cudnn.allow_tf32 = False
        self._torch = TorchVariant(spec, "fp32")

    def accuracy(self, case: Case, pixels: torch.Tensor, output: torch.Tensor) -> dict[str, float]:
        """The accuracy fields of a record."""
        rows = self._torch.normalise(pixels[:REFERENCE_ROWS])
        output = output[:REFERENCE_ROWS].to(DEVICE)
        if case.part == "encoder":
            expected = self._torch.model.encoder(pixel_values=rows).last_hidden_state
            return {"rel_error": ((output.float() - expected).abs().max() / expected.abs().max()).item()}
        expected = self._torch.generate(case.tokens, case.num_beams, pixel_values=rows)
        return {"same_tokens": (output == expected).float().mean().item()}


def open_variant(
    name: str, folder: Path, spec: ModelSpec, precision: str, engines: Path, cuda_graphs: bool = True
):
    """Raises Unavailable, or an error whose message says what to do."""
    if precision == "fp8" and name not in FP8_VARIANTS[ON_GPU]:
        raise Unavailable("fp8 is the fused encoder's alone; compare with --precision fp16")
    if name == "torch":
        return TorchVariant(spec, precision)
    if name == "compile":
        return CompileVariant(spec, precision)
    plugins = "none" if name == "stock" else "fused"
    target = engines / default_folder(str(folder), plugins, precision).name
    graphs = engines / default_folder(str(folder), "none", precision).name
    if name == "onnxruntime" and not ON_GPU:
        return OnnxVariant(build(str(folder), plugins, precision, out=target, onnx_only=True))
    if name == "onnxruntime":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise Unavailable(
                f"ONNX Runtime {ort.__version__} has no CUDA provider here; pip install onnxruntime-gpu"
            )
        return OnnxCudaVariant(build(str(folder), "none", precision, out=graphs, onnx_only=True))
    if not ON_GPU:
        raise Unavailable("no NVIDIA GPU can be used here")
    if name == "tensorrt_rtx":
        graphs = graphs.with_name(f"{graphs.name}-rtx")
        try:
            return RtxVariant(
                build(str(folder), "none", precision, PROFILE, graphs, onnx_only=True), cuda_graphs
            )
        except TensorRTError as error:
            raise Unavailable(str(error)) from None
    if name == "stock_naive":
        naive = engines / naive_folder(str(folder), precision).name
        return NaiveVariant(
            naive_engine(build_naive(str(folder), precision, PROFILE, naive), str(folder)), spec, cuda_graphs
        )
    if not target.exists():
        raise Unavailable(
            f"{target} does not exist; build it: python build.py --model {folder} --plugins {plugins} "
            f"--precision {precision} --batch 1,16,64 --out {target}"
        )
    if name == "fused_e4m3":
        try:
            return E4m3Variant(target, cuda_graphs)
        except EngineError as error:
            raise Unavailable(str(error)) from None
    return EngineVariant(target, cuda_graphs, device_decoder=name == "fused")


def _measure_page(read: Callable[[Sequence[np.ndarray]], Any], lines: Sequence[np.ndarray]) -> Measurement:
    return Measurement(measure(lambda: read(lines)), torch.empty(0))


@torch.inference_mode()
def run(
    cases: Sequence[Case],
    variants: Sequence[str],
    folder: Path,
    precision: str,
    engines: Path,
    command: str,
    json: Path | None = None,
    cuda_graphs: bool = True,
) -> tuple[list[Record], list[str]]:
    """Measure every case with every variant.

    The file `json` is written anew after each measurement, so that a run that is stopped leaves what it has;
    beside it (-unavailable.txt), at the end, what could not be measured.

    Returns:
        The records, and a line for every measurement that could not be made, with the reason.
    """
    spec = load_spec(folder)
    here = asdict(environment(command, "tensorrt_rtx" in variants))
    with nvtx.annotate("rates", domain="trocr"):
        rates = measure_rates(precision, {case.part for case in cases})
    reference = Reference(spec)
    records: list[Record] = []
    skipped: list[str] = []
    with tqdm(total=len(cases) * len(variants), unit="measurement", disable=None) as bar:
        for name in variants:
            try:
                variant = open_variant(name, folder, spec, precision, engines, cuda_graphs)
            except Exception as reason:
                if not _can_go_on(name, reason):
                    raise
                skipped.append(f"{name}: {reason}")
                bar.update(len(cases))
                continue
            for case in cases:
                bar.set_description(f"{name} {case.part} {case.batch}")
                try:
                    variant.check(case)
                    with nvtx.annotate(f"{name} {case.part} batch {case.batch}", domain="trocr"):
                        fields = measure_case(variant, case, spec, reference)
                    cross = 1 if name == "fused_e4m3" else None
                    fields |= against_rates(case, fields, spec, precision, rates, cross)
                    records.append(
                        Record(**here, **fields, model=spec.name, precision=precision, variant=name)
                    )
                    if json:
                        write(records, json)
                except Exception as reason:
                    if not _can_go_on(name, reason):
                        raise
                    skipped.append(f"{name} {case.part} batch {case.batch}: {reason}")
                bar.update()
            del variant
            torch.cuda.empty_cache()
    if json and skipped:
        reasons = json.with_name(f"{json.stem}-unavailable.txt")
        reasons.parent.mkdir(parents=True, exist_ok=True)
        reasons.write_text("\n".join(skipped) + "\n", encoding="utf-8")
    return records, skipped


def _can_go_on(variant: str, error: Exception) -> bool:
    """Whether the measurement is left out, with the reason, and the others are made."""
    return isinstance(error, Unavailable) or variant in PEERS


def measure_case(variant, case: Case, spec: ModelSpec, reference: Reference) -> dict[str, Any]:
    """The fields of a record that the measurement itself decides."""
    if case.part == "page":
        try:
            with line_images(most=case.lines) as files:
                lines = [np.array(load_image(file, file.name)) for file in files]
        except LinesError as error:
            raise Unavailable(str(error)) from None
        measurement = variant.page(lines, case.batch, case.num_beams, case.overlap)
        fields = _times(case, measurement.times_ms, len(lines))
        return fields | {"lines": len(lines), "page_s": fields["median_ms"] / 1e3}

    pixels = random_pixels(spec, case.batch)
    if case.part == "encoder":
        measurement = variant.encoder(pixels)
    elif case.part == "decoder":
        measurement = variant.decoder(pixels, case.tokens, case.num_beams)
    else:
        measurement = variant.end_to_end(pixels, case.tokens, case.num_beams)
    fields = _times(case, measurement.times_ms, case.batch)
    if case.part == "encoder":
        fields["images_per_s"] = fields["lines_per_s"]
        fields["tflops"] = encoder_flops(spec.encoder) * fields["lines_per_s"] / 1e12
    else:
        fields["us_per_token"] = 1e3 * fields["median_ms"] / case.tokens
    return fields | reference.accuracy(case, pixels, measurement.output)


def against_rates(
    case: Case,
    fields: Mapping[str, Any],
    spec: ModelSpec,
    precision: str,
    rates: Rates,
    cross_itemsize: int | None = None,
) -> dict[str, float]:
    """The fields of a record that hold its others, `fields`, against what the GPU reaches.

    Empty where there is nothing to hold them against: no rate, a page, beam search. `cross_itemsize`: bytes
    of a number of cross-attention's keys and values, where it is not the precision's.
    """
    if case.part == "encoder" and rates.matrix_tflops:
        fraction = fields["tflops"] / rates.matrix_tflops
        return {"matrix_tflops": rates.matrix_tflops, "of_matrix_rate": fraction}
    if case.part in ("decoder", "end_to_end") and rates.copy_gb_per_s and case.num_beams == 1:
        step = decoder_bytes(
            layers=spec.decoder.num_hidden_layers,
            width=spec.decoder.d_model,
            inner=spec.decoder.decoder_ffn_dim,
            vocabulary=spec.decoder.vocab_size,
            source=spec.encoder.num_tokens,
            lines=case.batch,
            tokens=case.tokens,
            itemsize=DTYPES[BASE_PRECISION[precision]].itemsize,
            cross_itemsize=cross_itemsize,
        )
        floor = step / rates.copy_gb_per_s / 1e3
        fraction = floor / fields["us_per_token"]
        return {"copy_gb_per_s": rates.copy_gb_per_s, "floor_us": floor, "of_floor": fraction}
    return {}


def _times(case: Case, times_ms: Sequence[float], lines: int) -> dict[str, Any]:
    median = statistics.median(times_ms)
    return {
        "part": case.part,
        "batch": case.batch,
        "tokens": case.tokens,
        "num_beams": case.num_beams,
        "median_ms": median,
        "p99_ms": float(np.percentile(times_ms, 99)),
        "lines_per_s": 1e3 * lines / median,
    }


def _table(records: Sequence[Record]) -> str:
    columns = (
        "part",
        "variant",
        "batch",
        "num_beams",
        "tokens",
        "median_ms",
        "p99_ms",
        "lines_per_s",
        "page_s",
    )
    columns += ("us_per_token", "of_floor", "tflops", "of_matrix_rate", "rel_error", "same_tokens")
    rows = [[getattr(record, column) for column in columns] for record in records]
    return tabulate(rows, columns, floatfmt=".4g", missingval="-")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers, such as 1,8,16")
    return numbers


def _variants(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(
            f"no variant {', '.join(unknown)}; choose from {', '.join(VARIANTS)}"
        )
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the parts of recognition, variant against variant.")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, all (default: end_to_end)"
    )
    parser.add_argument("--model", default="bundled", help="bundled, small, base, large (random) or a folder")
    parser.add_argument("--batch", type=_numbers, default=DEFAULT_BATCHES, help="default: %(default)s")
    parser.add_argument("--tokens", type=_numbers, default="20", help="decode steps a line (default: 20)")
    parser.add_argument("--num-beams", type=int, default=1, help="beams (default: 1, greedy)")
    parser.add_argument("--lines", type=int, default=PAGE_LINES, help="lines a page (default: %(default)s)")
    parser.add_argument(
        "--no-overlap",
        dest="overlap",
        action="store_false",
        help="page: encode a batch only after the one before is decoded",
    )
    parser.add_argument("--variants", type=_variants, default=DEFAULT_VARIANTS, help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default=DEFAULT_PRECISION)
    parser.add_argument("--engines", type=Path, default=Path("engines"), help="where build.py's folders are")
    parser.add_argument(
        "--no-cuda-graphs", action="store_true", help="enqueue engines, so that nsys shows their layers"
    )
    parser.add_argument("--json", type=Path, help="write the records to this file")
    options = parser.parse_args(arguments)

    parts = options.parts or ["end_to_end"]
    if unknown := set(parts) - {*PARTS, "all"}:
        parser.error(f"no part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}, all")
    parts = PARTS if "all" in parts else parts
    if "tensorrt_rtx" in options.variants and TENSORRT & set(options.variants):
        parser.error("tensorrt_rtx and TensorRT cannot be in one process: measure it alone")
    cases = [
        Case(
            part,
            batch,
            tokens,
            1 if part == "encoder" else options.num_beams,
            options.lines if part == "page" else None,
            options.overlap,
        )
        for part in parts
        for batch in options.batch
        for tokens in (options.tokens if part in ("decoder", "end_to_end") else [None])
    ]
    command = shlex.join(
        ["python", "-m", "runtime.bench", *(sys.argv[1:] if arguments is None else arguments)]
    )
    try:
        folder = find_model(options.model)
        records, skipped = run(
            cases,
            options.variants,
            folder,
            options.precision,
            options.engines,
            command,
            options.json,
            cuda_graphs=not options.no_cuda_graphs,
        )
    except (BackendError, BuildError, CheckpointError, GenerationError, SurgeryError, TensorRTError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_table(records))
    for line in skipped:
        print(f"not measured: {line}")
    return 0 if records else 2


if __name__ == "__main__":
    sys.exit(main())
