"""Accuracy tensor by tensor: how far each layer's output is from PyTorch in float32, on real lines.

    python -m profiling.tensors --precision fp32,fp16,bf16,fp8 --variants stock,fused,torch
    python -m profiling.tensors --backend tensorrt --model DIR --out DIR

Compared are every encoder layer's output, the encoder's final states, the cross-attention keys and values,
every decoder layer's output (over all steps) and the logits of each step. All variants are given the tokens
that PyTorch in float32 chooses, so that one different token does not change what follows.

ONNX Runtime gets the graphs with these tensors as further outputs; so does TensorRT, as engines that are
built for this and thrown away: an output in the middle keeps TensorRT from fusing across it, so the engines
that are measured for speed may round in fewer places than these.

An element's relative error is its absolute error by the reference's size, though at least by the root mean
square of the reference's tensor: values near zero would otherwise decide everything.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from tabulate import tabulate

from build import CACHE_MULTIPLE, GRAPHS, PRECISIONS, BuildError, build, build_engines
from graph_surgery.checkpoint import (
    BASE_PRECISION,
    DTYPES,
    CheckpointError,
    ModelSpec,
    load_model,
    load_normalization,
    load_spec,
)
from graph_surgery.fused_ops import DOMAIN, SurgeryError
from profiling.accuracy import LINES, LinesError, line_images
from profiling.models import find_model
from profiling.records import environment, write_text
from runtime.backends.base import BackendError
from runtime.calibration import line_pixels
from runtime.gpu import FP8_COMPUTE_CAPABILITY, current_gpu
from runtime.images import ImageError
from runtime.recognizer import load_image_processor
from runtime.tensorrt_loader import TensorRTError, load_tensorrt

PLUGINS = {"stock": "none", "fused": "fused"}
VARIANTS = (*PLUGINS, "torch")
# What a model's layer i writes, in the stock graphs and in the fused ones.
LAYER_OUTPUT = {
    "encoder": "/layers.{}/Add_1_output_0",
    "decoder": "/layers.{}/final_layer_norm/LayerNormalization_output_0",
}
FILES = "tensors.json", "tensors.md"

Tensors = dict[str, torch.Tensor]


class TensorsError(RuntimeError):
    """What was asked for cannot be compared; the message names the value and the remedy."""


class Unavailable(RuntimeError):
    """This backend does not run this precision; the message says why."""


@dataclass(frozen=True)
class Spread:
    """Of the errors of one tensor's elements."""

    maximum: float
    mean: float
    median: float
    p99: float


@dataclass(frozen=True)
class Error:
    """One tensor of one variant against PyTorch in float32."""

    variant: str
    precision: str
    tensor: str
    absolute: Spread
    relative: Spread


def compare(found: torch.Tensor, expected: torch.Tensor) -> tuple[Spread, Spread]:
    """The spreads of absolute and relative errors; NaN and infinity in `found` stay what they are."""
    found, expected = (tensor.detach().cpu().double().numpy() for tensor in (found, expected))
    if found.shape != expected.shape:
        raise TensorsError(f"shapes {list(found.shape)} and {list(expected.shape)} cannot be compared")
    absolute = np.abs(found - expected)
    size = np.maximum(np.abs(expected), np.sqrt(np.mean(expected**2)))
    relative = np.divide(absolute, size, out=absolute.copy(), where=size > 0)
    return _spread(absolute), _spread(relative)


def _spread(errors: np.ndarray) -> Spread:
    median, p99 = np.percentile(errors, (50, 99))
    return Spread(float(errors.max()), float(errors.mean()), float(median), float(p99))


# --- the same computation by PyTorch, ONNX Runtime and TensorRT ---


