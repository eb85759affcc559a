"""What a tokenizer is: text to token numbers, back, and to a file."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FILE = "tokenizer.json"
FORMAT = "lowrank_geo tokenizer"
VERSION = 1
BYTES = 256

Ids = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """Numbers 0 .. vocab_size - 1; the last one ends a document and stands for no text.

    The end of a document lies outside the vocabulary of the text, so no text can encode to it.
    """

    vocab_size: int

    @property
    def end_of_document(self) -> int:
        """The token that follows every document."""
        return self.vocab_size - 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned dtype that holds every token."""
        return np.min_scalar_type(self.end_of_document)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """The tokens of `text`, without an end of document; a lone surrogate becomes "?"."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> Ids:
        """The tokens of all documents in a row, each followed by `end_of_document`."""

    @abstractmethod
    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of a row of tokens; bytes that are not UTF-8 become the replacement character.

        Raises: ValueError for a number outside the vocabulary.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `load_tokenizer` needs to build this tokenizer again."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` into `folder`, whole or not at all."""
        path = Path(folder, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".json.unfinished")
        unfinished.write_text(json.dumps({"format": FORMAT, "version": VERSION, **self.to_json()}))
        os.replace(unfinished, path)

    def text_ids(self, ids: npt.ArrayLike) -> list[int]:
        """The tokens that stand for text, checked; what `decode` starts from."""
        numbers = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = numbers[(numbers < 0) | (numbers >= self.vocab_size)]
        if outside.size:
            raise ValueError(
                f"decode needs tokens in [0, {self.vocab_size}), got {outside[0]}; "
                "use the tokenizer that the model was trained with"
            )
        return numbers[numbers != self.end_of_document].tolist()


def utf8(text: str) -> bytes:
    """The bytes of `text`, with "?" for a lone surrogate, which has none."""
    return text.encode(errors="replace")
