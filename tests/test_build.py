"""build.py without a GPU: graphs, manifest, no-op builds, folders that are whole or not there."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file

import build as build_module
from build import BuildError, NoEngines, build, default_folder, main
from graph_surgery.fused_ops import DOMAIN, SurgeryError
from runtime.decoder_weights import FILE_NAME as DECODER_WEIGHTS
from runtime.gpu import Gpu, current_gpu
from runtime.manifest import Manifest

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = str(ROOT / "models" / "trocr-tiny-printed")
GRAPH_FILES = ("encoder.onnx", "cross_kv.onnx", "decoder.onnx")

without_gpu = pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: engines would be built")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and modification time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("small"))


@pytest.mark.slow
def test_bundled_checkpoint(tmp_path: Path):
    folder = build(BUNDLED, "fused", "fp16", (1, 8, 16), tmp_path / "engines", onnx_only=True)
    manifest = Manifest.read(folder)
    assert {op.op: op.count for op in manifest.fused_ops} == {
        "TrOCREncoderAttention": 12,
        "TrOCRDecoderSelfAttention": 6,
        "TrOCRCrossAttention": 6,
        "TrOCRCrossKeyValue": 6,
        "TrOCRResidualLayerNorm": 19,
        "TrOCRLayerNorm": 1,
        "TrOCRBiasActivation": 6,
        "TrOCRLayerNormLinear": 24,
        "TrOCRLinearResidual": 24,
        "TrOCRPatchEmbedding": 1,
    }
    assert (manifest.cache, manifest.cache_capacity, manifest.max_length) == ("fixed", 96, 97)
    assert (manifest.precision, manifest.batch, manifest.engines) == ("fp16", (1, 8, 16), {})
    assert (
        set(GRAPH_FILES) | {"config.json", "tokenizer.json", "preprocessor_config.json"}
        <= manifest.files.keys()
    )
    for name in manifest.files:
        manifest.check_file(folder, name)
    for name in GRAPH_FILES:
        ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])


def test_stock_graphs(model: str, tmp_path: Path):
    manifest = Manifest.read(build(model, "none", "fp32", out=tmp_path / "engines", onnx_only=True))
    assert (manifest.plugins, manifest.fused_ops) == ([], [])
    assert (manifest.cache, manifest.cache_capacity) == ("growing", None)
    for name in GRAPH_FILES:
        nodes = onnx.load(tmp_path / "engines" / name).graph.node
        assert DOMAIN not in {node.domain for node in nodes}


def test_one_plugin(model: str, tmp_path: Path):
    manifest = Manifest.read(build(model, "layernorm", "fp32", out=tmp_path / "engines", onnx_only=True))
    assert [op.op for op in manifest.fused_ops] == ["TrOCRResidualLayerNorm", "TrOCRLayerNorm"]
    assert manifest.cache == "growing"


def test_capacity_is_rounded_up(model: str, tmp_path: Path):
    build(model, "attention", "fp32", out=tmp_path / "engines", max_length=5, onnx_only=True)
    manifest = Manifest.read(tmp_path / "engines")
    assert (manifest.max_length, manifest.cache_capacity) == (5, 32)


def test_second_build_changes_nothing(model: str, tmp_path: Path):
    command = [sys.executable, "build.py", "--model", model, "--precision", "fp32", "--onnx-only"]
    command += ["--out", str(tmp_path / "engines")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    before = snapshot(tmp_path / "engines")
    began = time.monotonic()
    # torch is what would take the time.
    probe = (
        "import sys, build; status = build.main(sys.argv[1:]); sys.exit(status or ('torch' in sys.modules))"
    )
    again = subprocess.run(
        [sys.executable, "-c", probe, *command[2:]], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert time.monotonic() - began < 5
    assert again.stdout == f"{tmp_path / 'engines'}: up to date\n"
    assert snapshot(tmp_path / "engines") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plugins": "layernorm"}, "plugins"),
        ({"batch": (1, 2, 4)}, "batch"),
        ({"max_length": 9}, "max_length"),
    ],
)
def test_changed_option_builds_again(model: str, tmp_path: Path, capsys, change: dict, named: str):
    options = {"plugins": "none", "precision": "fp32", "out": tmp_path / "engines", "onnx_only": True}
    build(model, **options)
    before = snapshot(tmp_path / "engines")
    capsys.readouterr()
    build(model, **(options | change))
    assert f"building again, changed: {named}\n" in capsys.readouterr().out
    assert snapshot(tmp_path / "engines")["manifest.json"] != before["manifest.json"]


def test_graphs_are_not_exported_again_for_other_sizes(model: str, tmp_path: Path, monkeypatch, capsys):
    """Batch and length are the engines' affair; other plugins, or a damaged graph, are the graphs'."""
    options = {"plugins": "layernorm", "precision": "fp32", "out": tmp_path / "engines", "onnx_only": True}
    build(model, **options)
    before = Manifest.read(tmp_path / "engines")
    exports = []
    write_graphs = build_module._write_graphs
    monkeypatch.setattr(
        build_module, "_write_graphs", lambda *args: exports.append(args) or write_graphs(*args)
    )
    build(model, **options, batch=(1, 2, 4), max_length=9)
    assert not exports and "graphs are up to date" in capsys.readouterr().out
    after = Manifest.read(tmp_path / "engines")
    assert (after.batch, after.max_length) == ((1, 2, 4), 9)
    assert (after.files, after.fused_ops) == (before.files, before.fused_ops)
    for name in after.files:
        after.check_file(tmp_path / "engines", name)

    (tmp_path / "engines" / "encoder.onnx").write_bytes(b"damaged")
    build(model, **options)
    assert len(exports) == 1
    build(model, **options | {"plugins": "none"})
    assert len(exports) == 2
    build(model, **options | {"plugins": "none"}, force=True)
    assert len(exports) == 3


def test_changed_bin_weights_build_again(model: str, tmp_path: Path, capsys):
    """Weights that are only there as `.bin` are part of the inputs and of the manifest as well."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    options = {"plugins": "none", "precision": "fp32", "out": tmp_path / "engines", "onnx_only": True}
    build(str(folder), **options)
    before = Manifest.read(tmp_path / "engines").weights_sha256
    torch.save({name: weight * 1.5 for name, weight in weights.items()}, folder / "pytorch_model.bin")
    capsys.readouterr()
    build(str(folder), **options)
    assert "building again, changed: checkpoint\n" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "engines").weights_sha256 != before


