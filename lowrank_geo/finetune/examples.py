"""Examples to fine-tune on: texts with labels, or texts alone, split into train and held out."""

import csv
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from lowrank_geo.data.hub import PREFIX, parse_address
from lowrank_geo.finetune.docstrings import docstring_examples

HELD_OUT = 0.25
TASKS = ("seq-cls", "causal-lm")


class Examples(NamedTuple):
    """Texts with the index of their label, -1 for none."""

    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]
    labels: list[str]


def load_examples(data: str | None, task: str) -> Examples:
    """The examples of a source, a quarter of them held out; the same call gives the same split.

    Args: data: None for docstrings of the standard library labelled by module; a .jsonl or .csv file with the fields
        "text" and, to classify, "label"; a .txt file with a text on each line; `hf:NAME[:CONFIG][@SPLIT]`.
    Raises: ValueError for an unknown task or a source without the fields or with fewer than two labels.
    """
    if task not in TASKS:
        raise ValueError(
            f"task needs to be one of {', '.join(TASKS)}, got {task!r}; use one of them"
        )
    rows = (
        docstring_examples() if data is None else list(read_rows(data, labelled=task == "seq-cls"))
    )
    labels = sorted({label for _, label in rows}) if task == "seq-cls" else []
    if task == "seq-cls" and len(labels) < 2:
        raise ValueError(
            f"seq-cls needs two labels or more, got {len(labels)} in {data!r}; give other data"
        )
    index = {label: i for i, label in enumerate(labels)}
    pairs = [(text, index.get(label, -1)) for text, label in rows]
    random.Random(1).shuffle(pairs)
    count = max(1, int(len(pairs) * HELD_OUT))
    if len(pairs) <= count:
        raise ValueError(
            f"fine-tuning needs two examples or more, got {len(pairs)} in {data!r}; give more"
        )
    return Examples(pairs[count:], pairs[:count], labels)


def read_rows(data: str, *, labelled: bool) -> Iterable[tuple[str, str]]:
    """(text, label) of every row, "" for no label; rows without any text are left out where nothing else is in them.

    Raises: ValueError for a row without the fields, and for kinds of files that are not known.
    """
    rows = hub_rows(data) if data.startswith(PREFIX) else file_rows(data)
    wanted = ("text", "label") if labelled else ("text",)
    for number, row in enumerate(rows, 1):
        found = {name: field(row, name, number, data) for name in wanted}
        if found["text"].strip():
            yield found["text"], found.get("label", "")
        elif labelled:
            raise ValueError(
                f"row {number} of {data!r} needs 'text', got {found['text']!r}; write a text, or remove the row"
            )


def field(row: Any, name: str, number: int, data: str) -> str:
    """One field of a row as text.

    Raises: ValueError if it is not there, or neither text nor a number.
    """
    value = row.get(name) if isinstance(row, dict) else None
    if value is None:
        raise ValueError(
            f"row {number} of {data!r} needs {name!r}, got none; add the field to every row"
        )
    if not isinstance(value, str | int | float):
        raise ValueError(
            f"row {number} of {data!r} needs {name!r} to be a text or a number, got {value!r}; convert it"
        )
    return str(value)


def file_rows(data: str) -> Iterable[Any]:
    """The rows of a file.

    Raises: ValueError for kinds of files that are not known, and what is not text or not JSON.
    """
    path = Path(data)
    if path.suffix not in (".txt", ".jsonl", ".csv"):
        raise ValueError(
            f"--data needs a .jsonl, .csv or .txt file or {PREFIX}NAME, got {data!r}; convert the file"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--data needs text in UTF-8, got byte {error.object[error.start]:#x} at {error.start} of {data!r}; "
            "convert the file"
        ) from error
    if path.suffix == ".csv":
        return csv.DictReader(io.StringIO(text, newline=""))
    # str.splitlines would split at separators that JSON allows inside of strings.
    lines = text.replace("\r\n", "\n").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        return [{"text": line} for _, line in numbered]
    return [parsed(line, number, data) for number, line in numbered]


def parsed(line: str, number: int, data: str) -> Any:
    """One line of JSON.

    Raises: ValueError if it is none.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {number} of {data!r} needs to be JSON, got {line[:40]!r}; correct or remove it"
        ) from error


def hub_rows(data: str) -> Iterable[dict[str, Any]]:
    """The rows of a dataset of the hub, or in a local folder; code that comes with it is never run.

    Raises: ValueError for what cannot be read, ImportError without the package `datasets`.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError(
            f"--data needs the package datasets for {data!r}, got none; run: pip install datasets"
        ) from error
    address = parse_address(data)
    try:
        return datasets.load_dataset(
            address.name, address.config, split=address.split, trust_remote_code=False
        )
    # datasets raises StopIteration for an empty file and RuntimeError for a loading script.
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise ValueError(
            f"--data needs a dataset that can be read, got {data!r} ({reason}); check the name and the network"
        ) from error
