"""Pre-training with a fraction of the parameters: every method on the same text, from the same starting weights.

    python benchmarks/pretrain.py --quick     # up to 30 minutes on 2 cores: rank ratio 1/6, small model
    python benchmarks/pretrain.py --quick --ratio 3 --ratio 2    # the same model, an hour on 2 cores
    python benchmarks/pretrain.py --full      # about 8 hours on 2 cores: rank ratios 1/6, 1/3, 1/2

A byte-level decoder on Python's standard library; loss in nats per byte on held-out files. Learning rates by
`protocol.sweep`; stop it at any time, finished runs are kept in results/ and skipped. Ends with one JSON line.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import language_model as lm
import torch
from language_model import Task
from protocol import Row, Run, Store, environment, geometric, sweep, table
from torch import nn

from lowrank_geo import lowrank_layers

QUICK = Task(width=128, hidden=344, layers=4, heads=4, context=128, batch=8, steps=200)
FULL = Task(width=192, hidden=512, layers=4, heads=6, context=128, batch=16, steps=400)
HEADER = [
    "r / width",
    "method",
    "loss, nats/byte",
    "best lr",
    "lr window",
    "M parameters",
    "MFLOP/token",
    "ms/step",
]


class Method(NamedTuple):
    """How to build the model and its optimizers, and where its grid of learning rates starts."""

    model: Callable[[Task, int], nn.Module]
    optimizers: Callable[[nn.Module, float], list[torch.optim.Optimizer]]
    first: float


def methods(task: Task, rank: int) -> dict[str, Method]:
    lowrank = partial(lm.lowrank, rank=rank)
    factors = partial(lm.factors, rank=rank)
    budget = sum(p.numel() for p in lm.lowrank(task, 0, rank).parameters())
    slim = lm.narrow(task, budget)
    return {
        "dense, Muon": Method(lm.dense, lm.muon, 2e-3),
        "dense, AdamW": Method(lm.dense, lm.adamw, 1e-3),
        f"narrow dense (width {slim.width}), Muon": Method(
            lambda _, seed: lm.dense(slim, seed), lm.muon, 2e-3
        ),
        "two factors, Muon": Method(factors, lm.muon, 5e-3),
        "RiemannianMuon": Method(lowrank, lm.riemannian_muon, 5e-3),
        "RiemannianMuon, product metric": Method(
            lowrank, partial(lm.riemannian_muon, metric="product"), 5e-3
        ),
        "two factors, AdamW": Method(factors, lm.adamw, 2e-3),
        "U, S, V with AdamW": Method(lowrank_as_factors(lowrank), lm.adamw, 2e-3),
        "RiemannianAdam": Method(lowrank, lm.riemannian_adam, 5e-3),
        "RiemannianAdam, betas of AdamW": Method(
            lowrank, partial(lm.riemannian_adam, betas=(0.9, 0.999)), 5e-3
        ),
    }


def lowrank_as_factors(lowrank: Callable[..., nn.Module]) -> Callable[[Task, int], nn.Module]:
    """The naive method: U, S and V as ordinary parameters."""

    def build(task: Task, seed: int) -> nn.Module:
        model = lowrank(task, seed)
        assert all(layer.gradient == "factors" for _, layer in lowrank_layers(model))
        return model

    return build


def compute(method: Method, task: Task, run: Run) -> dict[str, Any]:
    model = method.model(task, run.seed)
    return lm.train(model, method.optimizers(model, run.lr), task, run.seed)


def line(ratio: str, row: Row) -> list[str]:
    name, record = row.method.split(" | ")[-1], row.record
    return [
        ratio,
        name,
        f"{row.loss:.3f} ± {row.spread:.3f}",
        f"{row.lr:.3g}",
        f"{row.window:.1f}",
        f"{record['parameters'] / 1e6:.2f}",
        f"{record['mflop_per_token']:.1f}",
        f"{record['ms_per_step']:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the default")
    size.add_argument("--full", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="methods whose name matches this regular expression")
    parser.add_argument(
        "--ratio",
        type=int,
        choices=(6, 3, 2),
        action="append",
        help="rank 1/this of the width, more than once for more; by default 6, with --full all three",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = FULL if arguments.full else QUICK
    name = "full" if arguments.full else "quick"
    store = Store(Path(__file__).parent / "results" / f"pretrain-{name}.jsonl")
    rows = []
    for ratio in arguments.ratio or ((6, 3, 2) if arguments.full else (6,)):
        for label, method in methods(task, task.width // ratio).items():
            # Dense rows do not depend on the rank and are computed once.
            key = label if label.startswith("dense") else f"1/{ratio} | {label}"
            if arguments.only and not re.search(arguments.only, label):
                continue
            grid = geometric(method.first, 2.0, 3)
            row = sweep(store, key, grid, partial(compute, method, task))
            rows.append(line(f"1/{ratio}", row))
    print(table(HEADER, rows))
    records = [dict(zip(HEADER, row, strict=True)) for row in rows]
    print(
        json.dumps(
            {
                "benchmark": f"pretrain-{name}",
                "task": task._asdict(),
                "rows": records,
                **environment(),
            }
        )
    )


if __name__ == "__main__":
    main()
