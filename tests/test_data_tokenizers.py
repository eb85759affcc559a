"""Tokenizers: exact round trips, merges that repeat, files that are checked."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lowrank_geo.data import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from lowrank_geo.data.bpe import _BLOCK

TEXTS = [f"def function_{number}(value):\n    return value + {number}\n" for number in range(300)]
BPE = BPETokenizer.train(TEXTS, 400)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])


@BOTH
@given(text=st.text())
def test_every_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == tokenizer.dtype and tokenizer.end_of_document not in ids


@given(st.binary())
def test_every_byte_decodes_as_in_utf8(data: bytes) -> None:
    assert ByteTokenizer().decode(list(data)) == data.decode(errors="replace")


@BOTH
@given(texts=st.lists(st.text()))
def test_documents_are_separated_by_the_end_of_document(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    tokens = tokenizer.encode_documents(texts)
    ends = np.flatnonzero(tokens == tokenizer.end_of_document)
    parts = np.split(tokens, ends + 1)
    assert [tokenizer.decode(part) for part in parts] == [*texts, ""]
    assert tokens.dtype == tokenizer.dtype


@BOTH
def test_no_text_encodes_to_the_end_of_document(tokenizer: Tokenizer) -> None:
    text = "<|endoftext|><s></s>[SEP]<pad>"
    assert tokenizer.end_of_document not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@BOTH
def test_a_lone_surrogate_becomes_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\udcffb")) == "a?b"


@BOTH
def test_the_end_of_document_decodes_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.end_of_document]) == ""


@BOTH
@pytest.mark.parametrize("token", [-1, 100_000])
def test_refuses_a_token_out_of_the_vocabulary(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, {tokenizer.vocab_size}\), got {token}; use"):
        tokenizer.decode([0, token])


@BOTH
def test_a_saved_tokenizer_encodes_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run")
    loaded = load_tokenizer(tmp_path / "run")
    assert type(loaded) is type(tokenizer) and loaded.vocab_size == tokenizer.vocab_size
    assert (loaded.encode("".join(TEXTS)) == tokenizer.encode("".join(TEXTS))).all()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]


def test_bytes_need_257_tokens() -> None:
    assert ByteTokenizer().vocab_size == 257 and ByteTokenizer().dtype == np.uint16


def test_training_repeats() -> None:
    assert BPETokenizer.train(iter(TEXTS), 400).merges == BPE.merges


def test_a_larger_vocabulary_makes_shorter_sequences() -> None:
    sizes = [
        BPETokenizer.train(TEXTS, size).encode_documents(TEXTS).size for size in (257, 280, 400)
    ]
    assert sizes[0] == ByteTokenizer().encode_documents(TEXTS).size > sizes[1] > sizes[2]


def test_splits_words_as_the_library_does() -> None:
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=399, initial_alphabet=alphabet, show_progress=False
    )
    oracle.train_from_iterator(TEXTS, trainer)
    for text in [*TEXTS, "caf\u00e9 \u20ac 12 \n\n  x"]:
        pieces = [BPE.decode([token]) for token in BPE.encode(text)]
        assert len(pieces) == len(oracle.encode(text).tokens)
    assert oracle.get_vocab_size() == BPE.vocab_size - 1 == 399


def test_a_document_longer_than_a_block_is_whole() -> None:
    text = "word " * _BLOCK
    tokens = BPE.encode_documents([text, text])
    assert BPE.decode(tokens) == text * 2
    assert (tokens == BPE.end_of_document).sum() == 2


def test_a_short_text_runs_out_of_merges() -> None:
    tokenizer = BPETokenizer.train(["abab abab"], 5000)
    assert 257 < tokenizer.vocab_size < 270


def test_more_tokens_than_a_text_has_letters_take_no_memory() -> None:
    assert BPETokenizer.train(["aaaa"], 10**12).merges == BPETokenizer.train(["aaaa"], 300).merges


def test_an_interrupted_save_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BPE.save(tmp_path)

    def full_disk(*paths: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), BPETokenizer)


@pytest.mark.parametrize("size", [-1, 0, 256])
def test_refuses_a_vocabulary_below_the_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size above 256, got {size}; use"):
        BPETokenizer.train(TEXTS, size)


def described(**entries: object) -> bytes:
    return json.dumps({"format": "lowrank_geo tokenizer", "version": 1, **entries}).encode()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "Expecting value"),
        (b'{"format": "lowrank_geo tok', "Unterminated string"),
        (b"\xff\xfe\0", "can't decode"),
        (b"[" * 100_000, "recursion"),
        (b"[]", "list indices"),
        (b"{}", "'format'"),
        (b'{"version": "1.0", "format": "other"}', "not a lowrank_geo tokenizer"),
        (described(version=2, kind="bytes"), "of version 1"),
        (described(kind="words"), "unknown kind 'words'"),
        (described(kind="bpe"), "'merges'"),
        (described(kind="bpe", merges=7), "not iterable"),
        (described(kind="bpe", merges=[["a", "b", "c"]]), "too many values"),
        (described(kind="bpe", merges=[["a", 1]]), r"known before, got \('a', 1\)"),
        (described(kind="bpe", merges=[["a", ["b"]]]), "unhashable"),
        (described(kind="bpe", merges=[["ab", "c"]]), r"known before, got \('ab', 'c'\)"),
    ],
)
def test_refuses_a_damaged_file(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith("load_tokenizer needs a tokenizer.json written by this")


def test_refuses_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got '.*' \(.*No such file.*\); restore the file"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("merges", [[("a", "bc"), ("b", "c")]])
def test_refuses_merges_out_of_order(merges: Sequence[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="keep the merges in the order"):
        BPETokenizer(merges)


def test_names_the_command_when_tokenizers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="run: pip install tokenizers"):
        BPETokenizer.train(TEXTS, 400)
    assert ByteTokenizer().encode("a").tolist() == [97]
