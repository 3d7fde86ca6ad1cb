"""Which lines make a page of mixed lengths."""

from collections import Counter

import pytest

from profiling.mixed_page import main, spread
from runtime.gpu import current_gpu


def test_lengths_are_spread():
    lengths = [5] * 50 + [20] * 3 + [40] * 10
    chosen = spread(lengths, 18)
    assert len(set(chosen)) == 18
    found = Counter(lengths[index] for index in chosen)
    assert found[20] == 3
    assert {found[5], found[40]} == {7, 8}
    assert spread(lengths, 18) == chosen
    assert sorted(spread(lengths, 100)) == list(range(63))


def test_without_engines(capsys):
    if current_gpu() is not None:
        pytest.skip("a GPU is here, and perhaps engines")
    assert main([]) == 2
    assert "error: " in capsys.readouterr().err
