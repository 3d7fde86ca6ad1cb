"""The checkpoint's own tokenizer: token ids -> text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, RobertaTokenizer, XLMRobertaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from graph_surgery.checkpoint import CheckpointError, ModelSpec

# Of a character vocabulary, by the names that they have in trocr-chinese.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# The tokenizers of the published checkpoints, small's and the others', and the files that they are read from.
TOKENIZER_FILES = {
    XLMRobertaTokenizer: ("sentencepiece.bpe.model",),
    RobertaTokenizer: ("vocab.json", "merges.txt"),
}


class Tokenizer(Protocol):
    """What recognition needs of a tokenizer; Hugging Face's tokenizers have it."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of these tokens."""
        ...


class CharacterTokenizer:
    """A vocabulary of characters, where a text is its tokens one after another.

    Checkpoints of trocr-chinese keep such a vocabulary in RoBERTa's vocab.json. RoBERTa's tokenizer takes its
    entries for bytes in disguise, and turns every character that stands for one (the middle dot, the degree
    sign, accented letters) into a replacement character.

    Args:
        vocabulary: token -> id, special tokens among them.
    """

    def __init__(self, vocabulary: Mapping[str, int]):
        self._tokens = {index: token for token, index in vocabulary.items()}

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of these tokens. An id that the vocabulary does not have stands for nothing."""
        tokens = (self._tokens.get(int(index), "") for index in token_ids)
        skipped = SPECIAL_TOKENS if skip_special_tokens else ()
        return "".join(token for token in tokens if token not in skipped)


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """The tokenizer in the checkpoint's or engine folder's files.

    Raises CheckpointError where there is none that can be used.
    """
    vocabulary = _character_vocabulary(spec.source)
    if vocabulary is not None:
        return CharacterTokenizer(vocabulary)
    try:
        return _tokenizer_class(spec.source).from_pretrained(spec.source)
    except Exception as error:  # missing and malformed files end in a variety of exceptions
        raise CheckpointError(
            f"{spec.source}: no usable tokenizer ({error}); fetch the tokenizer's files again"
        ) from error


def _tokenizer_class(folder: Path) -> type:
    """AutoTokenizer where there is a tokenizer.json; else the class whose files these are.

    Many TrOCR checkpoints have only the files from before tokenizer.json. For them AutoTokenizer of
    transformers 5 fails: beside a config.json of a vision-encoder-decoder it disregards the class that
    tokenizer_config.json names.
    """
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer
    return next(
        (kind for kind, files in TOKENIZER_FILES.items() if all((folder / name).is_file() for name in files)),
        AutoTokenizer,
    )


def _character_vocabulary(folder: Path) -> dict[str, int] | None:
    """vocab.json, where it is one of characters.

    It is a byte-level BPE's if it has a token for each of the 256 bytes. trocr-chinese's script replaces only
    vocab.json: a byte-level tokenizer.json beside it is left from the checkpoint that training began with.
    """
    file = folder / "vocab.json"
    if not file.is_file() or not _is_byte_level(folder / "tokenizer.json"):
        return None
    try:
        vocabulary = json.loads(file.read_text(encoding="utf-8"))
        if set(bytes_to_unicode().values()) <= set(vocabulary):
            return None
        if not all(isinstance(index, int) for index in vocabulary.values()):
            raise ValueError("not every token has a number")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is no vocabulary ({error}); fetch it again") from error
    return vocabulary


def _is_byte_level(file: Path) -> bool:
    """Whether a tokenizer.json decodes bytes; true where there is none."""
    if not file.is_file():
        return True
    try:
        decoder = json.loads(file.read_text(encoding="utf-8")).get("decoder") or {}
    except (ValueError, AttributeError):  # AutoTokenizer says what is wrong with it
        return False
    return decoder.get("type") == "ByteLevel"
