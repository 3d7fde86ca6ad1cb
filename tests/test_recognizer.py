"""The whole way from images to text, with the bundled checkpoint and its samples."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

from graph_surgery.checkpoint import CheckpointError
from graph_surgery.fused_ops import SurgeryError
from runtime.backends.base import BackendError
from runtime.generation import GenerationError
from runtime.gpu import current_gpu
from runtime.manifest import ManifestError
from runtime.recognizer import Recognizer, Result
from runtime.search import SearchRequest
from tests.conftest import BUNDLED_MODEL

SAMPLES = BUNDLED_MODEL.parent.parent / "samples"
LINES = sorted(SAMPLES.glob("*.jpg"))

Graphs = Callable[[Path, str], Path]


@pytest.fixture(scope="module")
def fused(graphs: Graphs) -> Recognizer:
    return Recognizer(graphs(BUNDLED_MODEL, "all"), backend="onnxruntime")


@pytest.fixture(scope="module")
def by_hugging_face() -> list[tuple[str, list[int]]]:
    """Text and tokens of every sample line as Hugging Face reads them, a line at a time, without our code."""
    processor = AutoImageProcessor.from_pretrained(BUNDLED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    model = VisionEncoderDecoderModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    lines = []
    for file in LINES:
        pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values
        sequence = model.generate(pixels)[0]
        lines.append((tokenizer.decode(sequence, skip_special_tokens=True), sequence[1:].tolist()))
    return lines


def readings(results: list[Result]) -> list[tuple[str, list[int]]]:
    assert [result.error for result in results] == [None] * len(results)
    return [(result.text, result.token_ids) for result in results]


def test_fused_graphs_read_as_hugging_face(fused: Recognizer, by_hugging_face: list):
    results = fused.recognize(LINES)
    assert readings(results) == by_hugging_face
    assert [result.path for result in results] == [str(file) for file in LINES]
    assert all(-1.5 < result.mean_log_prob < 0 for result in results)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_stock_graphs_and_torch_read_as_hugging_face(backend: str, graphs: Graphs, by_hugging_face: list):
    model = graphs(BUNDLED_MODEL, "none") if backend == "onnxruntime" else BUNDLED_MODEL
    found = Recognizer(model, backend=backend).recognize(LINES[:10])
    assert readings(found) == by_hugging_face[:10]


@pytest.mark.parametrize("batch_size", [10**20, 1, 3])
def test_a_line_does_not_depend_on_its_batch(batch_size: int, graphs: Graphs, by_hugging_face: list):
    """Neither on the number of lines in it nor on which they are."""
    recognizer = Recognizer(graphs(BUNDLED_MODEL, "all"), backend="onnxruntime", batch_size=batch_size)
    found = recognizer.recognize(LINES[7::-1])
    assert readings(found) == by_hugging_face[7::-1]
    assert {result.timing.batch for result in found} <= {batch_size, 8 % batch_size}


def test_paths_images_and_arrays_are_one(fused: Recognizer):
    file = LINES[4]
    image = Image.open(file)
    rgb = image.convert("RGB")
    from_path, *others = fused.recognize(
        [file, str(file), image, rgb, np.asarray(image), np.asarray(image)[:, :, None], np.asarray(rgb)]
    )
    assert [other.text for other in others] == [from_path.text] * 6
    assert [other.token_ids for other in others] == [from_path.token_ids] * 6
    assert [other.path for other in others] == [str(file), None, None, None, None, None]


def test_one_image_need_not_be_in_a_list(fused: Recognizer):
    (from_path,) = fused.recognize(str(LINES[0]))
    (from_array,) = fused.recognize(np.asarray(Image.open(LINES[0])))
    assert from_path.text == from_array.text
    assert fused.recognize([]) == []


def test_bad_images_have_their_own_errors(fused: Recognizer, by_hugging_face: list, tmp_path: Path):
    text, missing, folder = tmp_path / "text.png", tmp_path / "missing.jpg", tmp_path / "folder.png"
    text.write_text("This is not an image.\n")
    folder.mkdir()
    bad = [text, missing, folder, np.zeros((1, 1), np.uint8), np.zeros((8, 20000), np.uint8), 17]
    images = [LINES[0], *bad[:2], LINES[1], *bad[2:], LINES[2]]

    results = fused.recognize(images)
    good = [results[0], results[3], results[-1]]
    assert readings(good) == by_hugging_face[:3]
    failed = [result for result in results if result not in good]
    messages = [
        f"{text}: not a readable",
        f"{missing}: no such file",
        f"{folder}: a folder",
        "image 6: 1x1 pixels",
        "image 7: 20000x8 pixels",
        "image 8: of type int",
    ]
    for result, message in zip(failed, messages, strict=True):
        assert result.error.startswith(message)
        assert (result.text, result.token_ids, result.mean_log_prob, result.timing) == (None,) * 4


def test_nothing_but_bad_images(fused: Recognizer):
    results = fused.recognize([f"missing-{number}.png" for number in range(20)])
    assert [result.error for result in results] == [
        f"missing-{number}.png: no such file; check the path" for number in range(20)
    ]


def test_results_come_before_all_images_are_read(fused: Recognizer):
    taken = []

    def images():
        for file in LINES * 100:
            taken.append(file)
            yield file

    first = next(fused.stream(images()))
    assert first.path == str(LINES[0])
    assert len(taken) <= 2 * fused.batch_size


def test_encoding_ahead(graphs: Graphs, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: a batch is encoded before the one before it is decoded; the results are in order."""
    recognizer = Recognizer(graphs(BUNDLED_MODEL, "all"), backend="onnxruntime", batch_size=3)
    images = [*LINES[:4], "missing.png", *LINES[4:8]]
    expected = recognizer.recognize(images)

    calls = []
    backend = recognizer.backend
    for name in ("encode", "begin"):
        method = getattr(backend, name)
        monkeypatch.setattr(
            backend, name, lambda *args, name=name, method=method: calls.append(name) or method(*args)
        )
    recognizer.recognize(images)
    assert calls == ["encode", "begin"] * 3
    calls.clear()
    monkeypatch.setattr(backend, "encodings", 2)
    stream = recognizer.stream(images)
    ahead = [next(stream)]
    time.sleep(1)  # the next batch's images are scaled meanwhile
    ahead += stream
    assert sorted(calls) == ["begin"] * 3 + ["encode"] * 3
    assert calls.index("begin", calls.index("begin") + 1) > 2  # the second begins after a third is encoded
    assert [(r.path, r.text, r.token_ids) for r in ahead] == [(r.path, r.text, r.token_ids) for r in expected]


