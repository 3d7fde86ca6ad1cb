"""Reading a TrOCR checkpoint: its description (`ModelSpec`) and its PyTorch model.

A checkpoint is a folder in Hugging Face's format, or the id of one on the Hugging Face hub.
`load_spec` reads only the JSON files, so that it also works on an engine folder, which has no weights;
`load_model` reads the weights.
"""

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoImageProcessor,
    GenerationConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.utils import logging as transformers_logging

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What model and graphs are in for each `--precision`. fp8 is an affair of the encoder's graph (fp8.py).
BASE_PRECISION = {precision: precision for precision in DTYPES} | {"fp8": "fp16"}

# Everything but the weights: what an engine folder takes along to read images and to write text.
PROCESSOR_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
)
# In the order in which they are taken: one file, or the index of several. Pickled weights are read by
# torch.load(weights_only=True), which runs no code of the file.
WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json")

ACTIVATIONS = {"encoder.hidden_act": ("gelu",), "decoder.activation_function": ("gelu", "relu")}

SIZES = {
    "encoder": (
        "image_size",
        "patch_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ),
    "decoder": (
        "vocab_size",
        "d_model",
        "decoder_layers",
        "decoder_attention_heads",
        "decoder_ffn_dim",
        "max_position_embeddings",
    ),
}

# Tokens before the patches: ViT has a class token, DeiT a distillation token as well.
SPECIAL_TOKENS = {"vit": 1, "deit": 2}

# A weight that no configuration may leave unused: of one layer of many, whatever naming the file has. Others
# may be there (the encoder's pooler, tables that are computed).
LAYER_WEIGHT = re.compile(r"\blayers?\.\d+\.")

# What `generate` adds to the start token where neither checkpoint nor caller names a length.
DEFAULT_NEW_TOKENS = 20


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message names the file, the value and the remedy."""


@dataclass(frozen=True)
class EncoderSpec:
    """The image encoder. Sizes of images and patches in pixels; names as in Hugging Face's configuration."""

    model_type: str  # "vit" or "deit"
    image_height: int
    image_width: int
    patch_height: int
    patch_width: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    qkv_bias: bool
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_special_tokens(self) -> int:
        return SPECIAL_TOKENS[self.model_type]

    @property
    def num_tokens(self) -> int:
        """S: the length of the encoder's output."""
        rows, columns = self.image_height // self.patch_height, self.image_width // self.patch_width
        return self.num_special_tokens + rows * columns


@dataclass(frozen=True)
class DecoderSpec:
    """The text decoder. Names as in Hugging Face's configuration."""

    vocab_size: int
    d_model: int
    num_hidden_layers: int
    num_attention_heads: int
    decoder_ffn_dim: int
    activation_function: str
    max_position_embeddings: int
    use_learned_position_embeddings: bool  # else sinusoidal
    scale_embedding: bool
    layernorm_embedding: bool
    tie_word_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_attention_heads


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's description: all that export, build and runtime need to know beside the weights."""

    name: str
    source: Path  # the folder with the files
    encoder: EncoderSpec
    decoder: DecoderSpec
    decoder_start_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    bos_token_id: int | None
    max_length: int  # tokens of a decoded row, the start token included, as `generate` counts

    @property
    def max_new_tokens(self) -> int:
        """Decode steps: tokens after the start token."""
        return self.max_length - 1


@dataclass(frozen=True)
class Normalization:
    """What the image processor does with scaled pixels: (v * rescale_factor - mean) / std, by channel."""

    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [..., 3, height, width] -> float32 on the same device, bit for bit as the image processor."""

        def of_channels(values: tuple[float, ...]) -> torch.Tensor:
            return (torch.tensor(values, device=pixels.device) * (1 / self.rescale_factor))[:, None, None]

        return (pixels.float() - of_channels(self.mean)).div_(of_channels(self.std))


def load_spec(model: str | Path) -> ModelSpec:
    """Describes the checkpoint in the folder `model`, or of that id on the Hugging Face hub.

    Raises CheckpointError where there is none, or none of TrOCR's architecture.
    """
    folder = _find_folder(model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        what = "is empty" if not any(folder.iterdir()) else "has no config.json"
        raise CheckpointError(f"{folder} {what}: give a folder in Hugging Face's format, or a hub id")
    raw = _read_json(config_file)
    _check_architecture(raw, config_file)
    try:
        config = VisionEncoderDecoderConfig.from_dict(raw)
    except Exception as error:  # the library has its own exception type for every kind of bad value
        raise CheckpointError(f"{config_file}: {error}; correct the value or fetch the file again") from error

    encoder = config.encoder
    decoder = config.decoder
    _check_fields(config, config_file)
    for part, hidden_size, heads in (
        ("encoder", encoder.hidden_size, encoder.num_attention_heads),
        ("decoder", decoder.d_model, decoder.decoder_attention_heads),
    ):
        if hidden_size % heads:
            raise CheckpointError(
                f"{config_file}: {part} of width {hidden_size} cannot be split into {heads} attention heads; "
                "the width must be a multiple of the number of heads"
            )
    image_height, image_width = _pair(encoder.image_size)
    patch_height, patch_width = _pair(encoder.patch_size)
    generation = _generation_config(folder)
    start = generation.decoder_start_token_id
    eos = generation.eos_token_id
    eos_token_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    start = generation.bos_token_id if start is None else start
    if start is None or eos is None:
        raise CheckpointError(
            f"{folder} names no {'decoder_start_token_id' if start is None else 'eos_token_id'}: "
            "add it to generation_config.json"
        )
    pad = eos_token_ids[0] if eos_token_ids and generation.pad_token_id is None else generation.pad_token_id
    _check_tokens(folder, decoder.vocab_size, start, eos_token_ids, pad)
    return ModelSpec(
        name=Path(model).resolve().name,
        source=folder,
        encoder=EncoderSpec(
            model_type=encoder.model_type,
            image_height=image_height,
            image_width=image_width,
            patch_height=patch_height,
            patch_width=patch_width,
            hidden_size=encoder.hidden_size,
            num_hidden_layers=encoder.num_hidden_layers,
            num_attention_heads=encoder.num_attention_heads,
            intermediate_size=encoder.intermediate_size,
            hidden_act=encoder.hidden_act,
            qkv_bias=encoder.qkv_bias,
            layer_norm_eps=encoder.layer_norm_eps,
        ),
        decoder=DecoderSpec(
            vocab_size=decoder.vocab_size,
            d_model=decoder.d_model,
            num_hidden_layers=decoder.decoder_layers,
            num_attention_heads=decoder.decoder_attention_heads,
            decoder_ffn_dim=decoder.decoder_ffn_dim,
            activation_function=decoder.activation_function,
            max_position_embeddings=decoder.max_position_embeddings,
            use_learned_position_embeddings=decoder.use_learned_position_embeddings,
            scale_embedding=decoder.scale_embedding,
            layernorm_embedding=decoder.layernorm_embedding,
            tie_word_embeddings=decoder.tie_word_embeddings,
        ),
        decoder_start_token_id=start,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad,
        bos_token_id=generation.bos_token_id,
        # The last token is not fed back, so it needs no position.
        max_length=min(_max_length(generation, folder), decoder.max_position_embeddings + 1),
    )


def load_normalization(spec: ModelSpec) -> Normalization:
    """How the checkpoint's image processor normalises pixels.

    Raises CheckpointError where there is no image processor, or one that does not treat three channels.
    """
    file = spec.source / "preprocessor_config.json"
    try:
        processor = AutoImageProcessor.from_pretrained(spec.source)
        mean, std = (
            [float(value)] * 3 if isinstance(value, int | float) else [float(part) for part in value]
            for value in (
                (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
            )
        )
        factor = float(processor.rescale_factor) if processor.do_rescale else 1.0
    except Exception as error:  # missing and malformed files end in a variety of exceptions
        raise CheckpointError(f"{file}: no usable image processor ({error}); fetch it again") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or factor <= 0:
        raise CheckpointError(
            f"{file}: image_mean {mean}, image_std {std}, rescale_factor {factor}; expected three "
            "numbers each, deviations and factor above 0: fetch it again"
        )
    return Normalization(factor, tuple(mean), tuple(std))


def load_model(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> VisionEncoderDecoderModel:
    """The checkpoint's PyTorch model on the CPU, for inference: weights in `dtype`, attention in plain form.

    Raises CheckpointError for weights that are missing, truncated, or do not fit config.json.
    """
    files = _weight_files(spec.source)
    for file in files:
        _check_weights(file)
    with _quiet_transformers():
        model, info = VisionEncoderDecoderModel.from_pretrained(
            spec.source,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    if info["mismatched_keys"]:
        key, in_file, in_config = min(info["mismatched_keys"])
        raise CheckpointError(
            f"{spec.source}: weight {key} has shape {list(in_file)}, config.json asks for {list(in_config)}; "
            "take both files from the same checkpoint"
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("encoder.pooler."))
    if missing:
        raise CheckpointError(
            f"{spec.source}: {len(missing)} weights are not in {files[0].name}, the first is {missing[0]}; "
            "take both files from the same checkpoint"
        )
    unused = sorted(key for key in info["unexpected_keys"] if LAYER_WEIGHT.search(key))
    if unused:
        raise CheckpointError(
            f"{spec.source}: config.json has no place for {len(unused)} weights of {files[0].name}, the "
            f"first is {unused[0]}; take both files from the same checkpoint"
        )
    model.encoder.pooler = None  # takes no part in TrOCR, and most checkpoints do not have it
    if not spec.decoder.use_learned_position_embeddings:
        _restore_sinusoidal_positions(model, dtype)
    # The published small checkpoints switch the cache off, which only makes `generate` slow.
    model.config.decoder.use_cache = model.generation_config.use_cache = True
    return model.eval()


def copy_processor_files(spec: ModelSpec, destination: Path) -> list[Path]:
    """Copies configuration, image processor and tokenizer (no weights) into an engine folder."""
    destination.mkdir(parents=True, exist_ok=True)
    names = [name for name in PROCESSOR_FILES if (spec.source / name).is_file()]
    return [Path(shutil.copyfile(spec.source / name, destination / name)) for name in names]


def _find_folder(model: str | Path) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder of the checkpoint")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(model)):
        raise CheckpointError(f"{folder} does not exist: give a folder in Hugging Face's format, or a hub id")
    try:
        folder = Path(
            snapshot_download(str(model), allow_patterns=[*PROCESSOR_FILES, WEIGHT_FILES[1], "*.safetensors"])
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(str(model), allow_patterns=[WEIGHT_FILES[3], "pytorch_model*.bin"])
        return folder
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"there is no folder {model}, and the Hugging Face hub delivers no model of that id ({reason}); "
            "check the name and the network, or give a local folder"
        ) from error


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # malformed JSON, or not UTF-8
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}, not a JSON object; fetch it again")
    return value


def _check_architecture(raw: dict, file: Path) -> None:
    for field, section, allowed in (
        ("model_type", raw, ("vision-encoder-decoder",)),
        ("encoder.model_type", raw.get("encoder"), tuple(SPECIAL_TOKENS)),
        ("decoder.model_type", raw.get("decoder"), ("trocr",)),
    ):
        found = section.get("model_type") if isinstance(section, dict) else None
        if found not in allowed:
            raise CheckpointError(
                f"{file}: {field} is {found!r}, not {' or '.join(map(repr, allowed))}; "
                "only TrOCR checkpoints can be used: VisionEncoderDecoderModel with ViT or DeiT and TrOCR"
            )


def _check_fields(config: VisionEncoderDecoderConfig, file: Path) -> None:
    """Refuses what the graphs have no place for, where Hugging Face's classes would take it."""
    encoder, decoder = config.encoder, config.decoder
    for section, names in SIZES.items():
        for name in names:
            value = getattr(getattr(config, section), name)
            numbers = value if isinstance(value, list | tuple) else [value]
            if len(numbers) != (2 if numbers is value else 1) or not all(map(_is_positive, numbers)):
                raise CheckpointError(
                    f"{file}: {section}.{name} is {value!r}, and sizes begin at 1 (an image's or a patch's "
                    "may be height and width); correct the value or fetch the file again"
                )
    if encoder.num_channels != 3:
        raise CheckpointError(
            f"{file}: encoder.num_channels is {encoder.num_channels}; only 3 (RGB) can be used"
        )
    found = {
        "encoder.hidden_act": encoder.hidden_act,
        "decoder.activation_function": decoder.activation_function,
    }
    for field, allowed in ACTIVATIONS.items():
        if found[field] not in allowed:
            raise CheckpointError(
                f"{file}: {field} is {found[field]!r}, not {' or '.join(map(repr, allowed))}; "
                "no TrOCR checkpoint has another, so this one cannot be used"
            )
    if not decoder.is_decoder:
        raise CheckpointError(
            f"{file}: decoder.is_decoder is false, so the decoder would not look at the image; set it to true"
        )
    width = decoder.cross_attention_hidden_size
    if width not in (None, encoder.hidden_size):
        raise CheckpointError(
            f"{file}: decoder.cross_attention_hidden_size is {width}, encoder.hidden_size is "
            f"{encoder.hidden_size}; they must agree, or the former be null"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and value >= 1


def _pair(size: int | list[int]) -> tuple[int, int]:
    """(height, width) of a configuration's size, which is one number where both are equal."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _generation_config(folder: Path) -> GenerationConfig:
    """What `generate` goes by: generation_config.json, and only without it the values in config.json."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return GenerationConfig.from_model_config(_read_json(folder / "config.json"))
    try:
        return GenerationConfig.from_dict(_read_json(file))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}; correct the value or fetch the file again") from error


def _check_tokens(folder: Path, vocab_size: int, start: object, eos: tuple, pad: object) -> None:
    """Refuses ids that the decoder has no embedding for: it would read behind its table."""
    named = {"decoder_start_token_id": [start], "eos_token_id": list(eos), "pad_token_id": [pad]}
    for field, ids in named.items():
        if not ids or not all(isinstance(token, int) and 0 <= token < vocab_size for token in ids):
            raise CheckpointError(
                f"{folder}: {field} is {ids if len(ids) != 1 else repr(ids[0])}, and config.json has a "
                f"vocabulary of {vocab_size} tokens; correct it in generation_config.json"
            )


def _max_length(generation: GenerationConfig, folder: Path) -> int:
    """`generate`'s limit for a decoder prompt of one token; max_new_tokens goes before max_length."""
    if generation.max_new_tokens is not None:
        return 1 + generation.max_new_tokens
    length = 1 + DEFAULT_NEW_TOKENS if generation.max_length is None else generation.max_length
    if not isinstance(length, int) or length < 2:
        raise CheckpointError(
            f"{folder}: max_length is {length!r}, and a text has at least the start token and one more; "
            "correct it in generation_config.json"
        )
    return length


def _weight_files(folder: Path) -> list[Path]:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has no weights: {WEIGHTS} or {PICKLED_WEIGHTS} is missing; fetch the checkpoint again"
        )
    if found.suffix != ".json":
        return [found]
    weight_map = _read_json(found).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{found} names no files in weight_map; fetch it again")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _check_weights(file: Path) -> None:
    """Opens a file of weights without reading them: it must be whole, and hold nothing else."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):  # checks that the file is as long as its header says
                return
        content = torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds more than weights, and code of a checkpoint is never run; fetch "
            f"the checkpoint again, or {WEIGHTS} instead"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"{file} is missing, truncated or damaged ({_first_line(error)}); fetch the checkpoint again"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(value, torch.Tensor) for value in content.values()
    ):
        raise CheckpointError(
            f"{file} holds something else than weights by name; give {PICKLED_WEIGHTS} as save_pretrained "
            "writes it (scripts/convert_unilm.py converts the .pt files of TrOCR's authors)"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _restore_sinusoidal_positions(model: VisionEncoderDecoderModel, dtype: torch.dtype) -> None:
    """Computes the sinusoidal position table anew.

    The table is a plain attribute of its module, neither parameter nor buffer, so transformers 5 leaves it on
    the meta device, where `from_pretrained` creates modules, and its first use fails. As a buffer it also
    follows the model to another device or type.
    """
    positions = model.decoder.model.decoder.embed_positions
    rows, width = positions.weights.shape
    table = positions.get_embedding(rows, width, positions.padding_idx).to(dtype)
    del positions.weights
    positions.register_buffer("weights", table, persistent=False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers from reporting the pooler as newly initialised: `load_model` has its own checks."""
    verbosity = transformers_logging.get_verbosity()
    progress_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()
