"""Converting the authors' fairseq checkpoints: files of that layout, made here from random models."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from graph_surgery.checkpoint import load_model, load_spec
from scripts.convert_unilm import configuration, main, rename
from tests.checkpoints import random_checkpoint
from tests.conftest import BUNDLED_MODEL

ROOT = BUNDLED_MODEL.parent.parent

ENCODER_LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ENCODER = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def fairseq_weights(model: VisionEncoderDecoderModel) -> dict[str, torch.Tensor]:
    """The state dictionary that unilm's model of these weights has."""
    source = {name: weight.clone() for name, weight in model.state_dict().items()}
    weights = {}
    for fairseq, hugging_face in ENCODER.items():
        if f"encoder.{hugging_face}" in source:
            weights[f"encoder.deit.{fairseq}"] = source.pop(f"encoder.{hugging_face}")
    for index in range(model.config.encoder.num_hidden_layers):
        ours, theirs = f"encoder.layers.{index}", f"encoder.deit.blocks.{index}"
        for fairseq, hugging_face in ENCODER_LAYER.items():
            for kind in ("weight", "bias"):
                weights[f"{theirs}.{fairseq}.{kind}"] = source.pop(f"{ours}.{hugging_face}.{kind}")
        for kind in ("weight", "bias"):
            parts = [source.pop(f"{ours}.attention.{part}_proj.{kind}", None) for part in "qkv"]
            if parts[0] is not None:
                weights[f"{theirs}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, weight in source.items():
        assert name.startswith("decoder."), name
        weights[name.replace("decoder.model.decoder.", "decoder.")] = weight
    width = model.config.encoder.hidden_size
    weights["encoder.deit.head.weight"], weights["encoder.deit.head.bias"] = (
        torch.zeros(1000, width),
        torch.zeros(1000),
    )
    if "encoder.deit.dist_token" in weights:
        weights["encoder.deit.head_dist.weight"] = torch.zeros(1000, width)
        weights["encoder.deit.head_dist.bias"] = torch.zeros(1000)
    weights["decoder.version"] = torch.tensor([3.0])
    if not model.config.decoder.use_learned_position_embeddings:
        weights["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    return weights


def reference(case: str, folder: Path) -> VisionEncoderDecoderModel:
    """A random model as Hugging Face builds it, in memory."""
    loaded = load_model(load_spec(random_checkpoint(case, folder)))
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_pretrained(folder))
    model.encoder.pooler = None
    model.load_state_dict(loaded.state_dict())
    return model.eval()


def fairseq_settings(model: VisionEncoderDecoderModel) -> dict:
    decoder = model.config.decoder
    return {
        "arch": "trocr_base",
        "decoder_attention_heads": decoder.decoder_attention_heads,
        "activation_fn": decoder.activation_function,
        "no_scale_embedding": not decoder.scale_embedding,
        "max_target_positions": decoder.max_position_embeddings,
    }


def write(
    file: Path,
    model: VisionEncoderDecoderModel,
    settings: str,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A file as fairseq writes it, with its settings in one of the places that it has for them."""
    args, config = None, None
    if settings == "args":
        args = argparse.Namespace(**fairseq_settings(model))
    elif settings == "cfg":
        config = {"common": {"seed": 1}, "model": fairseq_settings(model)}
    elif settings == "cfg with Namespace":
        config = {"common": {"seed": 1}, "model": argparse.Namespace(**fairseq_settings(model))}
    content = {
        "args": args,
        "cfg": config,
        "model": fairseq_weights(model) if weights is None else weights,
        "optimizer_history": [{"criterion_name": "LabelSmoothing", "num_updates": 7}],
        "extra_state": {"epoch": 3, "best": 0.5},
    }
    torch.save(content, file)
    return file


@pytest.mark.parametrize("settings", ["args", "cfg", "cfg with Namespace"])
@pytest.mark.parametrize("case", ["small", "base", "base-stage1", "small-inverted", "base-inverted"])
def test_converted_model_computes_the_same(case: str, settings: str, tmp_path: Path):
    model = reference(case, tmp_path / case)
    file = write(tmp_path / "model.pt", model, settings)
    out = tmp_path / "converted"
    assert main([str(file), "--tokenizer", str(tmp_path / case), "--out", str(out)]) == 0

    spec = load_spec(out)
    original = load_spec(tmp_path / case)
    assert (spec.encoder, spec.decoder) == (original.encoder, original.decoder)
    assert (spec.decoder_start_token_id, spec.eos_token_ids, spec.pad_token_id) == (2, (2,), 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 48, 48, generator=generator)
    tokens = torch.randint(2, 120, (2, 20), generator=generator)
    with torch.no_grad():
        expected = model(images, decoder_input_ids=tokens).logits
        torch.testing.assert_close(load_model(spec)(images, decoder_input_ids=tokens).logits, expected)
    text = "Total 12.50"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("case", ["small", "base", "base-stage1"])
def test_without_settings_the_published_kind_counts(case: str, tmp_path: Path):
    """What the weights do not show is as published; sinusoidal positions have no limit in the weights."""
    model = reference(case, tmp_path / case)
    expected = model.config.decoder
    found = configuration(fairseq_weights(model), {}).decoder
    for field in ("activation_function", "scale_embedding", "decoder_attention_heads", "layernorm_embedding"):
        assert getattr(found, field) == getattr(expected, field)
    assert found.max_position_embeddings == (1024 if case == "base-stage1" else 24)


def test_every_weight_finds_its_place(tmp_path: Path):
    model = reference("small", tmp_path / "small")
    renamed = rename(fairseq_weights(model))
    expected = model.state_dict()
    assert renamed.keys() == expected.keys()
    for name, weight in renamed.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_command_line(tmp_path: Path):
    model = reference("base", tmp_path / "base")
    file = write(tmp_path / "model.pt", model, "args")
    command = [sys.executable, str(ROOT / "scripts" / "convert_unilm.py"), str(file)]
    run = subprocess.run(
        [*command, "--tokenizer", tmp_path / "base", "--out", "converted"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "converted\n"
    load_model(load_spec(tmp_path / "converted"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "converted", "model.pt"]


class Malicious:
    def __reduce__(self):
        return print, ("code of the checkpoint was run",)


def spoil(kind: str, file: Path, model: VisionEncoderDecoderModel) -> None:
    weights = fairseq_weights(model)
    match kind:
        case "missing":
            file.unlink(missing_ok=True)
            return
        case "truncated":
            write(file, model, "args")
            file.write_bytes(file.read_bytes()[:-2000])
            return
        case "code":
            torch.save({"model": weights, "args": Malicious()}, file)
            return
        case "other model":
            torch.save({"model": {"encoder.weight": torch.zeros(3)}}, file)
            return
        case "weight missing":
            del weights["decoder.layers.1.fc2.bias"]
        case "unknown weight":
            weights["decoder.adapter.weight"] = torch.zeros(3)
        case "other shape":
            weights["decoder.layers.1.fc2.bias"] = torch.zeros(7)
        case "not square":
            weights["encoder.deit.pos_embed"] = torch.zeros(1, 8, 128)
    write(file, model, "args", weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is missing, truncated or damaged"),
        ("truncated", "is missing, truncated or damaged"),
        ("code", "code of a checkpoint is never run; fetch it again"),
        ("other model", "has no weights of TrOCR under 'model'"),
        ("weight missing", "decoder.model.decoder.layers.1.fc2.bias"),
        ("unknown weight", "weight decoder.adapter.weight has no place in TrOCR"),
        ("other shape", "decoder.model.decoder.layers.1.fc2.bias"),
        ("not square", "encoder.deit.pos_embed has 8 positions"),
    ],
)
def test_unusable_file(kind: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture):
    model = reference("base", tmp_path / "base")
    file = tmp_path / "model.pt"
    spoil(kind, file, model)
    capfd.readouterr()
    out = tmp_path / "converted"
    assert main([str(file), "--tokenizer", str(tmp_path / "base"), "--out", str(out)]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {file}")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = reference("base", tmp_path / "base")
    file = write(tmp_path / "model.pt", model, "args")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([str(file), "--tokenizer", str(empty), "--out", str(tmp_path / "out")]) == 2
    assert f"error: {empty} has no tokenizer files" in capsys.readouterr().err
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    assert main([str(file), "--tokenizer", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path / 'out'} exists; remove it" in capsys.readouterr().err
