"""Documents streamed from a Hugging Face dataset; code that comes with a dataset is never run."""

import os
from collections.abc import Iterable
from itertools import chain
from typing import Any, NamedTuple

from lowrank_geo.data.files import Source

PREFIX = "hf:"


class Address(NamedTuple):
    """Where a dataset is: hub name or local folder, configuration, split."""

    name: str
    config: str | None
    split: str


def parse_address(source: str) -> Address:
    """Read `hf:NAME[:CONFIG][@SPLIT]`; the split is "train" unless given.

    Raises: ValueError if the name, or a part that was announced, is missing.

    >>> parse_address("hf:allenai/c4:en@validation")
    Address(name='allenai/c4', config='en', split='validation')
    """
    rest = source.removeprefix(PREFIX)
    if rest and os.path.isdir(rest):  # a folder's name may contain ":" and "@"
        return Address(rest, None, "train")
    rest, at, split = rest.partition("@")
    name, colon, config = rest.partition(":")
    if not name or (colon and not config) or (at and not split):
        raise ValueError(
            f"load_corpus needs {PREFIX}NAME[:CONFIG][@SPLIT], got {source!r}; "
            f"write for example {PREFIX}allenai/c4:en@validation"
        )
    return Address(name, config or None, split or "train")


def read_dataset(source: str, max_bytes: int) -> Source:
    """The rows of one text column, streamed until `max_bytes` bytes of text have been read.

    The column is "text" if it holds strings, else the first that does.

    Raises: ValueError if the dataset cannot be read or holds no text;
        ImportError without the package `datasets`.
    """
    address = parse_address(source)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"load_corpus needs the package datasets for {source!r}, got none; "
            "run: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(
            address.name,
            address.config,
            split=address.split,
            streaming=True,
            trust_remote_code=False,
        )
        return _read_rows(source, rows, max_bytes)
    except _Refused:
        raise
    # datasets raises StopIteration for an empty JSON file and RuntimeError for a loading script.
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(
            f"load_corpus needs a dataset that can be streamed, got {source!r} ({reason}); "
            "check the name, the configuration, the split and the network"
        ) from error


class _Refused(ValueError):
    """A refusal of ours, told apart from the errors of the library."""


def _read_rows(source: str, rows: Iterable[dict[str, Any]], max_bytes: int) -> Source:
    remaining = iter(rows)
    first = next(remaining, None)
    if first is None:
        raise _Refused(f"load_corpus needs rows of text, got none in {source!r}; try another split")
    column = _text_column(source, first)
    documents: list[str] = []
    total = 0
    is_cut = False
    for row in chain([first], remaining):
        value = row.get(column)
        data = value.encode(errors="replace") if isinstance(value, str) else b""
        is_cut = total + len(data) > max_bytes
        text = data[: max_bytes - total].decode(errors="ignore")
        total += len(text.encode()) if is_cut else len(data)
        if text:
            documents.append(text)
        if is_cut:
            break
    if not documents:
        raise _Refused(
            f"load_corpus needs text, got only empty rows in column {column!r} of {source!r}; "
            "try another split"
        )
    description = f"dataset {source!r}, column {column!r}: {len(documents)} rows, {total:,} bytes"
    return Source(documents, description + (", stopped at max_bytes" if is_cut else ""))


def _text_column(source: str, row: dict[str, Any]) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if not texts:
        raise _Refused(
            f"load_corpus needs a column of strings, got the columns {', '.join(row)} in {source!r}; "
            "use a dataset with a text column"
        )
    return "text" if "text" in texts else texts[0]
