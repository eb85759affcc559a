"""Byte pairs merged by frequency, trained on the spot with the package `tokenizers`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, final

import numpy as np
import numpy.typing as npt

from lowrank_geo.data.splits import blocks
from lowrank_geo.data.vocabulary import BYTES, Ids, Tokenizer, utf8

_BLOCK = 2**14  # characters encoded in one piece; bounds the memory of the library
_GROUP = 256  # pieces encoded in one parallel call


@final
class BPETokenizer(Tokenizer):
    """Byte pairs, merged in the given order; the merges are the whole state.

    Tokens 0..255 are the bytes in the order of `ByteLevel.alphabet`, then one for each new merge.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        library = _library()
        alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {letter: number for number, letter in enumerate(alphabet)}
        for left, right in merges:
            if left not in vocabulary or right not in vocabulary:
                raise ValueError(
                    f"BPETokenizer needs merges of tokens known before, got {(left, right)!r}; "
                    "keep the merges in the order in which they were trained"
                )
            vocabulary.setdefault(left + right, len(vocabulary))
        self.merges = list(merges)
        self.vocab_size = len(vocabulary) + 1
        self._encoder = _byte_level(library.models.BPE(vocab=vocabulary, merges=self.merges))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Merge the most frequent pairs of `texts` until there are `vocab_size` tokens.

        The same texts give the same merges. A short text runs out of pairs before: read the
        attribute `vocab_size` of the result.

        Raises: ValueError if vocab_size < 257; ImportError without the package `tokenizers`.
        """
        if vocab_size <= BYTES:
            raise ValueError(
                f"BPETokenizer.train needs vocab_size above {BYTES}, got {vocab_size}; "
                "use for example 4096"
            )
        library = _library()
        encoder = _byte_level(library.models.BPE())
        texts = list(texts)
        reachable = BYTES + 1 + sum(map(len, texts))  # no text has more pairs than letters
        trainer = library.trainers.BpeTrainer(
            vocab_size=min(vocab_size, reachable) - 1,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        encoder.train_from_iterator((block for block, _ in _blocks(texts)), trainer)
        return cls(
            [(left, right) for left, right in json.loads(encoder.to_str())["model"]["merges"]]
        )

    def encode(self, text: str) -> Ids:
        return self.encode_documents([text])[:-1]

    def encode_documents(self, texts: Sequence[str]) -> Ids:
        end = np.array([self.end_of_document], self.dtype)
        tokens: list[Ids] = []
        waiting = _blocks(texts)
        while group := list(islice(waiting, _GROUP)):
            encoded = self._encoder.encode_batch_fast([block for block, _ in group])
            for (_, is_last), block in zip(group, encoded, strict=True):
                tokens.append(np.array(block.ids, self.dtype))
                tokens += [end] if is_last else []
        return np.concatenate(tokens) if tokens else np.empty(0, self.dtype)

    def decode(self, ids: npt.ArrayLike) -> str:
        return self._encoder.decode(self.text_ids(ids), skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bpe", "merges": self.merges}


def _blocks(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Documents cut for the library, each block with whether it ends its document."""
    for text in texts:
        text = utf8(text).decode()  # the library refuses lone surrogates
        start = 0
        for block in blocks(text, _BLOCK):
            start += len(block)
            yield block, start == len(text)
        if not text:
            yield "", True


def _byte_level(model: Any) -> Any:
    library = _library()
    encoder = library.Tokenizer(model)
    encoder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = library.decoders.ByteLevel()
    return encoder


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "BPETokenizer needs the package tokenizers, got none; run: pip install tokenizers"
        ) from error
    return tokenizers
