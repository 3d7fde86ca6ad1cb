"""The manifest: what is written is read again, and whatever is wrong with a folder has its own message."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.manifest import FILE_NAME, FusedOp, Manifest, ManifestError

COMMAND = "python build.py --model M"


def make_folder(folder: Path, change: Callable[[Manifest], None] = lambda manifest: None) -> Manifest:
    """A folder with one engine file, as if built for an H200 and TensorRT 10.6.0."""
    folder.mkdir()
    (folder / "encoder.engine").write_bytes(b"a plan")
    manifest = Manifest(
        model="M",
        weights_sha256="0" * 64,
        precision="fp16",
        plugins=["layernorm"],
        fused_ops=[FusedOp("TrOCRResidualLayerNorm", "1", 43)],
        cache="growing",
        cache_capacity=None,
        batch=(1, 8, 16),
        max_length=97,
        inputs={"precision": "fp16"},
        command=COMMAND,
        date="2026-11-22T20:00:00+00:00",
        engines={"encoder": 71.5},
        tensorrt="10.6.0",
        gpu="NVIDIA H200",
        compute_capability="9.0",
        cuda="13.0",
        plugin_library_sha256="1" * 64,
    )
    change(manifest)
    manifest.write(folder)
    return manifest


def test_round_trip(tmp_path: Path):
    written = make_folder(tmp_path / "engines")
    read = Manifest.read(tmp_path / "engines")
    assert read == written
    assert read.files.keys() == {"encoder.engine"}
    read.check_file(tmp_path / "engines", "encoder.engine")
    read.check_machine(tmp_path / "engines", "10.6.0", "NVIDIA H200", "9.0")


def test_no_manifest(tmp_path: Path):
    with pytest.raises(ManifestError, match=r"manifest.json: not found.*python build.py"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\x00\x01"])
def test_not_json(tmp_path: Path, text: str):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ManifestError, match=r"manifest.json: unreadable.*python build.py"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(("content", "found"), [([], "'list'"), ({}, "None"), ({"format": 99}, "99")])
def test_other_format(tmp_path: Path, content, found: str):
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=f"format {found}, not 1"):
        Manifest.read(tmp_path)


def test_missing_field(tmp_path: Path):
    make_folder(tmp_path / "engines")
    path = tmp_path / "engines" / FILE_NAME
    content = json.loads(path.read_text())
    del content["cache"]
    path.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"fields missing or unknown: cache;"):
        Manifest.read(tmp_path / "engines")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fused_ops", None),
        ("fused_ops", [1]),
        ("fused_ops", [{"name": "TrOCRAttention"}]),
        ("batch", 5),
        ("inputs", []),
        ("engines", None),
        ("files", ["encoder.engine"]),
    ],
)
def test_field_of_another_kind(tmp_path: Path, field: str, value):
    make_folder(tmp_path / "engines")
    path = tmp_path / "engines" / FILE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ManifestError, match=rf"manifest.json: .*{field}.*; build the folder again"):
        Manifest.read(tmp_path / "engines")


def test_changed_byte(tmp_path: Path):
    manifest = make_folder(tmp_path / "engines")
    (tmp_path / "engines" / "encoder.engine").write_bytes(b"A plan")
    with pytest.raises(ManifestError, match=rf"encoder.engine: damaged or replaced.*{COMMAND} --force"):
        manifest.check_file(tmp_path / "engines", "encoder.engine")


def test_missing_file(tmp_path: Path):
    manifest = make_folder(tmp_path / "engines")
    (tmp_path / "engines" / "encoder.engine").unlink()
    with pytest.raises(ManifestError, match=rf"encoder.engine: missing.*{COMMAND}"):
        manifest.check_file(tmp_path / "engines", "encoder.engine")


def test_file_of_another_build(tmp_path: Path):
    manifest = make_folder(tmp_path / "engines")
    (tmp_path / "engines" / "decoder.engine").write_bytes(b"stray")
    with pytest.raises(
        ManifestError, match=r"decoder.engine: not in the manifest, which lists encoder.engine"
    ):
        manifest.check_file(tmp_path / "engines", "decoder.engine")


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (("11.2.0", "NVIDIA H200", "9.0"), r"built with TensorRT 10\.6\.0, found TensorRT 11\.2\.0 here"),
        (
            ("10.6.0", "NVIDIA L4", "8.9"),
            r"built for NVIDIA H200 \(compute .* 9\.0\), this GPU is NVIDIA L4 \(8\.9\)",
        ),
        (("10.6.0", "NVIDIA H200", "9.1"), r"this GPU is NVIDIA H200 \(9\.1\)"),
    ],
)
def test_other_machine(tmp_path: Path, machine: tuple[str, str, str], message: str):
    manifest = make_folder(tmp_path / "engines")
    with pytest.raises(ManifestError, match=message) as caught:
        manifest.check_machine(tmp_path / "engines", *machine)
    assert str(tmp_path / "engines" / FILE_NAME) in str(caught.value)
    assert COMMAND in str(caught.value)


def test_fp8_on_another_gpu(tmp_path: Path):
    """With engines or without: building them there is no remedy."""
    folder = tmp_path / "engines"
    manifest = make_folder(folder, lambda manifest: setattr(manifest, "precision", "fp8"))
    manifest.check_machine(folder, "10.6.0", "NVIDIA H200", "9.0")
    for engines in (manifest.engines, {}):
        manifest.engines = engines
        with pytest.raises(
            ManifestError, match=r"fp8 runs on .* 9\.0 alone, .* NVIDIA L4 \(8\.9\).*--precision fp16"
        ):
            manifest.check_machine(folder, "10.6.0", "NVIDIA L4", "8.9")


def test_no_engines(tmp_path: Path):
    manifest = make_folder(tmp_path / "engines", lambda manifest: manifest.engines.clear())
    with pytest.raises(ManifestError, match="holds ONNX graphs but no engines"):
        manifest.check_machine(tmp_path / "engines", "10.6.0", "NVIDIA H200", "9.0")


def test_fields_are_documented():
    assert all(
        f"{field.name}" in Manifest.__doc__
        for field in dataclasses.fields(Manifest)
        if field.name != "format"
    )
