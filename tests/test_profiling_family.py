"""The family's measurements: preparing graphs, one configuration's failure, the file, the table."""

import json
from pathlib import Path

import pytest

from graph_surgery import architectures
from profiling import family
from profiling.family import CONFIGURATIONS, checkpoints_of
from profiling.records import ROOT
from profiling.summary import filled
from runtime.gpu import current_gpu
from runtime.manifest import Manifest
from tests.checkpoints import ENCODER, SMALL_DECODER


def test_every_published_checkpoint_is_in_it():
    names = [name for configuration in CONFIGURATIONS for name in checkpoints_of(configuration)]
    assert sorted(names) == sorted([*architectures.PUBLISHED, "models/trocr-tiny-printed"])


def test_prepare(tmp_path: Path, monkeypatch):
    """A checkpoint and graphs, in the layout that engines are then added to."""
    encoder, decoder = architectures.ARCHITECTURES["small"]
    monkeypatch.setitem(architectures.ARCHITECTURES, "small", (encoder | ENCODER, decoder | SMALL_DECODER))
    family.prepare("small", tmp_path, device="cpu")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    stock, fused = (Manifest.read(tmp_path / variant) for variant in family.VARIANTS)
    assert (stock.precision, stock.batch, stock.engines) == (family.PRECISION, family.PROFILE, {})
    assert not stock.fused_ops and {op.op for op in fused.fused_ops} > {"TrOCREncoderAttention"}


def entry(configuration: str, **changes) -> dict:
    engine = {"build_s": 9.5, "engine_bytes": 3 * 2**20, "encoder_ms": 0.5, "encoder_rel_error": 1e-3}
    engine |= {"us_per_token": 101.4, "same_tokens": 0.95}
    return {
        "configuration": configuration,
        "checkpoints": checkpoints_of(configuration),
        "weights": "random",
        "precision": "fp16",
        "parameters": 61_600_000,
        "tokens": 20,
        "engines": {"stock": engine | {"us_per_token": 300.0}, "fused": engine},
        "gpu": "G",
        "tensorrt": "10",
        "date": "2026",
    } | changes


def test_one_configuration_fails_and_the_others_are_measured(tmp_path: Path, monkeypatch, capsys):
    def prepare(name: str, folder: Path) -> None:
        if name == "base":
            raise RuntimeError("no space left")
        (folder / "stock").mkdir(parents=True)

    monkeypatch.setattr(family, "prepare_in_a_process", prepare)
    monkeypatch.setattr(family, "measure", lambda name, folder: entry(name))
    saved = []
    failed = family.run(["small", "base", "large"], tmp_path, 2, saved.append)
    assert [found["configuration"] for found in saved] == ["small", "large"]
    assert failed == ["base: RuntimeError: no space left"]
    assert not list(tmp_path.iterdir())  # gigabytes each
    assert "error: base" in capsys.readouterr().err


def test_a_process_that_fails_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        family.prepare_in_a_process("nothing", tmp_path)


def test_only_replaces_the_entries_it_measured(tmp_path: Path, monkeypatch):
    out = tmp_path / "family.json"
    out.write_text(json.dumps([entry("chinese"), entry("large", parameters=1)]))
    monkeypatch.setattr(family, "current_gpu", lambda: object())
    monkeypatch.setattr(family, "load_tensorrt", lambda: None)

    def run(names, scratch, jobs, save) -> list[str]:
        assert names == ["small", "large"]
        for name in names:
            save(entry(name, parameters=2))
        return []

    monkeypatch.setattr(family, "run", run)
    assert family.main(["--only", "large,small", "--out", str(out)]) == 0
    found = {known["configuration"]: known["parameters"] for known in json.loads(out.read_text())}
    assert found == {"chinese": 61_600_000, "small": 2, "large": 2}
    assert list(found) == ["chinese", "small", "large"]


@pytest.mark.skipif(current_gpu() is not None, reason="there is a GPU: it would be measured")
def test_without_a_gpu(capsys):
    assert family.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        family.main(["--only", "tiny"])


def test_table(tmp_path: Path):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "family.json").write_text(json.dumps([entry("small"), entry("base")]))
    text = "<!-- results: family gpu -->\n<!-- end of results -->\n"
    rows = [line for line in filled(text, tmp_path, "en").splitlines() if "microsoft/" in line]
    assert len(rows) == 5
    cells = [cell.strip() for cell in rows[0].split("|")[2:-1]]
    assert cells == [
        "random weights, full size", "61.6 M", "0.500 / 0.500", "300 / 101", "3 / 3", "10 / 10", "95% / 95%",
    ]  # fmt: skip


def test_docs_table_is_the_committed_one():
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert filled(text, ROOT / "results", "en") == text, "run: python -m profiling.summary --docs"
