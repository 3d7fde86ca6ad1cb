"""Tokenizers of the published kinds: texts, spaces and special tokens as Hugging Face decodes them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import ByteLevelBPETokenizer
from transformers import RobertaTokenizer, XLMRobertaTokenizer

from graph_surgery.architectures import ARCHITECTURES, write_random_checkpoint
from graph_surgery.checkpoint import CheckpointError, copy_processor_files, load_spec
from runtime.recognizer import Recognizer
from runtime.tokenizer import CharacterTokenizer, load_tokenizer
from tests.checkpoints import ENCODER, SMALL_DECODER
from tests.conftest import BUNDLED_MODEL

ROOT = BUNDLED_MODEL.parent.parent
CHINESE = ROOT / "samples" / "chinese"
TEXTS = [
    "Total: RM 12.50 (GST 6%)",
    " leading and  double spaces ",
    "don't , stop !",
    "naïve café 100°C",
    "",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture
def folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer."""
    folder = shutil.copytree(checkpoint("small"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The labels of the real lines: what vocabularies are trained on here."""
    rows = (ROOT / "data" / "lines-val.hf-greedy.tsv").read_text(encoding="utf-8").splitlines()
    file = tmp_path_factory.mktemp("corpus") / "lines.txt"
    file.write_text("\n".join([row.split("\t")[2] for row in rows] + TEXTS * 20), encoding="utf-8")
    return file


def sentencepiece_files(corpus: Path, folder: Path) -> None:
    """What the published small checkpoints have: a SentencePiece model, read as XLM-RoBERTa's."""
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=400,
        character_coverage=1.0,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')


def byte_level_files(corpus: Path, folder: Path) -> None:
    """What the published base and large checkpoints have: RoBERTa's vocab.json and merges.txt."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(corpus)], vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer.save_model(str(folder))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')


@pytest.mark.parametrize("with_json", [False, True])
@pytest.mark.parametrize("write", [sentencepiece_files, byte_level_files])
def test_decodes_as_hugging_face(
    write: Callable, with_json: bool, corpus: Path, folder: Path, tmp_path: Path
):
    """Texts with their spaces, special tokens inside, and any ids at all: from an engine folder."""
    write(corpus, folder)
    kind = RobertaTokenizer if write is byte_level_files else XLMRobertaTokenizer
    theirs = kind.from_pretrained(folder)
    if with_json:
        theirs.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file() == with_json
    engines = tmp_path / "engines"
    copy_processor_files(load_spec(folder), engines)
    ours = load_tokenizer(load_spec(engines))
    assert not isinstance(ours, CharacterTokenizer)
    for text in TEXTS:
        ids = theirs(text).input_ids
        decoded = ours.decode(ids, skip_special_tokens=True)
        assert decoded == theirs.decode(ids, skip_special_tokens=True)
        if write is byte_level_files:
            assert decoded == text
        else:  # SentencePiece knows one space, and none at the ends
            assert decoded == " ".join(text.split())
    if write is sentencepiece_files:  # fairseq's four special tokens before SentencePiece's own
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
        ids = [index + 1 for index in pieces.encode(TEXTS[0])]
        assert ours.decode([2, *ids, 2], skip_special_tokens=True) == TEXTS[0]
    generator = np.random.default_rng(0)
    for _ in range(50):
        ids = generator.integers(0, len(theirs) + 20, 30).tolist()  # decoders are wider than vocabularies
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def character_files(folder: Path, characters: str) -> dict[str, int]:
    """What trocr-chinese's own script leaves: a vocab.json of characters beside RoBERTa's other files."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *dict.fromkeys(characters)])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    return vocabulary


def test_character_vocabulary(folder: Path):
    """Character by character, and special tokens left out, as trocr-chinese's own decoder has it."""
    text = "编号 A-12,价格 ¥3.50·共 2×5 件。100°C é Ġ"
    vocabulary = character_files(folder, text)
    tokenizer = load_tokenizer(load_spec(folder))
    assert isinstance(tokenizer, CharacterTokenizer)
    ids = [0, *(vocabulary[character] for character in text), 3, 2, 1, 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == f"<s>{text}<unk></s><pad><pad>"
    assert tokenizer.decode([*ids, 10_000], skip_special_tokens=True) == text  # beyond the vocabulary
    # Hugging Face agrees where a character does not stand for a byte, and else cannot show it.
    theirs = RobertaTokenizer.from_pretrained(folder)
    hanzi = [vocabulary[character] for character in "编号 A-12,价格 3.50共 2"]
    assert theirs.decode(hanzi) == tokenizer.decode(hanzi)
    assert theirs.decode([vocabulary["·"]]) == "\ufffd"


def test_tokens_of_several_characters_belong_to_a_character_vocabulary(folder: Path):
    """trocr-chinese's authors list the marks of tables and formulas, too."""
    vocabulary = character_files(folder, "中文")
    vocabulary |= {"<td>": 7, "\\frac": 8}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    assert (
        load_tokenizer(load_spec(folder)).decode([0, 7, 5, 8, 6, 2], skip_special_tokens=True)
        == "<td>中\\frac文"
    )


def test_tokenizer_json_of_the_first_checkpoint_does_not_count(corpus: Path, folder: Path, tmp_path: Path):
    """trocr-chinese's script exchanges vocab.json alone, beside a tokenizer.json of the vocabulary before."""
    byte_level_files(corpus, tmp_path)
    RobertaTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    character_files(folder, "中文")
    assert load_tokenizer(load_spec(folder)).decode([0, 5, 6, 2], skip_special_tokens=True) == "中文"


def test_tokenizer_json_of_another_kind_counts(checkpoint: Callable[[str], Path], tmp_path: Path):
    """A vocab.json beside a tokenizer that decodes no bytes takes nothing from it."""
    folder = shutil.copytree(checkpoint("small"), tmp_path / "model")
    (folder / "vocab.json").write_text('{"<s>": 0, "a": 1}')
    assert not isinstance(load_tokenizer(load_spec(folder)), CharacterTokenizer)


@pytest.mark.parametrize("content", ["[1, 2]", '{"<s>": ', '{"<s>": "0"}', '"text"'])
def test_malformed_vocabulary(folder: Path, content: str):
    character_files(folder, "中文")
    (folder / "vocab.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"vocab\.json is no vocabulary \(.*\); fetch it again"):
        load_tokenizer(load_spec(folder))


def test_no_tokenizer(folder: Path):
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder))}: no usable tokenizer"):
        load_tokenizer(load_spec(folder))


def test_chinese_lines_end_to_end(graphs: Callable[[Path, str], Path], tmp_path: Path):
    """Rendered Chinese lines through a small checkpoint of trocr-chinese's kind. Its weights are random, so
    the text means nothing: that it is the vocabulary's characters for Hugging Face's tokens is the test."""
    encoder, decoder = ARCHITECTURES["chinese"]
    folder = write_random_checkpoint(
        encoder | ENCODER,
        decoder | SMALL_DECODER | {"vocab_size": 11318},
        tmp_path / "chinese-random",
        characters=True,
    )
    spec = load_spec(folder)
    assert (spec.decoder_start_token_id, spec.decoder.vocab_size) == (0, 11318)
    lines = sorted(CHINESE.glob("*.png"))
    assert len(lines) >= 4
    results = Recognizer(graphs(folder, "all"), backend="onnxruntime").recognize(lines)
    by_torch = Recognizer(folder, backend="torch").recognize(lines)
    names = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = {index: token for token, index in names.items()}
    for result, other in zip(results, by_torch, strict=True):
        assert result.error is None
        assert result.token_ids == other.token_ids
        expected = [tokens[index] for index in result.token_ids if tokens[index] not in SPECIAL]
        assert result.text == "".join(expected)
    # The vocabulary has every character of the labels.
    labels = (CHINESE / "labels.tsv").read_text(encoding="utf-8").splitlines()
    assert {character for row in labels for character in row.split("\t")[1]} <= set(names)
