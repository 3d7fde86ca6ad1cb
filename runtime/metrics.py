"""Accuracy of recognised text against labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of lines.

    Attributes:
        cer: character error rate of the whole set: edits (substitutions, insertions, deletions) over the
            labels' characters; above 1 where there are more edits than characters.
        exact_match: share of the lines without an error.
        lines: how many there were.
    """

    cer: float
    exact_match: float
    lines: int


def accuracy(labels: Sequence[str], texts: Sequence[str], ignore_case: bool = False) -> Accuracy | None:
    """Compare texts with labels, line by line; white space at the ends does not count. None without lines."""
    if not labels:
        return None
    if ignore_case:
        labels, texts = [label.upper() for label in labels], [text.upper() for text in texts]
    cer = jiwer.cer(list(labels), list(texts))
    same = sum(label.strip() == text.strip() for label, text in zip(labels, texts, strict=True))
    return Accuracy(cer, same / len(labels), len(labels))