def torch_tensors(spec: ModelSpec, precision: str, pixels: torch.Tensor, tokens: torch.Tensor) -> Tensors:
    """The named tensors of Hugging Face's model.

    Args:
        pixels: uint8 [B, 3, height, width], scaled but not normalised.
        tokens: int64 [B, steps], the decoder's inputs.
    """
    model = load_model(spec, DTYPES[precision]).to(pixels.device)
    normalised = load_normalization(spec)(pixels).to(model.dtype)
    with torch.inference_mode():
        encoded = model.encoder(pixel_values=normalised, output_hidden_states=True)
        states = encoded.last_hidden_state
        tensors = {f"encoder layer {i}": layer for i, layer in enumerate(encoded.hidden_states[1:])}
        tensors["encoder states"] = states
        if hasattr(model, "enc_to_dec_proj"):
            states = model.enc_to_dec_proj(states)
        # Without a cache: all steps at once.
        decoded = model.decoder(
            input_ids=tokens,
            encoder_hidden_states=states,
            use_cache=True,
            output_hidden_states=True,
        )
    cache = decoded.past_key_values.cross_attention_cache
    for i, layer in enumerate(cache.layers):
        tensors |= {f"cross key {i}": layer.keys, f"cross value {i}": layer.values}
    tensors |= {f"decoder layer {i}": layer for i, layer in enumerate(decoded.hidden_states[1:])}
    tensors |= {f"logits, step {step}": decoded.logits[:, step] for step in range(tokens.shape[1])}
    return tensors


