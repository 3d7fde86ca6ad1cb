"""The evaluation command: figures against those counted by hand, and a page that needs nothing else."""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import jiwer
import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime import evaluate, recognize
from runtime.metrics import accuracy, by_length, line_errors
from tests.conftest import BUNDLED_MODEL

ROOT = BUNDLED_MODEL.parent.parent
SAMPLES = ROOT / "samples"
NAMES = ["000015.jpg", "000135.jpg", "000188.jpg", "000514.jpg"]  # the last one is read with one more space

Graphs = Callable[[Path, str], Path]


@pytest.fixture
def options(graphs: Graphs) -> list[str]:
    """The options that spare a test the build."""
    engines = str(graphs(BUNDLED_MODEL, "all"))
    return ["--model", str(BUNDLED_MODEL), "--engines", engines, "--backend", "onnxruntime"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A folder with four sample lines, one of them in a folder of its own, and their labels.tsv."""
    folder = tmp_path / "lines"
    (folder / "more").mkdir(parents=True)
    labels = dict(row.split("\t")[:2] for row in (SAMPLES / "labels.tsv").read_text().splitlines())
    rows = []
    for name in NAMES:
        place = f"more/{name}" if name == "000188.jpg" else name
        shutil.copyfile(SAMPLES / name, folder / place)
        rows.append(f"{place}\t{labels[name]}\tanother column\n")
    (folder / "labels.tsv").write_text("".join(rows))
    return folder


def test_folder(options: list[str], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    json_file, html_file = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ["--data", str(lines), "--json", str(json_file), "--html", str(html_file), "--ignore-case"]
    assert evaluate.main([*options, *arguments]) == 0

    report = json.loads(json_file.read_text())
    labels = ["CODE", "QTY COUNT : 3.0", "AMOUNT", "ROUNDING ADJ.:"]
    assert (report["lines"], report["failed"]) == (4, 0)
    assert report["cer"] == pytest.approx(1 / sum(map(len, labels)))
    assert report["wer"] == pytest.approx(2 / 8)  # ADJ.: became two words
    assert report["exact_match"] == 3 / 4
    assert [(row["shortest"], row["longest"], row["lines"]) for row in report["by_length"]] == [
        (0, 5, 1),
        (6, 10, 1),
        (11, 20, 2),
    ]
    assert report["by_length"][2]["cer"] == pytest.approx(1 / 29)
    worst = report["records"][0]
    assert (worst["image"], worst["text"], worst["edits"]) == ("000514.jpg", "Rounding Adj. :", 1)
    assert worst["cer"] == pytest.approx(1 / 14)
    assert {record["image"] for record in report["records"]} == {*NAMES} - {"000188.jpg"} | {
        "more/000188.jpg"
    }
    assert sorted(record["edits"] for record in report["records"]) == [0, 0, 0, 1]

    printed = capsys.readouterr()
    assert printed.out.count("000514.jpg") == 1 and "000135.jpg" not in printed.out
    assert re.search(r"^all +4 +2\.56% +25\.00% +75\.00%$", printed.out, re.MULTILINE)
    assert "4 lines, case ignored, 0 failed" in printed.out
    assert "backend: onnxruntime" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines", "report.html", "report.json"]


class Links(html.parser.HTMLParser):
    """What a page refers to, and whether its elements are closed in their order."""

    def __init__(self):
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_the_images_and_escapes_texts(
    options: list[str], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    with Image.open(lines / "000135.jpg") as image:
        image.save(lines / "line.tif")
    labels = lines / "labels.tsv"
    labels.write_text(labels.read_text() + "line.tif\t<script>alert(1)</script> & Co\n")
    (lines / "broken.png").write_text("This is not an image.\n")
    labels.write_text(labels.read_text() + "broken.png\tunread\nabsent.png\tunread\n")
    html_file = tmp_path / "report.html"
    arguments = ["--data", str(lines), "--html", str(html_file), "--ignore-case"]
    assert evaluate.main([*options, *arguments]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors[0].startswith(f"error: {lines / 'broken.png'}: not a readable")
    assert errors[1] == f"error: {lines / 'absent.png'}: no such file; check the path"

    page = Links()
    page.feed(html_file.read_text(encoding="utf-8"))
    assert page.open == []
    assert [reference.split(",")[0] for reference in page.references] == [
        "data:image/png;base64",  # worst first: the TIFF, which browsers do not show
        "data:image/jpeg;base64",
    ]
    assert "<SCRIPT>ALERT(1)</SCRIPT> & CO" in page.text
    assert "2 images could not be read" in " ".join(page.text.split())
    assert f"{lines / 'broken.png'}: not a readable" in page.text
    source = html_file.read_text(encoding="utf-8")
    assert '<div class="line">ROUNDING ADJ.:</div>' in source
    assert '<div class="line">ROUNDING ADJ.<ins> </ins>:</div>' in source


@pytest.mark.parametrize("kind", ["stored sideways", "16 bit", "transparent"])
def test_page_shows_what_was_read(kind: str, tmp_path: Path):
    """Of a type that browsers do not show, which is converted."""
    file = tmp_path / "line.tif"
    with Image.open(SAMPLES / "000135.jpg") as image:
        image = image.convert("L")
    match kind:
        case "stored sideways":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
        case "16 bit":
            Image.fromarray(np.asarray(image).astype(np.uint16) * 257).save(file)
        case "transparent":
            ink = Image.new("RGBA", image.size, "black")
            ink.putalpha(ImageOps.invert(image))
            ink.save(file)
    head, content = evaluate.data_uri(file).split(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)
    assert shown.shape == (*image.size[::-1], 3)
    assert np.abs(shown - np.asarray(image)[:, :, None]).max() <= 1


@pytest.mark.parametrize("worst", ["-1", "some"])
def test_wrong_number_of_worst_lines(worst: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--model", "x", "--data", "x", "--worst", worst])
    assert caught.value.code == 2
    assert f"{worst!r} is not a number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("compression", ["", "gz"])
def test_tar_with_labels_inside(options: list[str], lines: Path, tmp_path: Path, compression: str):
    archive = tmp_path / f"lines.tar{compression and '.'}{compression}"
    with tarfile.open(archive, f"w:{compression}") as tar:
        tar.add(lines, arcname=".")
    report_file = tmp_path / "report.json"
    assert evaluate.main([*options, "--data", str(archive), "--json", str(report_file)]) == 0
    report = json.loads(report_file.read_text())
    assert report["data"] == str(archive)
    assert report["records"][-1]["image"] in report_file.read_text()
    assert {record["image"] for record in report["records"]} == {*NAMES} - {"000188.jpg"} | {
        "more/000188.jpg"
    }
    assert report["cer"] > 0.5  # the labels are upper case, and the case counts


def test_labels_given_apart_and_images_without(
    options: list[str], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    labels = tmp_path / "labels.tsv"
    labels.write_text("000015.jpg\tCode\nmore/000188.jpg\tAmount\n")
    assert evaluate.main([*options, "--data", str(lines), "--labels", str(labels)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^all +2 +0\.00% +0\.00% +100\.00%$", printed.out, re.MULTILINE)
    assert f"warning: 2 images of {lines} have no label in {labels}; they are left out" in printed.err


def test_wrong_use(options: list[str], lines: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    outside = tmp_path / "outside.tar"
    with tarfile.open(outside, "w") as tar:
        tar.addfile(tarfile.TarInfo("../escaped.jpg"), io.BytesIO())
    cut = []
    for kind in ("gz", "bz2", "xz"):
        cut.append(tmp_path / f"cut.tar.{kind}")
        with tarfile.open(cut[-1], f"w:{kind}") as tar:
            tar.add(SAMPLES, arcname=".")
        cut[-1].write_bytes(cut[-1].read_bytes()[:-20000])
    text = tmp_path / "text.txt"
    text.write_text("no images\n")
    other = tmp_path / "other.tsv"
    other.write_text("elsewhere.jpg\ttext\n")
    (lines / "labels.tsv").rename(tmp_path / "labels.tsv")
    cases = [
        ([str(tmp_path / "absent")], "absent: .*; give a folder of images, or a tar file of one"),
        ([str(text)], r"text\.txt: .*; give a folder of images, or a tar file of one"),
        ([str(outside)], r"outside\.tar: .*; give a folder of images, or a tar file of one"),
        *(([str(file)], f"{file.name}: .*; give a folder of images, or a tar") for file in cut),
        ([str(lines)], "there is no labels.tsv in it; name the file with --labels"),
        ([str(lines), "--labels", str(other)], r"none of its 4 images has a label in .*other\.tsv"),
        ([str(lines), "--labels", str(tmp_path / "none.tsv")], r"none\.tsv: .*give a UTF-8 text file"),
        ([str(lines), "--html", str(tmp_path / "no" / "page.html")], "there is no folder .*; make it first"),
        (
            [str(lines), "--html", str(tmp_path / "page"), "--json", str(tmp_path / "page")],
            "page: both --json and --html; name two files",
        ),
    ]
    for arguments, message in cases:
        assert evaluate.main([*options, "--data", *arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert re.fullmatch(f"error: .*{message}.*\n", printed.err), printed.err
    assert not (tmp_path.parent / "escaped.jpg").exists()


def test_options_are_those_of_recognize(capsys: pytest.CaptureFixture):
    """One way to choose model and backend: what recognize takes, evaluate takes."""
    found = []
    for command in (recognize, evaluate):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        found.append(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)))
    assert found[0] <= found[1]
    assert found[1] - found[0] == {"--data", "--worst", "--html"}


def test_runs_as_a_command(options: list[str], lines: Path):
    command = [sys.executable, "-m", "runtime.evaluate", *options, "--data", str(lines), "--ignore-case"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "000514.jpg" in run.stdout


def test_line_errors():
    found = line_errors("ROUNDING ADJ.:", " rounding adj. :", ignore_case=True)
    assert (found.edits, found.cer) == (1, 1 / 14)
    assert found.alignment == (
        ("equal", "ROUNDING ADJ.", "ROUNDING ADJ."),
        ("insert", "", " "),
        ("equal", ":", ":"),
    )
    assert line_errors("abc", "axc").alignment[1] == ("substitute", "b", "x")
    assert line_errors("abc", "ac").alignment[1] == ("delete", "b", "")
    assert line_errors("", "ab").edits == 2
    assert (line_errors("", "").edits, line_errors("", "").cer) == (0, 0)
    assert line_errors("中文", "中交").cer == 0.5


def test_classes_of_length_make_up_the_whole():
    labels = ["a" * length for length in (1, 5, 6, 10, 11, 20, 21, 40, 41, 80, 81, 300)]
    texts = ["b" + label[1:] for label in labels]
    classes = by_length(labels, texts)
    assert [(low, high, found.lines) for low, high, found in classes] == [
        (0, 5, 2),
        (6, 10, 2),
        (11, 20, 2),
        (21, 40, 2),
        (41, 80, 2),
        (81, None, 2),
    ]
    assert classes[0][2].cer == pytest.approx(2 / 6)
    whole = accuracy(labels, texts)
    assert whole.cer == pytest.approx(len(labels) / sum(map(len, labels)))
    assert whole.wer == 1.0 and whole.exact_match == 0.0
    assert by_length([], []) == []


def test_word_error_rate_is_that_of_jiwer():
    labels, texts = ["one two three", "four"], ["one two tree", "four five"]
    assert accuracy(labels, texts).wer == jiwer.wer(labels, texts) == 2 / 4
