"""A corpus: the documents of one source, split into train and held out, with a fingerprint."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from lowrank_geo.data.files import Source, read_file, read_folder, read_standard_library
from lowrank_geo.data.hub import PREFIX, read_dataset
from lowrank_geo.data.splits import split

MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents kept from training.

    `fingerprint` is the SHA-256 of both lists, so it changes with any character and with the split.
    """

    train: list[str]
    held_out: list[str]
    description: str
    fingerprint: str


def load_corpus(source: str | None = None, *, max_bytes: int | None = None) -> Corpus:
    """The documents of `source`, about 5 % of them held out; the same call gives the same corpus.

    `source` is None for the Python standard library's own sources, a text file, a folder (every
    UTF-8 file in it that is not hidden, recursively; links to folders are not followed), or
    `hf:NAME[:CONFIG][@SPLIT]` for a dataset on the Hugging Face hub or in a local folder.
    Reading stops at `max_bytes`, by default 64 MiB, and the description then says so.

    Raises: ValueError if nothing can be read or the text is too short to split;
        ImportError if `hf:` is asked for without the package `datasets`.

    >>> corpus = load_corpus(max_bytes=100_000)
    >>> sum(map(len, corpus.held_out)) < 0.1 * sum(map(len, corpus.train))
    True
    """
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    if max_bytes < 1:
        raise ValueError(
            f"load_corpus needs max_bytes of at least 1, got {max_bytes}; "
            f"leave it out to read at most {MAX_BYTES} bytes"
        )
    documents, description = _read(source, max_bytes)
    train, held_out = split(documents)
    if not train:
        raise ValueError(
            f"load_corpus needs two characters or more to split, got {description}; give more text"
        )
    return Corpus(train, held_out, description, _fingerprint(train, held_out))


def _read(source: str | None, max_bytes: int) -> Source:
    if source is None:
        return read_standard_library(max_bytes)
    if source.startswith(PREFIX):
        return read_dataset(source, max_bytes)
    # Path("") is the current folder; an empty --data is a mistake, not a wish to read it.
    if source and os.path.isdir(source):
        return read_folder(Path(source), max_bytes)
    if source and os.path.isfile(source):
        return read_file(Path(source), max_bytes)
    raise ValueError(
        f"load_corpus needs a text file, a folder or {PREFIX}NAME, got {source!r}, which is none of "
        "them; check the path"
    )


def _fingerprint(*parts: list[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        for document in part:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
    return digest.hexdigest()
