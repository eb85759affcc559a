"""What a run recorded in metrics.jsonl, and its condensation to what can be drawn."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Series(NamedTuple):
    """A quantity over training: `values[i]` was seen at `steps[i]`."""

    steps: Sequence[float] | np.ndarray
    values: Sequence[float] | np.ndarray


History = Sequence[tuple[float, Mapping[str, T]]]  # (step, {layer: value}), by step


class Metrics(NamedTuple):
    """The lines of metrics.jsonl, by quantity; of a step recorded twice (before and after a resume) the last."""

    train: dict[str, Series]
    held_out: Series
    layers: dict[str, History[Any]]  # ranks, spectra, orthonormality, transport
    evaluated: dict[str, Series]  # all that was measured on data held out


def printable(name: Any) -> str:
    """A name without what a terminal or a page would obey: control characters, lone surrogates.

    >>> printable("a\\x1b[31mb")
    'a\N{REPLACEMENT CHARACTER}[31mb'
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in str(name))


def number(value: Any) -> float | None:
    """A finite number that JSON held, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def read_metrics(run: Path) -> Metrics:
    """What a run has recorded so far. Lines that are no JSON object with a step are skipped: the last may be cut."""
    kinds: dict[str, dict[float, dict[str, Any]]] = {"train": {}, "eval": {}, "diagnostics": {}}
    for line in _lines(run / "metrics.jsonl"):
        step = number(line.get("step"))
        if step is not None and line.get("kind") in kinds:
            kinds[line["kind"]][step] = line
    train, held_out, layers = (sorted(lines.items()) for lines in kinds.values())
    histories = ("ranks", "spectra", "orthonormality", "transport")
    return Metrics(
        _all_series(train),
        _series(held_out, "loss"),
        {key: [(step, _by_layer(line.get(key))) for step, line in layers] for key in histories},
        _all_series(held_out),
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line


def _all_series(lines: list[tuple[float, dict[str, Any]]]) -> dict[str, Series]:
    keys = dict.fromkeys(key for _, line in lines for key in line if key not in ("kind", "step"))
    return {key: _series(lines, key) for key in keys}


def _series(lines: list[tuple[float, dict[str, Any]]], key: str) -> Series:
    known = [(step, number(line.get(key))) for step, line in lines]
    pairs = [(step, value) for step, value in known if value is not None]
    return Series([step for step, _ in pairs], [value for _, value in pairs])


def _by_layer(layers: Any) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for name, value in layers.items() if isinstance(layers, dict) else ():
        if isinstance(value, list):
            clean[printable(name)] = [v for v in map(number, value) if v is not None]
        elif (known := number(value)) is not None:
            clean[printable(name)] = known
    return clean


def groups(names: Iterable[str], most: int = 7) -> dict[str, list[str]]:
    """Layers by kind, which is the name without its numbers: at most `most` kinds, the last ones pooled.

    >>> groups(["blocks.0.attention.q", "blocks.0.mlp.up", "blocks.1.attention.q"])
    {'attention.q': ['blocks.0.attention.q', 'blocks.1.attention.q'], 'mlp.up': ['blocks.0.mlp.up']}
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        words = [part for part in name.split(".") if not part.isdigit()]
        kinds.setdefault(".".join(words[-2:]) or "layers", []).append(name)
    if len(kinds) <= most:
        return kinds
    first = dict(list(kinds.items())[: most - 1])
    return first | {
        "other layers": [n for k, names in kinds.items() if k not in first for n in names]
    }


def quantiles(history: History[Any], at: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles over all finite numbers of a step, for the steps that have any.

    Shapes: -> steps (k), quantiles (len(at), k).

    >>> quantiles([(10, {"a": 1.0, "b": 3.0}), (20, {})], (0, 0.5, 1))[1].T.tolist()
    [[1.0, 2.0, 3.0]]
    """
    steps, columns = [], []
    for step, layers in history:
        pooled = np.concatenate(
            [np.zeros(0), *(np.ravel(v).astype(float) for v in layers.values())]
        )
        pooled = pooled[np.isfinite(pooled)]
        if pooled.size:
            steps.append(step)
            columns.append(np.quantile(pooled, at))
    return np.array(steps, dtype=float), np.array(columns).reshape(-1, len(at)).T


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean over `reach` neighbours on each side, over fewer near the ends so that no end is biased.

    Shapes: (k) -> (k).

    >>> running_mean(np.array([0.0, 3.0, 6.0, 0.0]), 1).tolist()
    [0.0, 3.0, 3.0, 0.0]
    """
    index = np.arange(len(values))
    reached = np.minimum(reach, np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[index + reached + 1] - total[index - reached]) / (2 * reached + 1)
