"""The bugs that docs/bugs/ tells of are still there; one that is not can go, with what works round it."""

import subprocess
import sys

import pytest

from profiling.records import ROOT

BUGS = ROOT / "docs" / "bugs"
ANYWHERE = ("function-outputs", "mask-of-ones", "sdpa-export", "sinusoidal-positions", "symbolic-reshape")


@pytest.mark.slow
@pytest.mark.parametrize("name", ANYWHERE)
def test_prints_what_its_readme_says(name: str):
    command = [sys.executable, str(BUGS / name / "reproduce.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, _, expected = (BUGS / name / "README.md").read_text(encoding="utf-8").partition("```\n")
    # Not the first line, which has the versions.
    assert printed.splitlines()[1:] == expected.removesuffix("```\n").splitlines()[1:]


def test_every_bug_is_listed():
    index = (BUGS / "README.md").read_text(encoding="utf-8")
    for folder in BUGS.iterdir():
        if folder.is_dir():
            assert f"({folder.name}/README.md)" in index
            assert (folder / "reproduce.py").is_file()
