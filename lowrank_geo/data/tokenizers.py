"""The tokenizers there are: single bytes, byte pairs, and the one saved in a folder."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from lowrank_geo.data.bpe import BPETokenizer
from lowrank_geo.data.vocabulary import BYTES, FILE, FORMAT, VERSION, Ids, Tokenizer, utf8

__all__ = ["BPETokenizer", "ByteTokenizer", "Tokenizer", "load_tokenizer"]


@final
class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    vocab_size = BYTES + 1

    def encode(self, text: str) -> Ids:
        return np.frombuffer(utf8(text), dtype=np.uint8).astype(self.dtype)

    def encode_documents(self, texts: Sequence[str]) -> Ids:
        documents = [utf8(text) for text in texts]
        tokens = np.full(
            sum(map(len, documents)) + len(documents), self.end_of_document, self.dtype
        )
        start = 0
        for document in documents:
            tokens[start : start + len(document)] = np.frombuffer(document, dtype=np.uint8)
            start += len(document) + 1
        return tokens

    def decode(self, ids: npt.ArrayLike) -> str:
        return bytes(self.text_ids(ids)).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bytes"}


def load_tokenizer(folder: str | os.PathLike[str]) -> ByteTokenizer | BPETokenizer:
    """The tokenizer that `save` wrote into `folder`.

    Raises: ValueError if there is none or the file is damaged or not ours.
    """
    path = Path(folder, FILE)
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"it is not a {FORMAT} of version {VERSION}")
        if content["kind"] == "bytes":
            return ByteTokenizer()
        if content["kind"] != "bpe":
            raise ValueError(f"unknown kind {content['kind']!r}")
        return BPETokenizer([(left, right) for left, right in content["merges"]])
    # json raises ValueError or, for deep nesting, RecursionError; the rest is a wrong structure.
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_tokenizer needs a {FILE} written by this library, got {str(path)!r} ({error}); "
            "restore the file or train again"
        ) from error
