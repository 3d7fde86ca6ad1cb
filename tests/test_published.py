"""The published checkpoints' configurations: both kinds of graphs give Hugging Face's tokens.

The ten names have six configurations; the first name of each stands for the others.

The weights are random, and the layers fewer than published in all but small's: what is left out repeats what
is there, and a CPU takes minutes for it. Everything else is the published size: widths, heads, vocabulary,
image, positions.
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

import graph_surgery.checkpoint
import graph_surgery.export
from build import build
from graph_surgery import architectures
from graph_surgery.architectures import ARCHITECTURES, PUBLISHED, random_checkpoint, write_random_checkpoint
from graph_surgery.checkpoint import load_model, load_spec
from runtime.manifest import Manifest
from runtime.recognizer import Recognizer
from tests.conftest import BUNDLED_MODEL

SAMPLES = BUNDLED_MODEL.parent.parent / "samples"
LINES = [SAMPLES / name for name in ("000135.jpg", "000296.jpg", "000514.jpg")]
NEW_TOKENS = 10

# Nodes of the fused ops in all graphs, counted by hand: 12 encoder and 6 decoder layers, and else 2 and 2.
SMALL = {
    "TrOCREncoderAttention": 12,
    "TrOCRPatchEmbedding": 1,
    "TrOCRLayerNorm": 1,
    "TrOCRLayerNormLinear": 24,
    "TrOCRLinearResidual": 24,
    "TrOCRDecoderSelfAttention": 6,
    "TrOCRCrossAttention": 6,
    "TrOCRCrossKeyValue": 6,
    "TrOCRResidualLayerNorm": 19,
    "TrOCRBiasActivation": 6,
}
GELU = {
    "TrOCREncoderAttention": 2,
    "TrOCRPatchEmbedding": 1,
    "TrOCRLayerNorm": 1,
    "TrOCRLayerNormLinear": 4,
    "TrOCRLinearResidual": 4,
    "TrOCRDecoderSelfAttention": 2,
    "TrOCRCrossAttention": 2,
    "TrOCRCrossKeyValue": 2,
    "TrOCRResidualLayerNorm": 7,
    "TrOCRBiasActivation": 2,
}
RELU = GELU | {"TrOCRResidualLayerNorm": 6}  # no LayerNorm after the embeddings
NODES = {
    "small": SMALL,
    "base": GELU,
    "base-stage1": RELU,
    "large": GELU,
    "large-printed": RELU,
    "chinese": GELU,
}


FIRST = {architecture: name for name, architecture in reversed(PUBLISHED.items())}


@pytest.fixture(params=[name for name in PUBLISHED if name in FIRST.values()])
def published(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Path]]:
    """A published checkpoint's name and its random checkpoint, removed afterwards: a gigabyte each."""
    monkeypatch.setattr(architectures, "_randomize", randomize_and_sharpen)
    name = request.param
    architecture = PUBLISHED[name]
    encoder, decoder = ARCHITECTURES[architecture]
    if architecture != "small":
        encoder, decoder = encoder | {"num_hidden_layers": 2}, decoder | {"decoder_layers": 2}
    folder = write_random_checkpoint(
        encoder,
        decoder,
        tmp_path / name.split("/")[1],
        torch.float32,
        seed=list(PUBLISHED).index(name),
        characters=architecture == "chinese",
    )
    yield name, folder
    shutil.rmtree(tmp_path)


RANDOMIZE = architectures._randomize


def randomize_and_sharpen(model: torch.nn.Module, seed: int, device: str) -> None:
    """Makes pixels, positions and what attention looks at count: else all images give one token, repeated."""
    RANDOMIZE(model, seed, device)
    for name, weight in model.state_dict().items():
        if name.startswith("decoder") and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight *= 2
        elif name.endswith("patch_embeddings.projection.weight"):
            weight *= 4
        elif name.endswith("embed_positions.weight"):
            weight *= 32


def hugging_face(folder: Path) -> VisionEncoderDecoderModel:
    """The model as Hugging Face's constructor builds it, with sinusoidal positions where there are any."""
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_pretrained(folder))
    model.encoder.pooler = None
    model.load_state_dict(load_model(load_spec(folder)).state_dict())
    return model.eval()


