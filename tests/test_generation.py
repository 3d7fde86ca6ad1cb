"""Greedy search against Hugging Face's `generate`, on every TrOCR configuration with reduced sizes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import VisionEncoderDecoderModel

from build import build
from graph_surgery.checkpoint import ModelSpec, Normalization, load_model, load_spec
from runtime.backends.base import Backend, BackendError, SearchResult
from runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from runtime.backends.torch_backend import TorchBackend
from runtime.generation import (
    Decoder,
    GenerationError,
    new_token_limit,
    unsupported_settings,
)
from tests.checkpoints import CASES

NEW_TOKENS = 16
NORMALIZATION = Normalization(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of every checkpoint here


def pixel_values(spec: ModelSpec, batch: int = 3) -> torch.Tensor:
    """uint8 images of black and white blocks of 8 x 8: noise looks too much alike to a random encoder."""
    shape = (batch, 3, spec.encoder.image_height // 8, spec.encoder.image_width // 8)
    blocks = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1)).mul(255).to(torch.uint8)
    return blocks.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def open_backend(name: str, spec: ModelSpec, graphs: Callable[[Path, str], Path]) -> Backend:
    """`name` is "torch", or the --plugins of graphs for ONNX Runtime."""
    if name == "torch":
        return TorchBackend(spec)
    return OnnxRuntimeBackend(graphs(spec.source, name), spec, NEW_TOKENS)


def generate(model: VisionEncoderDecoderModel, pixels: torch.Tensor, eos_token_id: int | list[int]):
    """Hugging Face's greedy search, on normalised pixels."""
    return model.generate(
        NORMALIZATION(pixels),
        eos_token_id=eos_token_id,
        pad_token_id=1,
        max_new_tokens=NEW_TOKENS,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )


def ending_tokens(sequences: torch.Tensor, never: int) -> tuple[int, int]:
    """The two tokens that, as ends of text, cut these rows to the most varied lengths, and late.

    Random weights seldom produce the checkpoint's own end of text. `never` is a token that no row has.
    """
    rows = [row[1:] for row in sequences.tolist()]

    def worth(tokens: tuple[int, ...]) -> tuple[int, int]:
        lengths = [next((i for i, token in enumerate(row) if token in tokens), len(row)) for row in rows]
        return len(set(lengths)), sum(lengths)

    seen = sorted({token for row in rows for token in row} | {never})
    return max(combinations(seen, 2), key=worth)


