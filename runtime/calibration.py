"""How large the activations of an encoder get on a few lines: the ranges that fp8's scales stand for.

The fused float16 encoder runs on ONNX Runtime's CPU, with the largest magnitude of each tensor that fp8
quantizes as one more output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.images import ImageError, find_images, load_image
from runtime.manifest import sha256

# torch and ONNX Runtime are imported where they are used: build.py asks for `inputs` of every fp8 build.
if TYPE_CHECKING:
    import onnx
    import torch
    from transformers import BaseImageProcessor

    from graph_surgery.checkpoint import ModelSpec

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
NUM_SAMPLES = 16
IMAGES_A_RUN = 4


class CalibrationError(ValueError):
    """Images that cannot be calibrated with; the message names the image or folder and the remedy."""


def calibration_images(paths: Sequence[str] = ()) -> list[Path]:
    """The images of files, folders and globs; by default the first of the bundled samples.

    Raises:
        CalibrationError: one of `paths`, or the samples' folder, names no image that is there.
    """
    images, errors = find_images(paths or [str(SAMPLES)])
    absent = [name for name in images if not Path(name).is_file()]
    reasons = [
        *errors.values(),
        *(f"{name}: no such file; name images or folders of them" for name in absent),
    ]
    if reasons:
        raise CalibrationError(f"--calibration: {'; '.join(reasons)}")
    return [Path(name) for name in (images if paths else images[:NUM_SAMPLES])]


def inputs(images: Sequence[Path]) -> dict[str, Any]:
    """What a manifest says of the images: how many there are, and one hash of them in their order."""
    content = "".join(sha256(image) for image in images)
    return {"images": len(images), "sha256": hashlib.sha256(content.encode()).hexdigest()}


def line_pixels(processor: BaseImageProcessor, images: Sequence[Path]) -> torch.Tensor:
    """uint8 [B, 3, height, width], scaled but not normalised.

    Args:
        processor: the checkpoint's own, see `runtime.recognizer.load_image_processor`.

    Raises:
        ImageError: an image cannot be read.
    """
    loaded = [load_image(path, str(path)) for path in images]
    return processor(loaded, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values


def calibrate(encoder: onnx.ModelProto, spec: ModelSpec, images: Sequence[Path]) -> dict[str, float]:
    """The ranges that `graph_surgery.fp8.quantize_encoder` takes: name -> largest magnitude over all images.

    Args:
        encoder: fused in float16, as `graph_surgery.fp8.quantized_tensors` wants it.
        spec: of its checkpoint, whose processor scales the images.
        images: one or more files.

    Raises:
        SurgeryError: the graph is another one.
        CheckpointError: the checkpoint has no usable processor.
        CalibrationError: an image cannot be read.
    """
    import numpy as np
    import onnxruntime as ort
    from tqdm import tqdm

    from graph_surgery.checkpoint import load_normalization
    from graph_surgery.fp8 import quantized_tensors
    from runtime.recognizer import load_image_processor

    processor = load_image_processor(spec)
    normalization = load_normalization(spec)
    names = quantized_tensors(encoder, spec)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors
    session = ort.InferenceSession(
        _with_magnitudes(encoder, names).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wants_bytes = session.get_inputs()[0].type == "tensor(uint8)"
    outputs = [_magnitude(name) for name in names]
    largest = np.zeros(len(names))
    with tqdm(total=len(images), desc=f"calibrate {spec.name}", unit="image", disable=None) as progress:
        for first in range(0, len(images), IMAGES_A_RUN):
            part = images[first : first + IMAGES_A_RUN]
            try:
                pixels = line_pixels(processor, part)
            except ImageError as error:
                raise CalibrationError(f"--calibration: {error}") from error
            values = pixels if wants_bytes else normalization(pixels).half()
            found = session.run(outputs, {"pixel_values": values.numpy()})
            largest = np.maximum(largest, np.array(found, np.float64))  # NaN stays
            progress.update(len(part))
    return dict(zip(names, largest.tolist(), strict=True))


def _magnitude(name: str) -> str:
    return f"{name}_magnitude"


def _with_magnitudes(encoder: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy whose further outputs are these tensors' largest magnitudes, float32 []: of a few bytes, so that
    the tensors themselves need not be kept."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(encoder)
    for name in names:
        wide, sizes = f"{name}_wide", f"{name}_sizes"
        nodes = [
            onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Abs", [wide], [sizes]),
            onnx.helper.make_node("ReduceMax", [sizes], [_magnitude(name)], keepdims=0),
        ]
        model.graph.node.extend(nodes)
        value = onnx.helper.make_tensor_value_info(_magnitude(name), onnx.TensorProto.FLOAT, [])
        model.graph.output.append(value)
    return model