def test_a_batch_alone_says_what_is_searched(graphs: Graphs, monkeypatch: pytest.MonkeyPatch):
    """So that a backend can launch both at once; not where the next batch is encoded meanwhile."""
    recognizer = Recognizer(graphs(BUNDLED_MODEL, "all"), backend="onnxruntime", batch_size=2)
    encode, requests = recognizer.backend.encode, []

    def recording(pixel_values: torch.Tensor, then: SearchRequest | None = None):
        requests.append(then)
        return encode(pixel_values, then)

    monkeypatch.setattr(recognizer.backend, "encode", recording)
    request = SearchRequest(recognizer.spec.max_new_tokens)
    recognizer.recognize(LINES[0])
    recognizer.recognize(LINES[:2])
    assert requests == [request, request]
    requests.clear()
    recognizer.recognize(LINES[:3])
    assert requests == [None, request]


def test_beam_search(graphs: Graphs):
    recognizer = Recognizer(graphs(BUNDLED_MODEL, "all"), backend="onnxruntime", num_beams=3, batch_size=2)
    processor = AutoImageProcessor.from_pretrained(BUNDLED_MODEL)
    model = VisionEncoderDecoderModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()
    for file, result in zip(LINES[:3], recognizer.recognize(LINES[:3]), strict=True):
        pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt").pixel_values
        found = model.generate(pixels, num_beams=3, output_scores=True, return_dict_in_generate=True)
        assert result.token_ids == found.sequences[0, 1:].tolist()
        assert result.mean_log_prob == pytest.approx(found.sequences_scores.item(), abs=1e-4)


def test_timing(fused: Recognizer):
    (result,) = fused.recognize([LINES[0]])
    assert result.timing.batch == 1
    assert result.timing.preprocess_ms > 0
    assert result.timing.recognize_ms > 0


def test_max_new_tokens_cuts_the_text(graphs: Graphs, by_hugging_face: list):
    folder = graphs(BUNDLED_MODEL, "all")
    (cut,) = Recognizer(folder, backend="onnxruntime", max_new_tokens=3).recognize([LINES[1]])
    assert cut.token_ids == by_hugging_face[1][1][:3]
    assert cut.text == by_hugging_face[1][0][:3]
    with pytest.raises(GenerationError, match=r"max_new_tokens is 129, .* 128 tokens; choose 1 to 128"):
        Recognizer(folder, backend="onnxruntime", max_new_tokens=129)


