"""The protocol of every benchmark: equal grids, three seeds at the best learning rates, one JSON line a run.

Every method gets the same grid of learning rates with one seed; while the optimum lies at an edge the grid grows there.
Then the best learning rate and its two neighbours get three seeds, and the grid grows again if the best mean is at an
edge. Runs already in the results file are skipped, so a
benchmark that was stopped goes on where it was.
"""

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lowrank_geo import __version__

ROOT = Path(__file__).parent
GROWTH = 6  # most learning rates a grid may grow by


class Run(NamedTuple):
    """What identifies a run; `method` holds all that is not swept."""

    method: str
    lr: float
    seed: int


class Store:
    """Finished runs, one JSON line each, appended as they end."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        self.records = {Run(r["method"], r["lr"], r["seed"]): r for r in records}

    def get(self, run: Run, compute: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        """The record of a run, computed and appended if it is not there."""
        if run not in self.records:
            record = {**compute(run), **run._asdict(), **environment()}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self.records[run] = record
            print(
                f"{run.method:40s} lr {run.lr:<9.3g} seed {run.seed}: {record['loss']:.4f}",
                flush=True,
            )
        return self.records[run]


class Row(NamedTuple):
    """A method at its best learning rate: mean and standard deviation over seeds."""

    method: str
    lr: float
    loss: float
    spread: float
    seeds: int
    window: float  # max lr / min lr among those within 5 % of the best loss, one seed
    record: dict[str, Any]  # of the first seed at this lr


def sweep(
    store: Store,
    method: str,
    grid: list[float],
    compute: Callable[[Run], dict[str, Any]],
    *,
    seeds: int = 3,
) -> Row:
    """The whole protocol for one method."""
    rates = sorted(grid)

    def loss(lr: float, seed: int = 0) -> float:
        value = store.get(Run(method, lr, seed), compute)["loss"]
        return value if math.isfinite(value) else math.inf

    def mean(lr: float) -> float:
        return statistics.fmean(loss(lr, seed) for seed in range(seeds))

    ratio = rates[1] / rates[0]
    best = min(rates, key=loss)
    while True:
        at = rates.index(best)
        if at in (0, len(rates) - 1) and len(rates) < len(grid) + GROWTH:
            rates.insert(*((0, rates[0] / ratio) if at == 0 else (len(rates), rates[-1] * ratio)))
            rates = [round_rate(lr) for lr in rates]
            best = min(best, rates[0 if at == 0 else -1], key=loss)
            continue
        # More seeds may find that a neighbour is better, which then needs neighbours of its own.
        chosen = min(rates[max(at - 1, 0) : at + 2], key=mean)
        if chosen == best:
            break
        best = chosen
    values = [loss(chosen, seed) for seed in range(seeds)]
    usable = [lr for lr in rates if loss(lr) <= 1.05 * min(map(loss, rates))]
    return Row(
        method,
        chosen,
        mean(chosen),
        spread(values),
        seeds,
        max(usable) / min(usable),
        store.records[Run(method, chosen, 0)],
    )


def window(loss: Callable[[float], float], best: float) -> float:
    """The largest over the smallest rate around the best at which the loss is within 5 % of it."""
    bar = 1.05 * loss(best)
    return edge(loss, best, 2.0, bar) / edge(loss, best, 0.5, bar)


def edge(loss: Callable[[float], float], best: float, ratio: float, bar: float) -> float:
    """The rate, from the best on by factors of `ratio`, at which the loss passes the bar: between the last rate that
    does not and the first that does, linear in the logarithm. After six factors the last of them.
    """
    inside = best
    for _ in range(GROWTH):
        outside = round_rate(inside * ratio)
        if not loss(outside) <= bar:
            part = (bar - loss(inside)) / (loss(outside) - loss(inside))
            return inside * ratio ** (part if math.isfinite(part) else 0.0)
        inside = outside
    return inside


def spread(values: list[float]) -> float:
    """Standard deviation; 0 for a single value, NaN if one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def round_rate(lr: float) -> float:
    """A learning rate to three significant digits, so that grids from both sides meet."""
    return float(f"{lr:.3g}")


def geometric(first: float, ratio: float, count: int) -> list[float]:
    """A grid of learning rates."""
    return [round_rate(first * ratio**i) for i in range(count)]


def environment() -> dict[str, Any]:
    """Commit, machine and versions, for every record."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit or "unknown",
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "lowrank_geo": __version__,
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(r) for r in rows)])


class Lines:
    """Finished measurements, one JSON line each, known by their settings: what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.records = (
            [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
        )

    def get(
        self, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record of some settings, measured and appended if it is not there."""
        for record in self.records:
            if settings.items() <= record.items():
                return record
        record = {**settings, **compute(), **environment()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        return record
