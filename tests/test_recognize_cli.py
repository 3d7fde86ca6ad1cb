"""The command line: in a process of its own where that matters, else in this one, which is quicker."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jiwer
import pytest
from PIL import Image

from runtime import recognize
from runtime.backends.base import BackendError
from runtime.metrics import accuracy
from tests.conftest import BUNDLED_MODEL

ROOT = BUNDLED_MODEL.parent.parent
SAMPLES = ROOT / "samples"
REFERENCE = ROOT / "data" / "lines-val.hf-greedy.tsv"

Graphs = Callable[[Path, str], Path]


@pytest.fixture
def engines(graphs: Graphs) -> list[str]:
    """The options that spare a test the build."""
    return ["--engines", str(graphs(BUNDLED_MODEL, "all")), "--backend", "onnxruntime"]


def test_beam_search(engines: list[str], capsys: pytest.CaptureFixture):
    options = ["--num-beams", "2", "--early-stopping", "never", "--length-penalty", "2", *engines]
    assert recognize.main([*options, str(SAMPLES / "000015.jpg")]) == 0
    assert "000015.jpg" in capsys.readouterr().out
    assert recognize.main([*engines, "--early-stopping", "soon", str(SAMPLES / "000015.jpg")]) == 2
    assert "early_stopping is 'soon'; choose False, True or 'never'" in capsys.readouterr().err


def test_labels_json_and_bad_files_in_one_run(engines: list[str], tmp_path: Path):
    """Five good lines, one of them without a label and one named twice; and everything that can be wrong."""
    folder, empty = tmp_path / "lines", tmp_path / "empty"
    folder.mkdir()
    empty.mkdir()
    names = ["000015.jpg", "000135.jpg", "000188.jpg", "000514.jpg"]
    for name in names:
        shutil.copyfile(SAMPLES / name, folder / name)
    (folder / "notes.txt").write_text("Not an image, and not named like one.\n")
    (folder / "text.png").write_text("This is not an image.\n")
    Image.new("L", (20000, 64)).save(folder / "wide.png")
    Image.new("L", (1, 1)).save(folder / "dot.png")
    missing = tmp_path / "missing.jpg"
    unlabelled = tmp_path / "unlabelled.jpg"
    shutil.copyfile(SAMPLES / "000196.jpg", unlabelled)
    labels = tmp_path / "labels.tsv"
    rows = [line for line in (SAMPLES / "labels.tsv").read_text().splitlines() if line[:10] in names]
    labels.write_text("\n".join(rows) + "\ntext.png\tlabelled all the same\n")
    report_file = tmp_path / "report.json"

    paths = [folder, empty, missing, unlabelled, folder / names[0]]
    options = ["--labels", labels, "--ignore-case", "--json", report_file, *engines]
    run = subprocess.run(
        [sys.executable, "-m", "runtime.recognize", *map(str, [*options, *paths])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 1, run.stderr
    report = json.loads(report_file.read_text())
    records = {record["path"]: record for record in report["records"]}
    files = sorted([*names, "text.png", "wide.png", "dot.png"])
    in_order = [str(folder / name) for name in files] + [
        str(missing),
        str(unlabelled),
        str(folder / names[0]),
    ]
    assert [record["path"] for record in report["records"]] == [str(empty), *in_order]

    errors = {
        folder / "text.png": "not a readable",
        folder / "wide.png": "20000x64 pixels",
        folder / "dot.png": "1x1 pixels",
        missing: "no such file",
        empty: "no images in this folder",
    }
    for path, message in errors.items():
        record = records.pop(str(path))
        assert record["error"].startswith(f"{path}: {message}")
        assert (record["text"], record["token_ids"], record["mean_log_prob"]) == (None, None, None)
        assert f"error: {record['error']}" in run.stderr.splitlines()
    assert all(record["error"] is None for record in records.values())
    assert records[str(folder / "000135.jpg")]["text"] == "Qty Count : 3.0"
    assert records[str(folder / "000135.jpg")]["label"] == "QTY COUNT : 3.0"
    assert records[str(folder / "000135.jpg")]["token_ids"][-1] == 2
    assert -1 < records[str(folder / "000135.jpg")]["mean_log_prob"] < 0
    assert records[str(unlabelled)]["label"] is None

    # CODE twice, QTY COUNT : 3.0, AMOUNT and ROUNDING ADJ.:, which is read with a space before the colon.
    characters = 2 * len("CODE") + len("QTY COUNT : 3.0") + len("AMOUNT") + len("ROUNDING ADJ.:")
    assert report["cer"] == pytest.approx(1 / characters)
    assert report["exact_match"] == pytest.approx(4 / 5)
    assert (report["lines"], report["failed"], report["labelled_lines"]) == (6, 5, 5)
    assert report["lines_per_s"] > 0
    assert (report["backend"], report["model"]) == ("onnxruntime", str(BUNDLED_MODEL))

    *table, closing = run.stdout.splitlines()
    assert table[0].split() == ["image", "text", "label"]
    assert table[1].split() == [str(folder / "000015.jpg"), "Code", "CODE"]
    assert len(table) == 1 + 6
    assert closing.startswith(f"CER {1 / characters:.2%}, exact match 80.00% (case ignored), 6 lines, ")
    assert closing.endswith(" lines/s, backend onnxruntime, 5 failed")
    assert f"warning: 4 of 10 images have no label in {labels}" in run.stderr.splitlines()
    assert "backend: onnxruntime" in run.stderr.splitlines()


def test_all_well_without_labels(engines: list[str], capsys: pytest.CaptureFixture, tmp_path: Path):
    report_file = tmp_path / "report.json"
    pattern = str(SAMPLES / "00013[0-9].jpg")
    assert recognize.main([pattern, *engines, "--json", str(report_file), "--batch-size", "2"]) == 0
    table_head, row, closing = capsys.readouterr().out.splitlines()
    assert table_head.split() == ["image", "text"]
    assert row == f"{SAMPLES / '000135.jpg'}  Qty Count : 3.0"
    assert closing.startswith("1 lines, ")
    report = json.loads(report_file.read_text())
    assert (report["cer"], report["exact_match"], report["batch_size"]) == (None, None, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_case_counts_unless_it_is_ignored(engines: list[str], tmp_path: Path):
    report_file = tmp_path / "report.json"
    options = ["--labels", str(SAMPLES / "labels.tsv"), "--json", str(report_file), *engines]
    assert recognize.main([str(SAMPLES / "000015.jpg"), *options]) == 0
    report = json.loads(report_file.read_text())
    assert (report["cer"], report["exact_match"]) == (3 / 4, 0)  # "Code" for CODE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "{tmp}/nowhere", "{line}"], "{tmp}/nowhere does not exist"),
        (["--model", "{tmp}", "{line}"], "{tmp} has no config.json"),
        (["--model", "{tmp}/bert", "{line}"], "{tmp}/bert/config.json: model_type is 'bert', not"),
        (["--model", "{tmp}/cut", "{line}"], "{tmp}/cut/model.safetensors is missing, truncated or damaged"),
        (["--engines", "{tmp}", "{line}"], "{tmp}/manifest.json: not found"),
        (["{tmp}/empty"], "{tmp}/empty: no images in this folder; put .jpg"),
        (["{tmp}/*.jpg"], "{tmp}/*.jpg: matches no file; check the pattern"),
        (["--json", "{tmp}/no/report.json", "{line}"], "{tmp}/no/report.json: there is no folder {tmp}/no"),
        (["--json", "{tmp}/empty", "{line}"], "{tmp}/empty: a folder; name the file to write"),
        (["--json", "{tmp}/pipe", "{line}"], "{tmp}/pipe: a device, a pipe or where this prints"),
        (["--json", "/proc/report.json", "{line}"], "/proc/report.json: cannot be written (No such file"),
        (["--labels", "{tmp}/no.tsv", "{line}"], "{tmp}/no.tsv: "),
        (["--labels", "{tmp}/bad.tsv", "{line}"], "{tmp}/bad.tsv: line 2 is 'no tab here'; an image, a tab"),
        (["--labels", "{tmp}/twice.tsv", "{line}"], "{tmp}/twice.tsv: line 2 gives a.png another text"),
        (["--labels", "{line}", "{line}"], "{line}: "),
        (["--batch-size", "0", "{line}"], "batch_size is 0"),
        (["--max-new-tokens", "1000", "{line}"], "max_new_tokens is 1000"),
        (["--num-beams", "2", "--length-penalty", "1000", "{line}"], "length_penalty is 1000.0"),
        (["--e4m3-cross", "{line}"], "backend onnxruntime has no e4m3_cross"),
        (["--e4m3-cross", "--num-beams", "2", "{line}"], "e4m3_cross is of greedy search alone"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    message: str,
    engines: list[str],
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)  # what is built by default goes to the current folder
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    weights = shutil.copytree(checkpoint("small"), tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "bad.tsv").write_text("a.png\ttext\nno tab here\n")
    (tmp_path / "twice.tsv").write_text("a.png\tone\na.png\ttwo\n")
    places = {"tmp": tmp_path, "line": SAMPLES / "000015.jpg"}
    arguments = [argument.format(**places) for argument in arguments]
    if not {"--model", "--engines"} & set(arguments):
        arguments += engines
    assert recognize.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {message.format(**places)}")


@pytest.fixture
def not_utf8(tmp_path: Path) -> str:
    """A sample whose file name has a byte that is no UTF-8."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    shutil.copyfile(SAMPLES / "000015.jpg", name)
    return name