def graph_tensors(runner: Runner, pixels: torch.Tensor, tokens: torch.Tensor) -> Tensors:
    """The same tensors of three graphs, step by step."""
    encoded = runner("encoder", {"pixel_values": runner.encoder_input(pixels)})
    tensors = {f"encoder layer {i}": encoded[name] for i, name in enumerate(runner.layers["encoder"])}
    tensors["encoder states"] = encoded["last_hidden_state"]
    cross = runner("cross_kv", {"encoder_hidden_states": encoded["last_hidden_state"]})
    past = {name.replace("present", "past_key_values"): tensor for name, tensor in cross.items()}
    for i in range(len(cross) // 2):
        for kind in ("key", "value"):
            tensors[f"cross {kind} {i}"] = cross[f"present.{i}.encoder.{kind}"]

    layers: list[list[torch.Tensor]] = [[] for _ in runner.layers["decoder"]]
    past |= runner.empty_cache(len(pixels))
    logits = {}
    for step in range(tokens.shape[1]):
        ids = {"input_ids": tokens[:, step : step + 1].contiguous()}
        ids["position_ids"] = torch.full_like(ids["input_ids"], step)
        output = runner("decoder", ids | past)
        for name, found in zip(runner.layers["decoder"], layers, strict=True):
            found.append(output[name].clone())
        logits[f"logits, step {step}"] = output["logits"][:, 0].clone()
        present = {name: tensor for name, tensor in output.items() if name.startswith("present.")}
        past |= {name.replace("present", "past_key_values"): tensor for name, tensor in present.items()}
    tensors |= {f"decoder layer {i}": torch.cat(found, dim=1) for i, found in enumerate(layers)}
    return tensors | logits


class Runner:
    """The graphs of a folder, with every layer's output among the graphs' outputs.

    Attributes:
        layers: graph -> the names of its layers' outputs.
        graphs: the extended graphs.
    """

    def __init__(self, folder: Path, spec: ModelSpec, precision: str, steps: int):
        self.spec, self.dtype, self.steps = spec, DTYPES[BASE_PRECISION[precision]], steps
        self.graphs = {name: onnx.load(folder / f"{name}.onnx") for name in GRAPHS}
        counts = {"encoder": spec.encoder.num_hidden_layers, "decoder": spec.decoder.num_hidden_layers}
        self.layers = {
            graph: [LAYER_OUTPUT[graph].format(i) for i in range(count)] for graph, count in counts.items()
        }
        for graph, names in self.layers.items():
            _add_outputs(self.graphs[graph], names, folder / f"{graph}.onnx")
        metadata = {entry.key: entry.value for entry in self.graphs["decoder"].metadata_props}
        self.fixed_cache = metadata.get("trocr.cache") == "fixed"
        self.capacity = -(-steps // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self._normalization = load_normalization(spec)

    def encoder_input(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 pixels as the encoder's graph takes them."""
        wanted = self.graphs["encoder"].graph.input[0].type.tensor_type.elem_type
        return pixels if wanted == onnx.TensorProto.UINT8 else self._normalization(pixels)

    def empty_cache(self, batch: int) -> Tensors:
        """Of self-attention, before the first step."""
        decoder = self.spec.decoder
        shape = (batch, decoder.num_attention_heads, self.capacity, decoder.head_dim)
        length = self.capacity if self.fixed_cache else 0
        # A growing cache is an empty part of real memory: TensorRT takes no null address.
        return {
            f"past_key_values.{i}.decoder.{kind}": torch.zeros(shape, dtype=self.dtype)[:, :, :length]
            for i in range(decoder.num_hidden_layers)
            for kind in ("key", "value")
        }

    def __call__(self, graph: str, inputs: Tensors) -> Tensors:
        raise NotImplementedError


def _add_outputs(model: onnx.ModelProto, names: Sequence[str], file: Path) -> None:
    written = {output for node in model.graph.node for output in node.output}
    element_type = model.graph.output[0].type.tensor_type.elem_type
    for name in names:
        if name not in written:
            raise TensorsError(
                f"{file}: no tensor {name}; export the checkpoint again: python build.py --force"
            )
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, element_type, None))


class OnnxRuntimeRunner(Runner):
    """On ONNX Runtime's CPU."""

    def __init__(self, folder: Path, spec: ModelSpec, precision: str, steps: int):
        import onnxruntime as ort

        if precision == "bf16":
            raise Unavailable("ONNX Runtime's CPU has no bfloat16 kernels")
        super().__init__(folder, spec, precision, steps)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors
        self._sessions = {
            name: ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
            for name, graph in self.graphs.items()
        }

    def __call__(self, graph: str, inputs: Tensors) -> Tensors:
        session = self._sessions[graph]
        feeds = {name: self._typed(tensor).numpy() for name, tensor in inputs.items()}
        names = [output.name for output in session.get_outputs()]
        return {
            name: torch.from_numpy(array) for name, array in zip(names, session.run(None, feeds), strict=True)
        }

    def _typed(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


class TensorRTRunner(Runner):
    """On TensorRT: engines for this batch and these steps, thrown away afterwards."""

    def __init__(
        self, folder: Path, spec: ModelSpec, precision: str, steps: int, batch: int, timing_cache: Path
    ):
        from runtime.engine import Engine

        super().__init__(folder, spec, precision, steps)
        trt = load_tensorrt()
        sizes = dict.fromkeys(("batch", "images"), (batch,) * 3) | {"capacity": (self.capacity,) * 3}
        sizes["past_length"] = (0, steps // 2, max(1, steps - 1))
        fused = {
            node.op_type
            for graph in self.graphs.values()
            for node in graph.graph.node
            if node.domain == DOMAIN
        }
        with tempfile.TemporaryDirectory() as scratch:
            build_engines(trt, self.graphs, Path(scratch), sizes, 1, sorted(fused), timing_cache)
            self._engines = {}
            for name in GRAPHS:
                file = Path(scratch) / f"{name}.engine"
                self._engines[name] = Engine(trt, file.read_bytes(), file, "python -m profiling.tensors")

    def empty_cache(self, batch: int) -> Tensors:
        return {
            name: tensor.cuda() if tensor.numel() else self._empty(tensor)
            for name, tensor in super().empty_cache(batch).items()
        }

    @staticmethod
    def _empty(tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = tensor.shape
        return torch.zeros((batch, heads, 1, width), dtype=tensor.dtype, device="cuda")[:, :, :0]

    def __call__(self, graph: str, inputs: Tensors) -> Tensors:
        engine = self._engines[graph]
        with torch.cuda.stream(torch.cuda.Stream()):
            typed = {name: self._typed(tensor.cuda(), engine.dtypes[name]) for name, tensor in inputs.items()}
            outputs = engine.empty_outputs(typed)
            if graph == "decoder" and self.fixed_cache:  # read and written in place
                in_place = {name: name.replace("present", "past_key_values") for name in outputs}
                outputs |= {name: typed[past] for name, past in in_place.items() if past in typed}
            engine.bind(typed | outputs)()
            torch.cuda.synchronize()
        return outputs

    @staticmethod
    def _typed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # uint8 pixels are words of four to TensorRT, see fuse.strip_functions.
        return tensor.contiguous().view(dtype) if tensor.dtype == torch.uint8 else tensor.to(dtype)


# --- all variants ---


def greedy_tokens(spec: ModelSpec, pixels: torch.Tensor, steps: int) -> torch.Tensor:
    """The decoder's inputs int64 [B, steps]: the start token, and what PyTorch in float32 chooses."""
    model = load_model(spec, torch.float32).to(pixels.device)
    pixels = load_normalization(spec)(pixels)
    ids = model.generate(pixel_values=pixels, num_beams=1, do_sample=False, max_new_tokens=steps)[:, :steps]
    padding = model.generation_config.pad_token_id
    return torch.nn.functional.pad(ids, (0, steps - ids.shape[1]), value=padding)


def errors(
    model: Path,
    variants: Sequence[str],
    precisions: Sequence[str],
    backend: str,
    images: Sequence[Path],
    steps: int,
    engines: Path,
) -> Iterator[Error | str]:
    """Every tensor's error, or a line that says why a variant has none.

    Args:
        model: a checkpoint's folder with trained weights: the errors of random ones say little.
        backend: of stock and fused: "onnxruntime" or "tensorrt".
        steps: of the decoder.
        engines: where the graphs are built.
    """
    spec = load_spec(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    pixels = line_pixels(load_image_processor(spec), images).to(device)
    tokens = greedy_tokens(spec, pixels, steps)
    expected = torch_tensors(spec, "fp32", pixels, tokens)
    for precision in precisions:
        for variant in variants:
            try:
                _check_fp8(precision, variant, backend)
                if variant == "torch":
                    found = torch_tensors(spec, precision, pixels, tokens)
                else:
                    out = engines / f"{spec.name}-{precision}-{variant}"
                    folder = build(str(model), PLUGINS[variant], precision, out=out, onnx_only=True)
                    runner = _open(backend, folder, spec, precision, steps, len(images), engines)
                    inputs = (pixels, tokens) if backend == "tensorrt" else (pixels.cpu(), tokens.cpu())
                    found = graph_tensors(runner, *inputs)
                    del runner
            except Unavailable as reason:
                yield f"{variant} {precision}: {reason}"
                continue
            for name, tensor in expected.items():
                yield Error(variant, precision, name, *compare(found[name], tensor))


def _check_fp8(precision: str, variant: str, backend: str) -> None:
    """Raise Unavailable for fp8 where it is not."""
    if precision != "fp8":
        return
    if variant != "fused":
        raise Unavailable("fp8 is the fused encoder's alone")
    if backend == "tensorrt" and not current_gpu().has_fp8:
        raise Unavailable(f"fp8 is for compute capability {FP8_COMPUTE_CAPABILITY}")


def _open(
    backend: str, folder: Path, spec: ModelSpec, precision: str, steps: int, batch: int, engines: Path
) -> Runner:
    if backend == "tensorrt":
        return TensorRTRunner(folder, spec, precision, steps, batch, engines / "timing.cache")
    return OnnxRuntimeRunner(folder, spec, precision, steps)


def markdown(found: Sequence[Error], missing: Sequence[str], what: Mapping[str, Any]) -> str:
    """For every variant and precision a table of all tensors, after one of the worst."""
    text = ["# Accuracy tensor by tensor", ""]
    text += [f"{what['model']} on {what['lines']} lines, {what['steps']} decode steps, against PyTorch fp32."]
    text += [f"Backend {what['backend']}; {what['gpu'] or 'no GPU'}, TensorRT {what['tensorrt'] or '-'}, "]
    text += [f"commit {what['commit']}, {what['date']}. `{what['command']}`", ""]
    groups: dict[tuple[str, str], list[Error]] = {}
    for error in found:
        groups.setdefault((error.precision, error.variant), []).append(error)
    header = ["precision", "variant", "tensor", "absolute: max", "mean", "median", "p99"]
    header += ["relative: max", "mean", "median", "p99"]
    worst = [max(group, key=lambda error: error.relative.maximum) for group in groups.values()]
    text += ["## The worst tensor of each", "", _table(worst, header), ""]
    text += [f"Not measured: {line}." for line in missing] + [""] * bool(missing)
    for (precision, variant), group in groups.items():
        text += [f"## {precision}, {variant}", "", _table(group, header), ""]
    return "\n".join(text)


def _table(found: Sequence[Error], header: Sequence[str]) -> str:
    rows = []
    for error in found:
        numbers = [f"{n:.2e}" for spread in (error.absolute, error.relative) for n in asdict(spread).values()]
        rows.append([error.precision, error.variant, error.tensor, *numbers])
    align = ["left"] * 3 + ["right"] * 8
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)


def main(arguments: Sequence[str] | None = None) -> int:
    def choice(allowed: Sequence[str]):
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in allowed]:
                raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; choose from {', '.join(allowed)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description="Compare every layer's output with PyTorch in float32.")
    parser.add_argument("--model", default="bundled", help="bundled or a checkpoint's folder")
    parser.add_argument("--precision", type=choice(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--variants", type=choice(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--backend", choices=("onnxruntime", "tensorrt"), default="onnxruntime")
    parser.add_argument("--lines", type=Path, default=LINES, help="archive of lines (default: %(default)s)")
    parser.add_argument("--most", type=int, default=8, help="lines to read (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps (default: %(default)s)")
    parser.add_argument("--engines", type=Path, default=Path("build/tensors"), help="folder for the graphs")
    parser.add_argument(
        "--out", type=Path, default=Path("build/tensors"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.most < 1:
        parser.error("--steps must be at least 2, and --most at least 1")
    command = shlex.join(["python", "-m", "profiling.tensors", *(arguments or sys.argv[1:])])
    unusable = (
        BackendError,
        BuildError,
        CheckpointError,
        ImageError,
        LinesError,
        SurgeryError,
        TensorRTError,
    )
    found: list[Error] = []
    missing: list[str] = []
    try:
        if options.backend == "tensorrt" and not torch.cuda.is_available():
            raise TensorsError("no NVIDIA GPU can be used here; --backend onnxruntime needs none")
        model = find_model(options.model)
        with line_images(options.lines, options.most) as images:
            results = errors(
                model,
                options.variants,
                options.precision,
                options.backend,
                images,
                options.steps,
                options.engines,
            )
            for result in results:
                (missing if isinstance(result, str) else found).append(result)
            lines = len(images)
    except (TensorsError, *unusable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    what = {
        "model": load_spec(model).name,
        "lines": lines,
        "steps": options.steps,
        "backend": options.backend,
    }
    what |= asdict(environment(command))
    content = what | {"not_measured": missing, "errors": [asdict(error) for error in found]}
    text = markdown(found, missing, what)
    write_text(options.out / FILES[0], json.dumps(content, indent=1) + "\n")
    write_text(options.out / FILES[1], text)
    print(text.partition("\n## ")[0])
    print(text.partition("## The worst tensor of each\n\n")[2].partition("\n\n## ")[0])
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
