"""Fixtures that several test files share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import random_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random checkpoint of tests/checkpoints.py, by name, in fp32. Only to be read."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: random_checkpoint(name, root / name))