def test_missing_file_builds_again(model: str, tmp_path: Path, capsys):
    options = {"plugins": "none", "precision": "fp32", "out": tmp_path / "engines", "onnx_only": True}
    build(model, **options)
    (tmp_path / "engines" / "decoder.onnx").unlink()
    build(model, **options)
    assert "changed: decoder.onnx" in capsys.readouterr().out
    assert (tmp_path / "engines" / "decoder.onnx").is_file()


@pytest.mark.parametrize(
    ("interruption", "raised"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, BuildError)]
)
def test_interrupted_build_leaves_the_old_folder(
    model: str,
    tmp_path: Path,
    monkeypatch,
    interruption: type[BaseException],
    raised: type[BaseException],
):
    options = {"plugins": "none", "precision": "fp32", "out": tmp_path / "engines", "onnx_only": True}
    build(model, **options)
    before = snapshot(tmp_path / "engines")

    def interrupt(self, folder: Path) -> None:
        assert all((folder / name).is_file() for name in GRAPH_FILES)  # nearly done
        raise interruption

    monkeypatch.setattr(Manifest, "write", interrupt)
    with pytest.raises(raised):
        build(model, **options, force=True)
    with pytest.raises(raised):
        build(model, **(options | {"out": tmp_path / "new"}))
    assert snapshot(tmp_path / "engines") == before
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


@pytest.mark.parametrize("before", [False, True])
def test_another_process_builds_the_same_folder_at_once(
    model: str, tmp_path: Path, monkeypatch, before: bool
):
    """It puts its folder there a moment before this one would: the later one takes its place."""
    options = {"plugins": "none", "precision": "fp32", "out": tmp_path / "engines", "onnx_only": True}
    if before:
        build(model, **options)
    rename = Path.rename
    others = [tmp_path / "engines"]

    def other_first(self: Path, target: Path) -> Path:
        if target in others:
            shutil.copytree(self, others.pop())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", other_first)
    build(model, **options, force=True)
    assert others == []
    manifest = Manifest.read(tmp_path / "engines")
    for name in manifest.files:
        manifest.check_file(tmp_path / "engines", name)
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


