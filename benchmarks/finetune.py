"""Adapters at equal rank: fixed rank with every optimizer against LoRA and its variants, on three tasks.

    python benchmarks/finetune.py digits --quick      # r = 4, 16, 32, five methods, one seed
    python benchmarks/finetune.py digits              # r = 4, 8, 16, 32, three seeds
    python benchmarks/finetune.py docstrings --quick  # r = 16; needs lowrank-geo[demo]; 15 to 30 s a run, 13 a method
    python benchmarks/finetune.py swapped --only "qhadam|muon-|^lora$|adalora"  # half an hour a core
    python benchmarks/finetune.py docstrings --ranks 16 --only "fixed-rank, muon|^lora"  # all of it: 12 hours a core

The tasks are those of finetune_tasks.py. Every method has grids of ratio 2 for
two learning rates, its own and that of the new head, grown until the best is inside: a method that is compared at the
head's rate of another one looks worse by more than what adapters differ by. Runs are kept in results/ and skipped. Ends
with one JSON line.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from finetune_tasks import TASKS
from protocol import Row, Run, Store, environment, geometric, round_rate, sweep, table, window
from torch import nn

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.finetune.methods import METHODS, Method, lora, with_head
from lowrank_geo.optim import RiemannianAdam
from lowrank_geo.peft.training import BETAS, MAX_RMS


def bounded(
    model: nn.Module, config: FinetuneConfig, lr: float, max_advance: float | None = None
) -> RiemannianAdam:
    """AdamW whose directions of A and B, and steps, are bounded as those of the fixed-rank adapter are."""
    adapters, *heads = with_head(model, config, lr)
    bounds = {"max_rms": MAX_RMS, "max_advance": max_advance}
    return RiemannianAdam([{**adapters, **bounds}, *heads], betas=BETAS)


METHODS["lora-bounded"] = Method(lora(), bounded, None)
OPTIMIZERS = ("muon", "muon-product", "adam", "sgd", "lion", "qhadam")
BASELINES = tuple(name for name in METHODS if name != "fixed-rank")
FIRST = {
    "muon": 5e-3,
    "muon-product": 0.04,
    "adam": 6.25e-4,
    "qhadam": 6.25e-4,
    "sgd": 0.125,
    "lion": 1e-3,
    "full": 2.5e-4,
}  # first rate of the grid where 2.5e-3 is far off, or where nothing is learned from there on at large ranks
HEAD = {
    "digits": 4e-3,
    "docstrings": 0.032,
    "swapped": 4e-3,
}  # where the search for the rate of new heads starts
SEARCH = {
    "digits": 3,
    "docstrings": 1,
    "swapped": 3,
}  # seeds of that search: what is noisier is quicker, too
RANKS = (4, 8, 16, 32)
QUICK_RANKS = {"digits": (4, 16, 32), "docstrings": (16,), "swapped": (4, 16, 32)}
QUICK = ("fixed-rank, muon", "lora", "lora-manifold", "pissa", "full")

Compute = Callable[[float, Run], dict[str, Any]]  # of the rate of the head, and a run


def entries(r: int, quick: bool) -> list[tuple[str, str, str]]:
    """(name, method, optimizer) of what is compared at a rank; full fine-tuning has none and is there once."""
    found = [(f"fixed-rank, {name}", "fixed-rank", name) for name in OPTIMIZERS]
    found += [(name, name, "muon") for name in BASELINES if name != "full" or r == 16]
    return [entry for entry in found if not quick or entry[0] in QUICK]


def label(name: str, r: int, head: float) -> str:
    """What a run is kept under."""
    return f"{name} | r {r} | head {head:g}"


def first_rate(method: str, optimizer: str) -> float:
    return FIRST.get(optimizer if method == "fixed-rank" else method, 2.5e-3)


class Tuned(NamedTuple):
    """A method at the best of both learning rates."""

    name: str
    r: int
    head: float
    row: Row
    window: float  # of rates, see `window`


def around(lr: float) -> list[float]:
    """A rate and its two neighbours."""
    return geometric(lr / 2, 2.0, 3)


def sweep_both(
    store: Store,
    name: str,
    r: int,
    grid: list[float],
    compute: Compute,
    *,
    head: float,
    search: int,
    seeds: int,
) -> Tuned:
    """The protocol for one method, at the rate of the head, from `head` on, that is the best with `search` seeds."""
    rows: dict[float, Row] = {}

    def at(head: float, grid: list[float], seeds: int) -> Row:
        return sweep(store, label(name, r, head), grid, partial(compute, head), seeds=seeds)

    while True:
        for rate in (head, round_rate(head / 2), round_rate(head * 2)):
            if rate not in rows:
                rows[rate] = at(rate, grid, search)
                grid = around(rows[rate].lr)
        best = min(rows, key=lambda rate: rows[rate].loss)
        if best == head:
            break
        head = best
    row = at(head, around(rows[head].lr), seeds)
    found = partial(mean_loss, store, row.method, partial(compute, head), seeds)
    return Tuned(name, r, head, row, window(found, row.lr))


def mean_loss(
    store: Store, method: str, compute: Callable[[Run], dict[str, Any]], seeds: int, lr: float
) -> float:
    """Over all seeds, computed where it is not there: one seed of these tasks spreads by as much as a window's 5 %."""
    return statistics.fmean(
        store.get(Run(method, lr, seed), compute)["loss"] for seed in range(seeds)
    )


