"""Tokens to batches: sampling that is a function of (seed, step), and fixed evaluation windows."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowrank_geo.data.corpus import Corpus
from lowrank_geo.data.vocabulary import Ids, Tokenizer


class Tokens(NamedTuple):
    """Both sides of a corpus as 1-D arrays of the smallest unsigned dtype, documents in a row."""

    train: Ids
    held_out: Ids


class Examples(NamedTuple):
    """Windows of a token sequence; the target of a position is the token after it."""

    inputs: Tensor  # (batch, context) int64
    targets: Tensor  # (batch, context) int64


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> Tokens:
    """The corpus as tokens, with the end-of-document token after every document."""
    return Tokens(
        tokenizer.encode_documents(corpus.train), tokenizer.encode_documents(corpus.held_out)
    )


class Batches:
    """Training batches of a token sequence: an endless sequence of shuffled epochs.

    The tokens are taken as a ring and cut into ceil(size / context) windows at an offset drawn for
    each epoch, so every token is a target at least once in an epoch. Order and offset come from
    Philox keyed by (seed, epoch): batch number `step` does not depend on which were asked for before.
    """

    def __init__(self, tokens: npt.NDArray[Any], *, context: int, batch: int, seed: int) -> None:
        _check("Batches", tokens, context)
        if batch < 1:
            raise ValueError(f"Batches needs batch of at least 1, got {batch}; use for example 16")
        if not 0 <= seed < 2**64:
            raise ValueError(f"Batches needs seed in [0, 2**64), got {seed}; use for example 0")
        self.tokens = tokens
        self.context = context
        self.batch = batch
        self.seed = seed
        self.windows_per_epoch = -(-tokens.size // context)

    def at(self, step: int, *, rank: int = 0, world: int = 1) -> Examples:
        """The share of process `rank` of `world` in the batch number `step`.

        The shares of all ranks, in order, are the batch of one process.

        Shapes: inputs and targets (batch / world, context).
        Raises: ValueError if world does not divide the batch, or for a rank or step out of range.
        """
        if world < 1 or self.batch % world:
            raise ValueError(
                f"Batches.at needs a world that divides the batch of {self.batch}, got {world}; "
                "change the batch or the number of processes"
            )
        if step < 0 or not 0 <= rank < world:
            raise ValueError(
                f"Batches.at needs step >= 0 and rank in [0, {world}), got step {step} and rank {rank}; "
                "count both from zero"
            )
        share = self.batch // world
        first = step * self.batch + rank * share
        return _examples(self.tokens, self._starts(first, first + share), self.context)

    def _starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where the windows number `first` to `last` - 1 of the endless sequence begin."""
        starts = []
        while first < last:
            epoch, within = divmod(first, self.windows_per_epoch)
            order, offset = _epoch(self.seed, epoch, self.windows_per_epoch, self.context)
            taken = order[within : within + last - first]
            starts.append(taken * self.context + offset)
            first += taken.size
        return np.concatenate(starts)


def windows(tokens: npt.NDArray[Any], context: int, limit: int | None = None) -> Examples:
    """At most `limit` windows that do not overlap, spread evenly over the tokens; always the same.

    Shapes: inputs and targets (windows, context).
    Raises: ValueError if there are not context + 1 tokens.

    >>> windows(np.arange(10, dtype=np.uint8), 3, limit=2).targets.tolist()
    [[1, 2, 3], [4, 5, 6]]
    """
    _check("windows", tokens, context)
    if limit is not None and limit < 1:
        raise ValueError(f"windows needs limit of at least 1, got {limit}; use for example 64")
    available = (tokens.size - 1) // context
    count = available if limit is None else min(limit, available)
    numbers = np.arange(count, dtype=np.int64) * available // count
    return _examples(tokens, numbers * context, context)


def _check(call: str, tokens: npt.NDArray[Any], context: int) -> None:
    if context < 1:
        raise ValueError(f"{call} needs context of at least 1, got {context}; use for example 128")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{call} needs integer tokens in one dimension, got {tokens.dtype} of shape {tokens.shape}; "
            "pass one side of encode_corpus"
        )
    if tokens.size < context + 1:
        raise ValueError(
            f"{call} needs more than {context} tokens, one window, got {tokens.size}; "
            "give more text, of which 5 % is held out, or a shorter context"
        )


@lru_cache(maxsize=2)  # a batch can touch two epochs
def _epoch(seed: int, epoch: int, count: int, context: int) -> tuple[npt.NDArray[np.int64], int]:
    """The order of the windows in an epoch and the offset of the first."""
    generator = np.random.Philox(key=(seed << 64) | epoch)
    # Raw bits and a stable sort: numpy may change what Generator.permutation draws.
    draws = generator.random_raw(count + 1)
    return np.argsort(draws[1:], kind="stable"), int(draws[0] % context)


def _examples(tokens: npt.NDArray[Any], starts: npt.NDArray[np.int64], context: int) -> Examples:
    at = (starts[:, None] + np.arange(context + 1)) % tokens.size  # (batch, context + 1)
    rows = torch.from_numpy(np.asarray(tokens[at], dtype=np.int64))
    return Examples(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