@pytest.mark.slow
def test_tokens_are_those_of_hugging_face(
    published: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, folder = published
    processor = AutoImageProcessor.from_pretrained(folder)
    images = [Image.open(file).convert("RGB") for file in LINES]
    model = hugging_face(folder)
    generated = model.generate(
        processor(images, return_tensors="pt").pixel_values,
        max_new_tokens=NEW_TOKENS,
        num_beams=1,
        do_sample=False,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    sequences = generated.sequences.tolist()
    first, second = torch.stack(generated.logits).topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-4, "a tie, which rounding decides: take another seed"
    del model
    start = 0 if name == "chineseocr/trocr-chinese" else 2
    assert {tokens[0] for tokens in sequences} == {start}
    assert len({tuple(tokens) for tokens in sequences}) > 1  # the image is looked at,
    assert all(len(set(tokens[1:])) > 1 for tokens in sequences)  # and so is the text before

    # Both kinds of graphs come from the same export, which is half of a build's time.
    monkeypatch.setattr(graph_surgery.export, "export_graphs", cache(graph_surgery.export.export_graphs))
    monkeypatch.setattr(graph_surgery.checkpoint, "load_model", cache(load_model))
    monkeypatch.setattr(graph_surgery.checkpoint, "load_spec", cache(load_spec))
    for plugins in ("none", "all"):
        out = build(str(folder), plugins, "fp32", out=tmp_path / plugins, onnx_only=True)
        if plugins == "all":
            nodes = {op.op: op.count for op in Manifest.read(out).fused_ops}
            expected = NODES[PUBLISHED[name]]
            assert nodes == expected
        results = Recognizer(out, backend="onnxruntime", max_new_tokens=NEW_TOKENS).recognize(LINES)
        assert [result.token_ids for result in results] == [tokens[1:] for tokens in sequences], plugins
        if name != "chineseocr/trocr-chinese":  # tests/test_tokenizer.py has its characters
            tokenizer = AutoTokenizer.from_pretrained(folder)
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sequences]
            assert [result.text for result in results] == texts
        shutil.rmtree(out)


def test_configurations_differ_as_the_published_do():
    """The table of the family, checkpoint by checkpoint."""
    found = {}
    for name, architecture in PUBLISHED.items():
        encoder, decoder = ARCHITECTURES[architecture]
        found[name.split("/")[1]] = (
            encoder["model_type"],
            encoder["num_hidden_layers"],
            encoder["hidden_size"],
            encoder["qkv_bias"],
            decoder["decoder_layers"],
            decoder["d_model"],
            decoder["activation_function"],
            decoder["use_learned_position_embeddings"],
            decoder["max_position_embeddings"],
            decoder["scale_embedding"],
            decoder["layernorm_embedding"],
            decoder["tie_word_embeddings"],
            decoder["vocab_size"],
        )
    small = ("deit", 12, 384, True, 6, 256, "relu", True, 512, True, True, False, 64044)
    gelu = (12, 1024, "gelu", True, 512, False, True, True, 50265)
    relu = (12, 1024, "relu", False, 1024, True, False, False, 50265)
    base, large = ("vit", 12, 768, False), ("vit", 24, 1024, False)
    assert found == {
        "trocr-small-printed": small,
        "trocr-small-handwritten": small,
        "trocr-small-stage1": small,
        "trocr-base-printed": base + gelu,
        "trocr-base-handwritten": base + gelu,
        "trocr-base-stage1": base + relu,
        "trocr-large-printed": large + relu,
        "trocr-large-handwritten": large + gelu,
        "trocr-large-stage1": large + relu,
        "trocr-chinese": (*small[:-1], 11318),
    }


@pytest.mark.slow
def test_full_size_checkpoint_of_a_published_name(tmp_path: Path):
    folder = random_checkpoint("chineseocr/trocr-chinese", tmp_path / "trocr-chinese")
    spec = load_spec(folder)
    assert (spec.encoder.num_tokens, spec.encoder.hidden_size) == (578, 384)
    assert (spec.decoder.vocab_size, spec.decoder_start_token_id) == (11318, 0)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(11318))
    assert {vocabulary[token] for token in ("<s>", "<pad>", "</s>")} == {0, 1, 2}
    assert {"中", "。", "·", " "} <= set(vocabulary)