def means(store: Store, method: str) -> dict[float, float]:
    """The mean loss at each rate that was run; far from the best it is that of one seed."""
    losses: dict[float, list[float]] = {}
    for run, record in store.records.items():
        if run.method == method:
            losses.setdefault(run.lr, []).append(record["loss"])
    return {lr: statistics.fmean(found) for lr, found in losses.items()}


def as_good(store: Store, tuned: Tuned, bar: float) -> float:
    """The largest over the smallest rate at which a method is no worse than `bar`, the loss of LoRA at its best and the
    same rank; 0 if there is none, NaN without LoRA. A bar that is one for all: within 5 % of its own best, a method
    with a deep minimum looks sensitive at rates where it still beats the others.
    """
    good = [lr for lr, loss in means(store, tuned.row.method).items() if loss <= bar]
    return math.nan if math.isnan(bar) else max(good) / min(good) if good else 0.0


def one_rate(store: Store, ranks: list[Tuned]) -> tuple[float, float]:
    """The rate that serves all ranks of a method best, and its mean loss above that of each rank's own best rate.

    Of the rates that were run at every rank, with the head that is best at the rank; NaN if there is none.
    """
    found = [means(store, tuned.row.method) for tuned in ranks]
    shared = set.intersection(*(set(losses) for losses in found))
    excess = {
        lr: statistics.fmean(
            losses[lr] - tuned.row.loss for losses, tuned in zip(found, ranks, strict=True)
        )
        for lr in shared
    }
    return min(excess.items(), key=lambda item: item[1], default=(math.nan, math.nan))


def transfer(store: Store, found: list[Tuned]) -> list[list[str]]:
    """How far one learning rate for all ranks goes, and the geometric mean of windows, for methods tuned at several."""
    by_name = {t.name: [x for x in found if x.name == t.name] for t in found}
    lines = []
    for name, ranks in by_name.items():
        if len(ranks) > 1:
            lr, excess = one_rate(store, ranks)
            own = ", ".join(f"{x.row.lr:.3g} (r {x.r})" for x in ranks)
            wide = statistics.geometric_mean(x.window for x in ranks)
            lines.append([name, own, f"{lr:.3g}", f"{excess:.3f}", f"{wide:.2f}"])
    return lines


def line(tuned: Tuned, store: Store, bar: float) -> list[str]:
    row = tuned.row
    records = [store.records[Run(row.method, row.lr, seed)] for seed in range(row.seeds)]
    accuracy = statistics.fmean(r["accuracy"] for r in records)
    speed = statistics.fmean(r["samples_per_second"] for r in records)
    return [
        f"{tuned.name}, r {tuned.r}",
        f"{accuracy:.3f}",
        f"{row.loss:.3f} ± {row.spread:.3f}",
        f"{row.lr:.3g}",
        f"{tuned.head:.3g}",
        f"{tuned.window:.1f}",
        f"{as_good(store, tuned, bar):.0f}",
        f"{row.record['trained']:,}",
        f"{speed:.0f}",
        f"{row.record['peak_memory'] / 2**20:,.0f}",
    ]


HEADER = [
    "method",
    "accuracy",
    "held-out loss",
    "best lr",
    "of the head",
    "lr window",
    "as LoRA",
    "trained",
    "samples/s",
    "MiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument(
        "--quick", action="store_true", help="five methods at r = 4, 16, 32, one seed"
    )
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument(
        "--only", default="", help="methods whose name matches this regular expression"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task, quick = arguments.task, arguments.quick
    name = f"finetune-{task}" + ("-quick" if quick else "")
    store = Store(Path(__file__).parent / "results" / f"{name}.jsonl")
    found = []
    for r in arguments.ranks or (QUICK_RANKS[task] if quick else RANKS):
        for entry, method, optimizer in entries(r, quick):
            if re.search(arguments.only, entry):
                compute = partial(TASKS[task], method, optimizer, r)
                grid = geometric(first_rate(method, optimizer), 2.0, 4)
                search, seeds = (1, 1) if quick else (SEARCH[task], 3)
                start = HEAD[task]
                found.append(
                    sweep_both(
                        store, entry, r, grid, compute, head=start, search=search, seeds=seeds
                    )
                )
    bars = {tuned.r: tuned.row.loss for tuned in found if tuned.name == "lora"}
    print(table(HEADER, [line(tuned, store, bars.get(tuned.r, math.nan)) for tuned in found]))
    if shared := transfer(store, found):
        print(
            table(
                ["method", "best lr of each rank", "one lr", "mean excess loss", "mean window"],
                shared,
            )
        )
    records = [
        {**tuned.row._asdict(), "window": tuned.window, "head": tuned.head} for tuned in found
    ]
    print(json.dumps({"benchmark": name, "rows": records, **environment()}))


if __name__ == "__main__":
    main()
