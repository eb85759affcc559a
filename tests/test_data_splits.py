"""splits: nothing lost, nothing on both sides, about 5 % held out."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_geo.data.splits import blocks, split

TEXTS = st.lists(st.text(min_size=1), min_size=1).filter(lambda texts: sum(map(len, texts)) > 1)


@given(TEXTS)
def test_no_character_is_lost_and_neither_side_is_empty(texts: list[str]) -> None:
    train, held_out = split(texts)
    assert Counter("".join(train + held_out)) == Counter("".join(texts))
    assert all(train) and all(held_out) and train and held_out


@given(TEXTS)
def test_between_half_and_twice_the_share_is_held_out(texts: list[str]) -> None:
    total = sum(map(len, texts))
    size = sum(map(len, split(texts).held_out))
    assert 0.025 * total <= size <= max(0.1 * total, 1)


def test_equal_documents_are_on_the_same_side() -> None:
    texts = [f"document {number % 300}" for number in range(900)]
    train, held_out = split(texts)
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 900


def test_a_document_stays_on_its_side_in_another_order() -> None:
    texts = [f"document {number}" for number in range(500)]
    assert sorted(split(texts[::-1]).held_out) == sorted(split(texts).held_out)


def test_one_document_is_split_between_lines() -> None:
    lines = [f"line {number}\n" for number in range(20_000)]
    train, held_out = split(["".join(lines)])
    kept = [set(text.splitlines(keepends=True)) for text in ("".join(train), "".join(held_out))]
    assert not kept[0] & kept[1] and kept[0] | kept[1] == set(lines)


def test_neighbouring_blocks_on_one_side_stay_one_document() -> None:
    text = "".join(f"line {number}\n" for number in range(20_000))
    train, held_out = split([text])
    assert len(train) <= len(held_out) + 1
    assert all(part in text for part in train + held_out)


@pytest.mark.parametrize("text", ["ab", "a" * 5000, "same line\n" * 500])
def test_repetitive_text_is_held_out_at_the_end(text: str) -> None:
    (train,), (held_out,) = split([text])
    assert train + held_out == text


def test_the_smallest_digests_are_held_out() -> None:
    texts = [f"{number}" for number in range(100, 200)]
    smallest = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:5]
    assert sorted(split(texts).held_out) == sorted(smallest)


@given(st.text(), st.integers(1, 50))
def test_blocks_join_to_the_text_and_keep_the_size(text: str, size: int) -> None:
    parts = list(blocks(text, size))
    assert "".join(parts) == text
    assert all(0 < len(part) <= size for part in parts)
