"""Checkpoints fine-tuned with interpolated positions: given their own size, they give the same tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from graph_surgery.architectures import ARCHITECTURES, write_image_processor, write_random_checkpoint
from graph_surgery.checkpoint import CheckpointError, load_model, load_spec
from runtime.recognizer import Recognizer
from scripts.interpolate_positions import main
from tests.checkpoints import DECODER, ENCODER, SMALL_DECODER
from tests.conftest import BUNDLED_MODEL

LINES = sorted((BUNDLED_MODEL.parent.parent / "samples").glob("*.jpg"))[:4]
DEPTHS = {"num_hidden_layers": 3, "image_size": 384}


def fine_tuned(kind: str, folder: Path) -> Path:
    """A checkpoint of another depth and vocabulary whose processor makes images of 64x640."""
    encoder, decoder = ARCHITECTURES[kind]
    decoder = (
        decoder | (SMALL_DECODER if kind == "small" else DECODER) | {"vocab_size": 97, "decoder_layers": 1}
    )
    write_random_checkpoint(encoder | ENCODER | DEPTHS, decoder, folder, torch.float32)
    write_image_processor(encoder["model_type"], [64, 640], folder)
    return folder


@pytest.mark.parametrize("kind", ["small", "base"])
def test_tokens_are_those_of_hugging_face(kind: str, graphs: Callable[[Path, str], Path], tmp_path: Path):
    folder = fine_tuned(kind, tmp_path / "original")
    with pytest.raises(CheckpointError, match=r"\[3, 64, 640\].*\[3, 384, 384\].*interpolate_positions\.py"):
        Recognizer(folder, backend="torch")

    out = tmp_path / f"wide-{kind}"
    assert main(["--model", str(folder), "--out", str(out)]) == 0
    spec = load_spec(out)
    special = 2 if kind == "small" else 1
    assert (spec.encoder.image_height, spec.encoder.image_width) == (64, 640)
    assert (spec.encoder.num_tokens, spec.encoder.num_special_tokens) == (4 * 40 + special, special)
    assert (spec.decoder.vocab_size, spec.encoder.num_hidden_layers) == (97, 3)

    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_pretrained(folder)).eval()
    model.encoder.pooler = None
    model.load_state_dict(load_model(load_spec(folder)).state_dict())
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor([Image.open(file).convert("RGB") for file in LINES], return_tensors="pt").pixel_values
    with torch.no_grad():
        states = model.encoder(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(load_model(spec).encoder(pixels).last_hidden_state, states)
    sequences = model.generate(pixels, interpolate_pos_encoding=True, num_beams=1, max_new_tokens=12).tolist()
    ends = [tokens.index(2, 1) + 1 if 2 in tokens[1:] else len(tokens) for tokens in sequences]
    expected = [tokens[1:end] for tokens, end in zip(sequences, ends, strict=True)]
    for plugins in ("none", "all"):
        recognizer = Recognizer(graphs(out, plugins), backend="onnxruntime", max_new_tokens=12)
        assert [result.token_ids for result in recognizer.recognize(LINES)] == expected


def test_what_cannot_be_done(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["--model", str(BUNDLED_MODEL), "--out", str(tmp_path / "out")]) == 2
    assert "made for 384x384 already; use it as it is" in capsys.readouterr().err
    folder = fine_tuned("small", tmp_path / "original")
    write_image_processor("deit", [60, 640], folder)
    capsys.readouterr()
    assert main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "60x640, which patches of 16x16 do not fill; correct its size" in capsys.readouterr().err
    assert main(["--model", str(folder), "--out", str(folder)]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]