@without_gpu
def test_without_gpu(model: str, tmp_path: Path, capsys):
    arguments = ["--model", model, "--precision", "fp32", "--out", str(tmp_path / "engines")]
    assert main(arguments) == 3
    output = capsys.readouterr()
    assert output.err.startswith("error: engines not built: no NVIDIA GPU")
    assert "--onnx-only" in output.err and output.err.count("\n") == 1
    assert Manifest.read(tmp_path / "engines").engines == {}
    assert main([*arguments, "--onnx-only"]) == 0
    with pytest.raises(NoEngines):
        build(model, precision="fp32", out=tmp_path / "engines")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--plugins", "layernorn"], "layernorn"),
        (["--model", BUNDLED, "--max-length", "129"], "--max-length 129"),
        (["--model", BUNDLED, "--max-length", "1"], "--max-length 1:"),
    ],
)
def test_wrong_input(tmp_path: Path, capsys, arguments: list[str], message: str):
    assert main([*arguments, "--onnx-only", "--out", str(tmp_path / "engines")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("batch", ["16", "8,1,16", "0,1,2", "1,2,x", ""])
def test_wrong_batch(capsys, batch: str):
    with pytest.raises(SystemExit) as exit_:
        main(["--batch", batch])
    assert exit_.value.code == 2
    assert "such as 1,8,16" in capsys.readouterr().err


def test_out_with_several_plugins(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--plugins", "none", "--plugins", "fused", "--out", "x"])
    assert exit_.value.code == 2


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("manifest", [None, '{"name": "a web page"}'])
def test_foreign_folder_is_not_replaced(model: str, tmp_path: Path, force: bool, manifest: str | None):
    (tmp_path / "thesis.txt").write_text("years of work")
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(BuildError, match="another --out"):
        build(model, out=tmp_path, onnx_only=True, force=force)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_file_is_not_replaced(model: str, tmp_path: Path, capsys, force: list[str]):
    out = tmp_path / "thesis.txt"
    out.write_text("years of work")
    assert main(["--model", model, "--onnx-only", "--out", str(out), *force]) == 2
    assert capsys.readouterr().err == f"error: {out}: a file; give another --out, of a folder\n"
    assert main(["--model", model, "--onnx-only", "--out", str(out / "below"), *force]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out / 'below'}: cannot be built (")
    assert out.read_text() == "years of work"


def test_truncated_weights(model: str, tmp_path: Path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in Path(model).iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["--model", str(broken), "--onnx-only", "--out", str(tmp_path / "engines")]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_command_builds_the_same_folder(model: str, tmp_path: Path):
    """The remedy that messages name."""
    out = tmp_path / "engines"
    build(model, "layernorm,bias_activation", "fp32", (1, 2, 4), out, max_length=9, onnx_only=True)
    first = Manifest.read(out)
    program, script, *arguments = first.command.split()
    assert (program, script) == ("python", "build.py")
    assert main([*arguments, "--onnx-only", "--force"]) == 0
    assert Manifest.read(out).inputs == first.inputs


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two images to calibrate with."""
    folder = tmp_path_factory.mktemp("lines")
    for name in ("000015.jpg", "000135.jpg"):
        shutil.copyfile(ROOT / "samples" / name, folder / name)
    return folder


def test_fp8(model: str, tmp_path: Path, lines: Path, capsys):
    """Graphs, ranges and manifest; the decoder's graphs are those of fp16."""
    options = {"calibration": [str(lines)], "out": tmp_path / "fp8", "onnx_only": True}
    folder = build(model, "fused", "fp8", **options)
    manifest = Manifest.read(folder)
    counts = {op.op: op.count for op in manifest.fused_ops}
    assert {op: count for op, count in counts.items() if "Fp8" in op} == {
        "TrOCRFp8EncoderAttention": 2,
        "TrOCRFp8RowStatistics": 1,
        "TrOCRFp8LayerNormLinear": 4,
        "TrOCRFp8LinearResidual": 4,
    }
    assert not counts.keys() & {"TrOCREncoderAttention", "TrOCRLayerNormLinear", "TrOCRLinearResidual"}
    assert (manifest.precision, manifest.inputs["calibration"]["images"]) == ("fp8", 2)
    assert f"--precision fp8 --batch 1,8,16 --out {folder} --calibration {lines}" in manifest.command
    assert DECODER_WEIGHTS in manifest.files
    encoder = {entry.key: entry.value for entry in onnx.load(folder / "encoder.onnx").metadata_props}
    assert encoder["trocr.precision"] == "fp8" and len(json.loads(encoder["trocr.ranges"])) == 8
    half = build(model, "fused", "fp16", out=tmp_path / "fp16", onnx_only=True)
    for name in ("cross_kv.onnx", "decoder.onnx", DECODER_WEIGHTS):
        assert manifest.files[name] == Manifest.read(half).files[name]
    ort.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])

    before = snapshot(folder)
    capsys.readouterr()
    build(model, "fused", "fp8", **options)
    assert capsys.readouterr().out == f"{folder}: up to date\n"
    assert snapshot(folder) == before


def test_other_calibration_images_build_again(model: str, tmp_path: Path, lines: Path, capsys):
    own = tmp_path / "lines"
    shutil.copytree(lines, own)
    options = {"calibration": [str(own)], "out": tmp_path / "engines", "onnx_only": True}
    build(model, "fused", "fp8", **options)
    shutil.copyfile(ROOT / "samples" / "000188.jpg", own / "000135.jpg")
    capsys.readouterr()
    build(model, "fused", "fp8", **options)
    assert "building again, changed: calibration\n" in capsys.readouterr().out
    build(model, "fused", "fp8", **options, batch=(1, 2, 4))
    assert "graphs are up to date" in capsys.readouterr().out


def test_an_fp8_build_that_is_up_to_date_needs_no_torch(model: str, tmp_path: Path, lines: Path):
    options = ["--model", model, "--precision", "fp8", "--onnx-only", "--out", str(tmp_path / "engines")]
    options += ["--calibration", str(lines / "000015.jpg"), str(lines / "000135.jpg")]
    assert main(options) == 0
    probe = (
        "import sys, build; status = build.main(sys.argv[1:]); sys.exit(status or ('torch' in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", probe, *options], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--precision", "fp8", "--plugins", "none"],
            "leaves out encoder_attention and linear; add them (--plugins fused), or choose --precision fp16",
        ),
        (["--precision", "fp8", "--plugins", "encoder_attention,layernorm"], "leaves out linear; add"),
        (["--precision", "fp16", "--calibration", "samples"], "precision fp16 needs none; leave it out"),
        (["--precision", "fp8", "--calibration", "no/such.png"], "no/such.png: no such file"),
    ],
)
def test_fp8_errors(tmp_path: Path, capsys, arguments: list[str], message: str):
    assert main([*arguments, "--onnx-only", "--out", str(tmp_path / "engines")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and message in error and error.count("\n") == 1
    assert not (tmp_path / "engines").exists()


def test_fp8_is_refused_on_other_gpus(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "current_gpu", lambda: Gpu("NVIDIA L4", "8.9", "13.0"))
    assert main(["--precision", "fp8", "--out", str(tmp_path / "engines")]) == 2
    error = capsys.readouterr().err
    assert "compute capability 9.0 alone, this GPU is NVIDIA L4 (8.9); choose --precision fp16" in error
    assert not (tmp_path / "engines").exists()


def test_default_folder():
    assert default_folder("models/trocr-tiny-printed/", "attention,layernorm", "bf16") == Path(
        "engines/trocr-tiny-printed-bf16-attention+layernorm"
    )


def test_unknown_plugin_is_named():
    with pytest.raises(SurgeryError, match="encoder_atention"):
        build(BUNDLED, "encoder_atention")


def test_timing_cache_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "folder" / "timing.cache"
    build_module._replace_file(path, b"first")
    build_module._replace_file(path, b"second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in path.parent.iterdir()] == ["timing.cache"]


def test_manifest_is_plain_json(model: str, tmp_path: Path):
    build(model, "none", "fp32", out=tmp_path / "engines", onnx_only=True)
    content = json.loads((tmp_path / "engines" / "manifest.json").read_text())
    assert content["format"] == 1 and content["batch"] == [1, 8, 16]


@pytest.mark.parametrize(
    ("plugins", "precision", "packed"),
    [
        ("fused", "fp16", True),
        ("fused", "bf16", True),
        ("fused", "fp32", False),
        ("attention", "fp16", False),
    ],
)
def test_weights_of_the_device_decoder(
    model: str, tmp_path: Path, plugins: str, precision: str, packed: bool
):
    folder = build(model, plugins, precision, out=tmp_path / "engines", onnx_only=True)
    assert (folder / DECODER_WEIGHTS).is_file() == packed
    assert (DECODER_WEIGHTS in Manifest.read(folder).files) == packed
