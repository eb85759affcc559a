"""The held-out split: a function of what the documents say, not of a random generator."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

SHARE = 0.05  # of the characters is held out
BLOCKS = 200  # a document too large to be held out as a whole is cut into blocks of 1/BLOCKS


class Split(NamedTuple):
    train: list[str]
    held_out: list[str]


class _Piece(NamedTuple):
    document: int
    text: str
    digest: bytes


def split(documents: list[str]) -> Split:
    """Hold out the pieces whose SHA-256 is smallest, up to about 5 % of the characters.

    A piece is a document; a document of more than half the held-out share is first cut into
    blocks, so that one file can be split as well as a thousand. Equal pieces have equal digests
    and so fall on the same side, except in text so repetitive that this leaves nothing to hold
    out: there the end of the text is held out. Two characters are enough for two non-empty sides.

    >>> [len(part) for part in split([str(number) * 9 for number in range(1000)])]
    [950, 50]
    """
    pieces = _pieces(documents)
    held = _held_by_digest(pieces) or _held_at_the_end(pieces)
    sides = Split([], [])
    # Neighbouring blocks on the same side become one document again.
    for (_, is_held), run in groupby(
        enumerate(pieces), key=lambda entry: (entry[1].document, entry[0] in held)
    ):
        sides[is_held].append("".join(piece.text for _, piece in run))
    return sides


def blocks(text: str, size: int) -> Iterator[str]:
    """Cut `text` into blocks of at most `size` characters, after a newline where one is near.

    >>> list(blocks("ab\\ncdefgh", 4))
    ['ab\\n', 'cdef', 'gh']
    """
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            newline = text.rfind("\n", start + size // 2, end)
            end = end if newline < 0 else newline + 1
        yield text[start:end]
        start = end


def _pieces(documents: list[str]) -> list[_Piece]:
    total = sum(map(len, documents))
    largest = total * SHARE / 2
    return [
        _Piece(number, text, hashlib.sha256(text.encode()).digest())
        for number, document in enumerate(documents)
        for text in (
            blocks(document, max(total // BLOCKS, 1)) if len(document) > largest else [document]
        )
    ]


def _held_by_digest(pieces: list[_Piece]) -> set[int]:
    """The numbers of the held-out pieces; empty if equal pieces make up so much that none fits."""
    sizes: Counter[bytes] = Counter()
    for piece in pieces:
        sizes[piece.digest] += len(piece.text)
    target = SHARE * sizes.total()
    chosen: set[bytes] = set()
    size = 0
    for digest in sorted(sizes):
        if size >= target:
            break
        if size + sizes[digest] <= 2 * target:
            chosen.add(digest)
            size += sizes[digest]
    if size < target / 2:
        return set()
    return {number for number, piece in enumerate(pieces) if piece.digest in chosen}


def _held_at_the_end(pieces: list[_Piece]) -> set[int]:
    target = SHARE * sum(len(piece.text) for piece in pieces)
    held: set[int] = set()
    size = 0
    for number in reversed(range(len(pieces))):
        if size >= target:
            break
        held.add(number)
        size += len(pieces[number].text)
    return held
