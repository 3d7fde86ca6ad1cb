"""Images of text lines -> text: preprocessing, batches, and an error of its own for an image that fails."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor

from graph_surgery.checkpoint import CheckpointError, ModelSpec
from runtime.backends.base import BackendError, Encoding
from runtime.backends.choice import open_backend
from runtime.device_resize import DeviceResize
from runtime.generation import Decoder, new_token_limit
from runtime.images import ImageError, ImageSource, load_image, load_pixels
from runtime.ranges import stage, staged
from runtime.search import GREEDY, SearchSettings
from runtime.tokenizer import load_tokenizer

DEFAULT_BATCH = {"cpu": 8, "cuda": 128}
# A small crop is read in 20 to 150 microseconds, most of them with Python's lock held: one at a time, threads
# would spend more time on handing the lock over.
IMAGES_A_TASK = 16


@dataclass(frozen=True)
class Timing:
    """Where the time went, in milliseconds.

    Attributes:
        preprocess_ms: reading, decoding and (without a GPU) scaling this image, in a thread of its own.
        recognize_ms: scaling (on a GPU), normalising, encoding and decoding the batch that this image was in,
            and what the backend did for the batch before and after it meanwhile.
        batch: images in that batch.
    """

    preprocess_ms: float
    recognize_ms: float
    batch: int


@dataclass(frozen=True)
class Result:
    """One image's text, or the error that took its place.

    Attributes:
        path: the path given; None for images given as objects.
        text: None where there is an error.
        token_ids: what the text was decoded from: without the start token, with the end of text (unless the
            limit cut it off).
        mean_log_prob: mean log-probability of these tokens; 0 is certain.
        error: what is wrong with the image, and the remedy; None where all went well.
        timing: None where there is an error.
    """

    path: str | None
    text: str | None = None
    token_ids: list[int] | None = None
    mean_log_prob: float | None = None
    error: str | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class _Prepared:
    """An image, or why there is none.

    Scaled to the encoder's size it is a tensor uint8 [3, height, width]; where the GPU does that, it is an
    array uint8 [H, W, 3] of any size.
    """

    path: str | None
    pixels: torch.Tensor | np.ndarray | None = None
    error: str | None = None
    preprocess_ms: float = 0.0
    aspect: float = 0.0  # width by height of the image as it was


@dataclass(frozen=True)
class _Encoded:
    """A batch under way.

    Attributes:
        order: of the usable images, by their places in the batch, as they were encoded.
        encoding: None without any.
        begin: when it was begun, in seconds.
    """

    batch: list[_Prepared]
    order: list[int]
    encoding: Encoding
    begin: float


class Recognizer:
    """Reads text lines with one checkpoint on one backend.

    Args:
        model: a checkpoint's folder or hub id, or an engine folder made by build.py.
        backend: "tensorrt", "onnxruntime", "torch", or "auto" for the first of the first two that can run.
        plugins: the fused ops of graphs that are built here: "fused", "none", or names with commas.
        engines: the engine folder, where it is not `model` itself or build.py's default.
        precision: "fp32", "fp16", "bf16" or "fp8"; by default what suits the backend.
        batch_size: images a batch; by default what suits the device.
        max_new_tokens: the most tokens a line; by default the checkpoint's own limit.
        num_beams, length_penalty, no_repeat_ngram_size, early_stopping: see `SearchSettings`; greedy by
            default, whatever the checkpoint's generation_config.json asks for.
        e4m3_cross: round keys and values of cross-attention to 8-bit floats (e4m3): of greedy search with
            TensorRT's engines alone, and there as `TensorRTBackend` has it.

    Attributes:
        spec: the checkpoint's description.
        backend: the backend in use.
        settings: what is searched for.
        backend_choice: its name and, where "auto" chose it, the reason: "onnxruntime (no NVIDIA GPU)".

    Raises:
        CheckpointError, BuildError, SurgeryError, ManifestError, BackendError, GenerationError: something
            cannot be used; the message names the file, the value and the remedy.
    """

    def __init__(
        self,
        model: str | Path,
        backend: str = "auto",
        plugins: str = "fused",
        engines: str | Path | None = None,
        precision: str | None = None,
        batch_size: int | None = None,
        max_new_tokens: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        early_stopping: bool | str = False,
        e4m3_cross: bool = False,
    ):
        self.settings = SearchSettings(num_beams, length_penalty, no_repeat_ngram_size, early_stopping)
        if e4m3_cross and self.settings != GREEDY:
            raise BackendError(
                "e4m3_cross is of greedy search alone, and other settings were asked for "
                f"({self.settings}); leave e4m3_cross out, or these"
            )
        self.backend, self.backend_choice = open_backend(
            model, backend, plugins, engines, precision, max_new_tokens, e4m3_cross
        )
        self.spec = self.backend.spec
        limit = new_token_limit(self.spec, max_new_tokens)
        self._decoder = Decoder(self.backend, limit, self.settings)
        self.batch_size = self._check_batch_size(batch_size)
        self._processor = load_image_processor(self.spec)
        self._resize = DeviceResize.like(self._processor, self.backend.device)
        self._tokenizer = load_tokenizer(self.spec)

    def recognize(self, images: ImageSource | Iterable[ImageSource]) -> list[Result]:
        """Read the text of each image: a list of results in the order of the images.

        Args:
            images: paths, PIL images or uint8 arrays ([H, W], [H, W, 1], [H, W, 3] RGB, [H, W, 4] RGBA).
        """
        return list(self.stream(images))

    def stream(self, images: ImageSource | Iterable[ImageSource]) -> Iterator[Result]:
        """As `recognize`, a result at a time.

        The next batch's images are read and scaled in threads meanwhile. Where the backend can do both at
        once, the next batch is encoded while one is decoded, and the one after it is read.
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            images = [images]
        numbered = enumerate(images, start=1)
        with ThreadPoolExecutor(max_workers=min(4, len(os.sched_getaffinity(0)))) as pool:

            def submit_batch() -> list[Future[list[_Prepared]]]:
                batch = list(islice(numbered, min(self.batch_size, sys.maxsize)))
                tasks = (batch[i : i + IMAGES_A_TASK] for i in range(0, len(batch), IMAGES_A_TASK))
                return [self._submit(pool, task) for task in tasks]

            ahead = self.backend.encodings - 1
            read: deque[list[Future[list[_Prepared]]]] = deque()
            encoded: deque[_Encoded] = deque()
            more = True
            while True:
                while more and len(read) + len(encoded) <= self.backend.encodings:
                    batch = submit_batch()
                    more = bool(batch)
                    read += [batch] if batch else []
                # Ahead only what is at hand: else decoding would wait for images of the next batch.
                at_hand = len(encoded) <= ahead and read and all(future.done() for future in read[0])
                if read and (not encoded or at_hand):
                    batch = [item for future in read.popleft() for item in future.result()]
                    encoded.append(self._encode(batch, alone=not (more or read or encoded)))
                elif encoded:
                    yield from self._decode(encoded.popleft())
                else:
                    return

    def _submit(
        self, pool: ThreadPoolExecutor, numbered: Sequence[tuple[int, ImageSource]]
    ) -> Future[list[_Prepared]]:
        """Files are read in a thread; images in memory need next to nothing where the GPU scales."""
        if not self._resize or any(isinstance(source, str | Path) for _, source in numbered):
            return pool.submit(self._prepare_all, numbered)
        done: Future[list[_Prepared]] = Future()
        done.set_result(self._prepare_all(numbered))
        return done

    def _prepare_all(self, numbered: Sequence[tuple[int, ImageSource]]) -> list[_Prepared]:
        return [self._prepare(number, source) for number, source in numbered]

    @staged("preprocess", (1,))
    def _prepare(self, number: int, source: ImageSource) -> _Prepared:
        """Read one image, and scale it with the checkpoint's own processor unless the GPU does."""
        path = str(source) if isinstance(source, str | Path) else None
        begin = time.perf_counter()
        name = path or f"image {number}"
        try:
            if self._resize:
                pixels = load_pixels(source, name)
                height, width, _ = pixels.shape
            else:
                image = load_image(source, name)
                settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
                pixels = self._processor(image, **settings).pixel_values[0]
                width, height = image.size
        except ImageError as error:
            return _Prepared(path, error=str(error))
        return _Prepared(path, pixels, None, 1e3 * (time.perf_counter() - begin), width / height)

    def _encode(self, batch: list[_Prepared], alone: bool) -> _Encoded:
        """Hand a batch to the encoder; on a GPU nothing waits for it.

        `alone`: there is no other batch to be encoded while this one is decoded.
        """
        begin = time.perf_counter()
        # Longest first: where a search's rows take further lines, those that begin last should end soon.
        order = [place for place, item in enumerate(batch) if item.error is None]
        order.sort(key=lambda place: -batch[place].aspect)
        if not order:
            return _Encoded(batch, order, None, begin)
        # The rest of the processor's work is the backend's, on the whole batch: uint8 travels there in a
        # quarter of the bytes, and normalising takes most of the processor's time on a CPU.
        images = [batch[place].pixels for place in order]
        pixels = self._resize(images) if self._resize else torch.stack(images)
        return _Encoded(batch, order, self._decoder.encode(pixels, alone), begin)

    def _decode(self, encoded: _Encoded) -> Iterator[Result]:
        """The results of a batch, in its order."""
        images = len(encoded.order)
        found = {}
        if images:
            generation = self._decoder.decode(encoded.encoding, images)
            recognize_ms = 1e3 * (time.perf_counter() - encoded.begin)
            with stage("detokenise", (images,)):
                ids = generation.token_ids
                texts = [self._tokenizer.decode(row, skip_special_tokens=True) for row in ids]
            lines = zip(texts, ids, generation.mean_log_probs, strict=True)
            found = dict(zip(encoded.order, lines, strict=True))
        for place, item in enumerate(encoded.batch):
            if item.error is not None:
                yield Result(item.path, error=item.error)
                continue
            text, token_ids, mean_log_prob = found[place]
            yield Result(
                item.path,
                text,
                token_ids,
                mean_log_prob,
                timing=Timing(item.preprocess_ms, recognize_ms, images),
            )

    def _check_batch_size(self, batch_size: int | None) -> int:
        whole = self.backend.searches(self.settings)
        largest = self.backend.largest_batch(self.settings.num_beams, whole)
        if batch_size is None:
            default = DEFAULT_BATCH[self.backend.device.type]
            return default if largest is None else min(default, largest)
        if batch_size < 1:
            raise BackendError(f"batch_size is {batch_size}; give 1 or more")
        if largest is not None and batch_size > largest:
            beams = f" with {self.settings.num_beams} beams" if self.settings.num_beams > 1 else ""
            raise BackendError(
                f"batch_size is {batch_size}, and the engines of {self.spec.source} take {largest}{beams}; "
                "choose a smaller one, or build engines for it: python build.py --batch MIN,OPT,MAX"
                + (" --num-beams N" if beams else "")
            )
        return batch_size


def load_image_processor(spec: ModelSpec):
    """The checkpoint's own image processor.

    Raises:
        CheckpointError: there is none, or it makes images of another size than the encoder's.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(spec.source)
    except Exception as error:  # missing and malformed files end in a variety of exceptions
        raise CheckpointError(
            f"{spec.source}: no usable image processor ({error}); fetch preprocessor_config.json again"
        ) from error

    shape = tuple(processor(Image.new("RGB", (64, 16)), return_tensors="pt").pixel_values.shape[1:])
    expected = (3, spec.encoder.image_height, spec.encoder.image_width)
    if shape != expected:
        raise CheckpointError(
            f"{spec.source / 'preprocessor_config.json'}: makes images of {list(shape)}, config.json asks "
            f"for {list(expected)}; take both files from the same checkpoint "
            "(scripts/interpolate_positions.py if it was trained with interpolate_pos_encoding=True)"
        )
    return processor
