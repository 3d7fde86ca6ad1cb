"""Tar files are unpacked into their folder, or not at all."""

import io
import tarfile
from pathlib import Path

import pytest

from runtime.archive import unpack


def archive(*members: tarfile.TarInfo) -> tarfile.TarFile:
    """An open archive of these members; files hold their own names."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for member in members:
            content = member.name.encode() if member.isfile() else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    packed.seek(0)
    return tarfile.open(fileobj=packed)


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def test_files_and_folders(tmp_path: Path):
    folder = tarfile.TarInfo("empty")
    folder.type = tarfile.DIRTYPE
    with archive(tarfile.TarInfo("a.jpg"), tarfile.TarInfo("deep/er/b.jpg"), folder) as tar:
        unpack(tar, tmp_path)
    assert (tmp_path / "a.jpg").read_text() == "a.jpg"
    assert (tmp_path / "deep" / "er" / "b.jpg").read_text() == "deep/er/b.jpg"
    assert (tmp_path / "empty").is_dir()


def test_only_some(tmp_path: Path):
    with archive(tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")) as tar:
        unpack(tar, tmp_path, [tar.getmember("b.jpg")])
    assert [path.name for path in tmp_path.iterdir()] == ["b.jpg"]


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../out.jpg"),
        tarfile.TarInfo("/out.jpg"),
        tarfile.TarInfo("in/../../out.jpg"),
        link("here.jpg", "../secret.jpg"),
        link("hard.jpg", "a.jpg", tarfile.LNKTYPE),
        link("device", "", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_what_leads_out_is_refused(member: tarfile.TarInfo, tmp_path: Path):
    inside = tmp_path / "inside"
    inside.mkdir()
    with archive(member) as tar, pytest.raises(tarfile.TarError, match="not a file or folder inside"):
        unpack(tar, inside)
    assert list(tmp_path.rglob("*")) == [inside]