@pytest.mark.parametrize("encoding", ["ascii:strict", "utf-8:strict"])
def test_names_that_cannot_be_printed(encoding: str, engines: list[str], tmp_path: Path, not_utf8: str):
    """They are escaped, the lines after them are read, and the JSON has the name as it is."""
    report_file = tmp_path / "report.json"
    other = shutil.copyfile(SAMPLES / "000135.jpg", tmp_path / "Größe.jpg")
    run = subprocess.run(
        [sys.executable, "-m", "runtime.recognize", *engines, "--json", report_file, not_utf8, other],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert run.returncode == 0, run.stderr
    assert b"caf\\udce9.jpg" in run.stdout and b"Qty Count : 3.0" in run.stdout
    records = json.loads(report_file.read_text(encoding="utf-8"))["records"]
    assert [record["path"] for record in records] == [not_utf8, str(other)]


def test_json_that_cannot_be_written(engines: list[str], tmp_path: Path):
    """As on a full disk: one error, what was read is printed, and nothing is left behind."""
    report_file = tmp_path / "report.json"
    report_file.write_text("earlier\n")
    run = subprocess.run(
        [sys.executable, "-m", "runtime.recognize", *engines, "--json", report_file, SAMPLES / "000015.jpg"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith(f"error: {report_file}: cannot be written (File too large)")
    assert "Traceback" not in run.stderr
    assert run.stdout.splitlines()[-1].startswith("1 lines, ")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.json", "earlier\n")]


@pytest.mark.parametrize("named", ["/dev/stdout", "itself"])
def test_json_where_the_table_goes(named: str, engines: list[str], tmp_path: Path):
    """Its file would be replaced, and the table be lost."""
    printed = tmp_path / "printed.txt"
    name = str(printed) if named == "itself" else named
    with printed.open("w") as file:
        run = subprocess.run(
            [sys.executable, "-m", "runtime.recognize", *engines, "--json", name, SAMPLES / "000015.jpg"],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert run.returncode == 2
    assert run.stderr == f"error: {name}: a device, a pipe or where this prints to; name a file to write\n"
    assert printed.read_text() == ""


def test_json_by_way_of_a_link(tmp_path: Path):
    (tmp_path / "link.json").symlink_to("real.json")
    recognize.check_output(tmp_path / "link.json")
    recognize.write_json(tmp_path / "link.json", {})
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "{}\n"


def test_long_command_line():
    """ONNX Runtime's telemetry crashes on it at import, and is switched off for that and for privacy."""
    code = "import runtime.backends.onnxruntime_backend, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    names = [f"/a/folder/of/images/line-{number}.jpg" for number in range(3000)]
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    run = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert (run.returncode, run.stdout) == (0, "1\n"), run.stderr


@pytest.mark.parametrize("ending", ["interrupted", "head"])
def test_early_end(ending: str, engines: list[str], tmp_path: Path):
    """Ctrl-C, or a reader that has seen enough: no traceback, and no JSON."""
    report_file = tmp_path / "report.json"
    images = [str(file) for file in sorted(SAMPLES.glob("*.jpg"))] * 20
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.recognize", *engines, "--json", str(report_file), *images],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout.readline().split() == ["image", "text"]
        assert "Code" in process.stdout.readline()
        if ending == "interrupted":
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == {"interrupted": 130, "head": 1}[ending]
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert errors.endswith("error: interrupted\n") == (ending == "interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "asked"), [([], False), (["--e4m3-cross"], True)])
def test_e4m3_is_asked_for(option: list[str], asked: bool, monkeypatch: pytest.MonkeyPatch):
    found = []

    def recognizer(model: str, **options):
        found.append(options["e4m3_cross"])
        raise BackendError("enough")

    monkeypatch.setattr(recognize, "Recognizer", recognizer)
    assert recognize.main([*option, str(SAMPLES / "000015.jpg")]) == 2
    assert found == [asked]


@pytest.mark.parametrize("arguments", [[], ["--backend", "cuda", "x.png"], ["--batch-size", "two", "x.png"]])
def test_wrong_options(arguments: list[str]):
    with pytest.raises(SystemExit) as caught:
        recognize.main(arguments)
    assert caught.value.code == 2


def test_find_images(tmp_path: Path):
    for name in ["b.PNG", "a.jpg", "c.tiff", "d.webp", "notes.txt", "e[1].png"]:
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "f.png").touch()

    def found(*arguments: str) -> list[str]:
        images, errors = recognize.find_images([str(tmp_path / argument) for argument in arguments])
        assert not errors
        return [str(Path(image).relative_to(tmp_path)) for image in images]

    assert found(".") == ["a.jpg", "b.PNG", "c.tiff", "d.webp", "e[1].png"]
    assert found("*.txt", "a.jpg", "a.jpg") == ["notes.txt", "a.jpg", "a.jpg"]
    assert found("**/*.png") == ["below/f.png", "e[1].png"]
    assert found("e[1].png") == ["e[1].png"]
    assert found("nowhere.png") == ["nowhere.png"]


def test_labels(tmp_path: Path):
    file = tmp_path / "labels.tsv"
    file.write_text(
        "\ufeffa.png\tone\tx\ty\n\nbelow/b.png\ttwo\nc.png\t\nother/c.png\tthree\n", encoding="utf-8"
    )
    labels = recognize.Labels(file)
    assert labels.find(str(tmp_path / "a.png")) == "one"
    assert labels.find(str(tmp_path / "below" / "b.png")) == "two"
    assert labels.find("/somewhere/else/b.png") == "two"
    assert labels.find(str(tmp_path / "c.png")) == ""
    assert labels.find("/somewhere/else/c.png") is None  # it could be either
    assert labels.find(str(tmp_path / "d.png")) is None


def test_labels_end_at_line_feeds_alone(tmp_path: Path):
    file = tmp_path / "labels.tsv"
    file.write_bytes("a.png\tone\x0ctwo\u2028three\x85\tcolumn\r\nb.png\tfour\n".encode())
    assert recognize.Labels(file).texts == {"a.png": "one\x0ctwo\u2028three\x85", "b.png": "four"}


def test_error_rate_of_hugging_face_on_all_lines():
    """The figures that models/trocr-tiny-printed/README.md gives for these texts."""
    rows = [line.split("\t") for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    _, labels, texts = zip(*rows, strict=True)
    found = accuracy(labels, texts, ignore_case=True)
    assert found.lines == 1934
    assert round(100 * found.cer, 2) == 0.83
    assert round(100 * found.exact_match, 2) == 92.66
    assert accuracy(labels, texts).cer > 0.2


def test_error_rate_is_of_the_whole_set():
    """All edits over all characters: not the mean of the lines' rates."""
    found = accuracy(["abcdefgh", "xy"], ["abcdefgh", "x"])
    assert found.cer == pytest.approx(1 / 10)
    assert found.cer == jiwer.cer(["abcdefgh", "xy"], ["abcdefgh", "x"])
    assert found.exact_match == 0.5
    assert accuracy([], []) is None
    assert accuracy(["a"], ["abc"]).cer == 2
