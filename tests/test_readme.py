"""README's figures are those of results/, and what it names is there."""

import re

import pytest

from profiling.records import ROOT
from profiling.summary import OVERVIEW_BEGIN, OVERVIEW_END, README_BEGIN, README_END, with_headline

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_are_the_committed_ones():
    for mark in (OVERVIEW_BEGIN, OVERVIEW_END, README_BEGIN, README_END):
        assert README.count(mark) == 1
    assert with_headline(README, ROOT / "results") == README, "run: python -m profiling.summary --readme"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(target: str):
    assert (ROOT / target).exists()
