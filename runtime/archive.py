"""Unpacking tar files of images, which may come from anywhere."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path


def unpack(archive: tarfile.TarFile, folder: Path, members: Iterable[tarfile.TarInfo] | None = None) -> None:
    """Write the archive's files (only `members`, if given) into `folder`.

    `extractall(filter="data")` would do, but Python has it only from 3.11.4 on.

    Raises:
        tarfile.TarError: a member is a link or a device, or its name leads out of the folder.
    """
    root = folder.resolve()
    for member in archive if members is None else members:
        target = (root / member.name).resolve()
        if not target.is_relative_to(root) or not (member.isfile() or member.isdir()):
            raise tarfile.ExtractError(f"{member.name!r} is not a file or folder inside of it")
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.extractfile(member) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out)