@pytest.mark.parametrize("backend_name", ["torch", "none", "all"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_log_probs_are_those_of_generate(
    case: str, backend_name: str, checkpoint: Callable[[str], Path], graphs: Callable[[Path, str], Path]
):
    spec = load_spec(checkpoint(case))
    model, pixels = load_model(spec), pixel_values(spec)

    never = spec.decoder.vocab_size
    eos = ending_tokens(generate(model, pixels, eos_token_id=never).sequences, never)
    expected = generate(model, pixels, eos_token_id=list(eos))
    log_probs = torch.stack(expected.logits, dim=1).log_softmax(dim=-1)  # [B, steps, V]

    spec = replace(spec, eos_token_ids=eos)
    decode = Decoder(open_backend(backend_name, spec, graphs), NEW_TOKENS)
    found, search = decode(pixels), decode.search(len(pixels))

    steps = expected.sequences.shape[1]
    assert torch.equal(search.output_ids[:, :steps].cpu(), expected.sequences)
    assert (search.output_ids[:, steps:] == spec.pad_token_id).all()
    # With tied random embeddings every row repeats the start token.
    assert len(set(map(len, found.token_ids))) > 1 or case == "base"
    for row, token_ids in enumerate(found.token_ids):
        assert token_ids == expected.sequences[row, 1 : 1 + len(token_ids)].tolist()
        assert token_ids[-1] in eos or len(token_ids) == NEW_TOKENS
        assert not set(eos) & set(token_ids[:-1])
        chosen = log_probs[row, range(len(token_ids)), token_ids]
        assert found.mean_log_probs[row] == pytest.approx(chosen.mean().item(), abs=1e-4)


@pytest.mark.parametrize("backend_name", ["torch", "none", "all"])
def test_a_search_leaves_nothing_behind(
    backend_name: str, checkpoint: Callable[[str], Path], graphs: Callable[[Path, str], Path]
):
    """The same backend again, with other images, another batch size and the first images once more."""
    spec = load_spec(checkpoint("small"))
    decode = Decoder(open_backend(backend_name, spec, graphs), NEW_TOKENS)
    pixels = pixel_values(spec, batch=4)
    first = decode(pixels)
    assert decode(pixels.flip(0)).token_ids == first.token_ids[::-1]
    assert decode(pixels[1:2]).token_ids == first.token_ids[1:2]
    assert decode(pixels) == first


def test_ended_rows_do_not_lower_the_log_prob(checkpoint: Callable[[str], Path]):
    """A row that ends at once beside one that does not: its mean is that of its only token."""
    spec = load_spec(checkpoint("small"))
    model, pixels = load_model(spec), pixel_values(spec)
    first = generate(model, pixels, eos_token_id=spec.decoder.vocab_size)
    spec = replace(spec, eos_token_ids=(first.sequences[0, 1].item(),))
    found = Decoder(TorchBackend(spec), NEW_TOKENS)(pixels)
    assert len(found.token_ids[0]) == 1
    assert max(map(len, found.token_ids)) > 1
    expected = first.logits[0][0].log_softmax(dim=-1).max().item()
    assert found.mean_log_probs[0] == pytest.approx(expected, abs=1e-5)


def test_limit_of_the_checkpoint_and_of_the_caller(checkpoint: Callable[[str], Path]):
    spec = load_spec(checkpoint("small"))
    assert new_token_limit(spec, None) == spec.max_new_tokens
    assert new_token_limit(spec, 3) == 3
    found = Decoder(TorchBackend(replace(spec, eos_token_ids=(999,))), 3)(pixel_values(spec))
    assert [len(row) for row in found.token_ids] == [3, 3, 3]
    positions = spec.decoder.max_position_embeddings
    assert new_token_limit(spec, positions) == positions


@pytest.mark.parametrize("limit", [-1, 0, 25])
def test_impossible_limit(limit: int, checkpoint: Callable[[str], Path]):
    with pytest.raises(GenerationError, match=rf"max_new_tokens is {limit}, .* 24 tokens; choose 1 to 24"):
        new_token_limit(load_spec(checkpoint("small")), limit)


def test_limit_above_the_cache(checkpoint: Callable[[str], Path], graphs: Callable[[Path, str], Path]):
    backend = open_backend("all", load_spec(checkpoint("small")), graphs)
    with pytest.raises(GenerationError, match=r"max_new_tokens is 17, .* has room for 16; choose fewer"):
        Decoder(backend, NEW_TOKENS + 1)


def test_unsupported_settings_are_named(checkpoint: Callable[[str], Path], tmp_path: Path):
    folder = shutil.copytree(checkpoint("small"), tmp_path / "beams")
    settings = {
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "do_sample": False,
        "min_length": 0,
        "eos_token_id": 2,
    }
    settings |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert unsupported_settings(load_spec(folder)) == ["num_beams=4", "no_repeat_ngram_size=3"]


def test_missing_and_damaged_graphs(
    checkpoint: Callable[[str], Path], graphs: Callable[[Path, str], Path], tmp_path: Path
):
    spec = load_spec(checkpoint("small"))
    folder = shutil.copytree(graphs(spec.source, "none"), tmp_path / "graphs")
    decoder = folder / "decoder.onnx"
    decoder.write_bytes(decoder.read_bytes()[:1000])
    with pytest.raises(BackendError, match=rf"{decoder}: ONNX Runtime cannot load it .* build it in fp32"):
        OnnxRuntimeBackend(folder, spec, NEW_TOKENS)
    decoder.unlink()
    with pytest.raises(BackendError, match=f"{decoder}: missing; build the graphs"):
        OnnxRuntimeBackend(folder, spec, NEW_TOKENS)


def test_bf16_graphs_do_not_run_on_onnx_runtime(checkpoint: Callable[[str], Path], tmp_path: Path):
    spec = load_spec(checkpoint("small"))
    folder = build(str(spec.source), "none", "bf16", out=tmp_path / "bf16", onnx_only=True)
    with pytest.raises(BackendError, match=r"encoder.onnx: .*bfloat16.*; build it in fp32"):
        OnnxRuntimeBackend(folder, spec, NEW_TOKENS)


def test_a_search_result_is_one_memory():
    """Its parts are views, of any number of images; the host's copy has all of them."""
    result = SearchResult.empty(3, 5, torch.device("cpu"))
    assert result.memory.shape == (3 * (5 + 2),)
    result.tokens.copy_(torch.arange(15).view(3, 5))
    result.log_probs.copy_(torch.tensor([-0.5, -1.25, -0.0]))
    result.lengths.copy_(torch.tensor([5, 1, 2]))
    copied = SearchResult(result.memory.clone(), 3).on_host()
    assert copied.tokens.tolist() == torch.arange(15).view(3, 5).tolist()
    assert copied.log_probs.tolist() == [-0.5, -1.25, -0.0]
    assert copied.lengths.tolist() == [5, 1, 2]