def test_engines_may_be_named_apart(graphs: Graphs, by_hugging_face: list):
    recognizer = Recognizer(BUNDLED_MODEL, backend="onnxruntime", engines=graphs(BUNDLED_MODEL, "none"))
    assert recognizer.backend.max_steps is None  # the stock graphs' cache grows
    assert readings(recognizer.recognize(LINES[:1])) == by_hugging_face[:1]


@pytest.mark.skipif(current_gpu() is not None, reason="there is an NVIDIA GPU: auto may take TensorRT")
def test_auto_says_why_it_does_not_take_tensorrt(graphs: Graphs):
    recognizer = Recognizer(graphs(BUNDLED_MODEL, "all"))
    assert recognizer.backend.name == "onnxruntime"
    assert recognizer.backend_choice == "onnxruntime (no NVIDIA GPU)"
    with pytest.raises(BackendError, match="need an NVIDIA GPU"):
        Recognizer(graphs(BUNDLED_MODEL, "all"), backend="tensorrt")


def test_graphs_are_built_where_there_are_none(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)  # build.py writes to engines/ in the current folder
    model = checkpoint("small")
    (result,) = Recognizer(model, backend="onnxruntime", plugins="none").recognize([LINES[0]])
    assert result.error is None
    assert (tmp_path / "engines" / "small-fp32-none" / "decoder.onnx").is_file()
    assert capsys.readouterr().out == ""


def test_wrong_arguments(graphs: Graphs, tmp_path: Path):
    folder = graphs(BUNDLED_MODEL, "all")
    with pytest.raises(BackendError, match="there is no backend 'cuda'; choose one of auto, tensorrt"):
        Recognizer(folder, backend="cuda")
    with pytest.raises(BackendError, match="batch_size is 0; give 1 or more"):
        Recognizer(folder, backend="onnxruntime", batch_size=0)
    with pytest.raises(BackendError, match=r"backend onnxruntime has no e4m3_cross.*; leave it out"):
        Recognizer(folder, backend="onnxruntime", e4m3_cross=True)
    with pytest.raises(BackendError, match=r"e4m3_cross is of greedy search alone.*no_repeat_ngram_size=3"):
        Recognizer(folder, backend="tensorrt", no_repeat_ngram_size=3, e4m3_cross=True)
    with pytest.raises(BackendError, match="precision is fp32, and fp16 was asked for"):
        Recognizer(folder, backend="onnxruntime", precision="fp16")
    with pytest.raises(ManifestError, match=f"{tmp_path}.*not found"):
        Recognizer(BUNDLED_MODEL, backend="onnxruntime", engines=tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is empty"):
        Recognizer(tmp_path, backend="torch")
    with pytest.raises(SurgeryError, match="unknown name 'layernorn'"):
        Recognizer(BUNDLED_MODEL, backend="torch", plugins="layernorn")


@pytest.mark.parametrize("damage", ["truncated", "other weights", "another graph", "missing"])
def test_damaged_graphs(damage: str, graphs: Graphs, tmp_path: Path):
    """ONNX Runtime loads a graph with other weights, and reads nonsense."""
    folder = shutil.copytree(graphs(BUNDLED_MODEL, "all"), tmp_path / "engine")
    file = folder / "decoder.onnx"
    content = bytearray(file.read_bytes())
    match damage:
        case "truncated":
            file.write_bytes(content[: len(content) // 2])
        case "other weights":
            content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
            file.write_bytes(content)
        case "another graph":
            shutil.copyfile(folder / "encoder.onnx", file)
        case "missing":
            file.unlink()
    with pytest.raises(ManifestError, match=f"{file}: (damaged or replaced|missing).*; build it again: "):
        Recognizer(folder, backend="onnxruntime")


def test_unsuitable_processor_files(graphs: Graphs, tmp_path: Path):
    folder = shutil.copytree(graphs(BUNDLED_MODEL, "all"), tmp_path / "engine")
    processor_file = folder / "preprocessor_config.json"
    processor = json.loads(processor_file.read_text())
    processor_file.write_text(json.dumps(processor | {"size": {"height": 224, "width": 224}}))
    with pytest.raises(CheckpointError, match=r"makes images of \[3, 224, 224\], config.json asks .*384"):
        Recognizer(folder, backend="onnxruntime")
    processor_file.unlink()
    with pytest.raises(CheckpointError, match="no usable image processor"):
        Recognizer(folder, backend="onnxruntime")
