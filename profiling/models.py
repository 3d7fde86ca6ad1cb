"""The models to measure: the bundled checkpoint, a folder, or an architecture with random weights."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path("models/trocr-tiny-printed")
RANDOM = Path("engines/checkpoints")


def find_model(name: str) -> Path:
    """The checkpoint folder of "bundled", of an architecture ("small", "base", "large", ...) or of a path.

    An architecture's checkpoint is written once and kept: times do not depend on the weights.
    """
    from graph_surgery.architectures import ARCHITECTURES, random_checkpoint

    if name == "bundled":
        return BUNDLED
    if name not in ARCHITECTURES or Path(name).exists():
        return Path(name)
    folder = RANDOM / f"trocr-{name}-random"
    if not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        random_checkpoint(name, partial)
        partial.rename(folder)
    return folder
