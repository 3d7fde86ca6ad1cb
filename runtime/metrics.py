"""Accuracy of recognised text against labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer

# Upper ends of the classes of `by_length`, characters of the label; the last class has none.
LENGTHS = (5, 10, 20, 40, 80)


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of lines.

    Attributes:
        cer: character error rate of the whole set: edits (substitutions, insertions, deletions) over the
            labels' characters; above 1 where there are more edits than characters.
        wer: word error rate, the same for words, which white space separates.
        exact_match: share of the lines without an error.
        lines: how many there were.
    """

    cer: float
    wer: float
    exact_match: float
    lines: int


@dataclass(frozen=True)
class LineErrors:
    """One line's comparison.

    Attributes:
        edits: substituted, inserted and deleted characters.
        cer: `edits` over the label's characters (over 1 for an empty label).
        alignment: (kind, part of the label, part of the text) from left to right, kind one of "equal",
            "substitute", "insert" (not in the label) and "delete" (not in the text).
    """

    edits: int
    cer: float
    alignment: tuple[tuple[str, str, str], ...]


def accuracy(labels: Sequence[str], texts: Sequence[str], ignore_case: bool = False) -> Accuracy | None:
    """Compare texts with labels, line by line; white space at the ends does not count. None without lines."""
    if not labels:
        return None
    labels, texts = _comparable(labels, ignore_case), _comparable(texts, ignore_case)
    same = sum(label == text for label, text in zip(labels, texts, strict=True))
    return Accuracy(jiwer.cer(labels, texts), jiwer.wer(labels, texts), same / len(labels), len(labels))


def by_length(
    labels: Sequence[str], texts: Sequence[str], ignore_case: bool = False
) -> list[tuple[int, int | None, Accuracy]]:
    """Accuracy by the label's length: shortest and longest (None: no limit) in characters, and accuracy.

    Only classes that have lines.
    """
    classes = []
    for low, high in zip((0, *(end + 1 for end in LENGTHS)), (*LENGTHS, None), strict=True):
        pairs = [
            (label, text)
            for label, text in zip(labels, texts, strict=True)
            if low <= len(label.strip()) and (high is None or len(label.strip()) <= high)
        ]
        found = accuracy([label for label, _ in pairs], [text for _, text in pairs], ignore_case)
        if found:
            classes.append((low, high, found))
    return classes


def line_errors(label: str, text: str, ignore_case: bool = False) -> LineErrors:
    """Compare one line character by character, as `accuracy` does."""
    (label,), (text,) = _comparable([label], ignore_case), _comparable([text], ignore_case)
    output = jiwer.process_characters(label, text)
    alignment = tuple(
        (
            chunk.type,
            label[chunk.ref_start_idx : chunk.ref_end_idx],
            text[chunk.hyp_start_idx : chunk.hyp_end_idx],
        )
        for chunk in output.alignments[0]
    )
    edits = output.substitutions + output.insertions + output.deletions
    return LineErrors(edits, edits / max(1, len(label)), alignment)


def _comparable(lines: Sequence[str], ignore_case: bool) -> list[str]:
    return [line.strip().upper() if ignore_case else line.strip() for line in lines]
