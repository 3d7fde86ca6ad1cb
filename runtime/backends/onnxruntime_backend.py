"""The three ONNX graphs, stock or fused, on ONNX Runtime's CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from tqdm import tqdm

from graph_surgery.checkpoint import ModelSpec, load_normalization
from runtime.backends.base import Backend, BackendError, check_bytes, image_rows, normalised
from runtime.ranges import stage, staged
from runtime.search import SearchRequest

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


@dataclass
class OrtState:
    """The decoder's inputs by name, but for the token: `past_key_values.*` of both attentions.

    They are ONNX Runtime's own tensors, handed from one session to the next without a copy.
    """

    cross: dict[str, ort.OrtValue]
    past: dict[str, ort.OrtValue]
    beams: int


class OnnxRuntimeBackend(Backend):
    """Runs the graphs of a folder.

    Args:
        folder: with encoder.onnx, cross_kv.onnx and decoder.onnx.
        spec: of the checkpoint they were exported from.
        max_new_tokens: the capacity of a fixed cache; a growing one takes any number.

    Raises:
        BackendError: a graph is missing, damaged or of a type that ONNX Runtime has no CPU kernels for.
    """

    name = "onnxruntime"
    device = torch.device("cpu")

    def __init__(self, folder: Path, spec: ModelSpec, max_new_tokens: int):
        self.spec = spec
        files = [folder / f"{name}.onnx" for name in ("encoder", "cross_kv", "decoder")]
        progress = tqdm(files, desc=f"load {folder.name}", unit="graph", delay=2, disable=None)
        self._encoder, self._cross_kv, self._decoder = map(_session, progress)
        self._dtype = NUMPY_TYPES[self._encoder.get_outputs()[0].type]
        self._pixel_type = NUMPY_TYPES[self._encoder.get_inputs()[0].type]
        self._normalization = load_normalization(spec)

        decoder = spec.decoder
        self._cross_kv_outputs = [output.name for output in self._cross_kv.get_outputs()]
        self._decoder_outputs = [output.name for output in self._decoder.get_outputs()]
        cache = self._decoder.get_modelmeta().custom_metadata_map.get("trocr.cache", "growing")
        capacity = max_new_tokens if cache == "fixed" else 0
        self._empty_cache = (decoder.num_attention_heads, capacity, decoder.head_dim)
        self.max_steps = max_new_tokens if cache == "fixed" else None
        # Fused cross-attention takes the keys and values of an image once for all its rows.
        cross = next(value for value in self._decoder.get_inputs() if value.name.endswith("encoder.key"))
        self._beams_share_images = cross.shape[0] == "images"

    @staged("encode")
    def encode(
        self, pixel_values: torch.Tensor, then: SearchRequest | None = None
    ) -> dict[str, ort.OrtValue]:
        pixels = self.encoder_input(pixel_values)
        with stage("encoder", pixels.shape):
            (states,) = self._encoder.run_with_ort_values(None, {"pixel_values": _value(pixels)})
        with stage("cross_kv", states.shape()):
            cross = self._cross_kv.run_with_ort_values(None, {"encoder_hidden_states": states})
        return dict(zip(map(_past_name, self._cross_kv_outputs), cross, strict=True))

    def encoder_input(self, pixel_values: torch.Tensor) -> np.ndarray:
        """The argument of `encode` as the encoder's graph takes it."""
        pixels = pixel_values.cpu()
        if self._pixel_type == np.uint8:
            check_bytes(pixels)
        else:
            pixels = normalised(pixels, self._normalization)
        return np.ascontiguousarray(pixels.numpy().astype(self._pixel_type, copy=False))

    def begin(self, encoding: dict[str, ort.OrtValue], beams: int = 1) -> OrtState:
        images = next(iter(encoding.values())).shape()[0]
        empty = np.zeros((images * beams, *self._empty_cache), self._dtype)
        past = {_past_name(name): _value(empty) for name in self._decoder_outputs[1:]}
        if beams > 1 and not self._beams_share_images:
            encoding = _take(encoding, np.arange(images).repeat(beams))
        return OrtState(encoding, past, beams)

    @staged("decode step")
    def step(self, state: OrtState, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        token = {"input_ids": _value(input_ids.numpy()), "position_ids": _value(position_ids.numpy())}
        logits, *present = self._decoder.run_with_ort_values(None, token | state.cross | state.past)
        state.past = dict(zip(state.past, present, strict=True))
        return torch.from_numpy(logits.numpy())[:, 0]

    def reorder(self, state: OrtState, rows: torch.Tensor, position_ids: torch.Tensor) -> None:
        state.past = _take(state.past, rows.numpy())

    def select(self, state: OrtState, images: torch.Tensor) -> OrtState:
        rows = image_rows(images, state.beams).numpy()
        cross = _take(state.cross, images.numpy() if self._beams_share_images else rows)
        return OrtState(cross, _take(state.past, rows), state.beams)


def _session(file: Path) -> ort.InferenceSession:
    if not file.is_file():
        raise BackendError(f"{file}: missing; build the graphs: python build.py --precision fp32 --onnx-only")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()  # one setting, OMP_NUM_THREADS, for both
    try:
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception class for every status, and no common one
        raise BackendError(
            f"{file}: ONNX Runtime cannot load it ({error}); build it in fp32: "
            "python build.py --precision fp32 --onnx-only"
        ) from error


def _value(array: np.ndarray) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array)


def _take(tensors: dict[str, ort.OrtValue], rows: np.ndarray) -> dict[str, ort.OrtValue]:
    return {name: _value(tensor.numpy()[rows]) for name, tensor in tensors.items()}


def _past_name(present: str) -> str:
    return present.replace("present", "past_key_values")
