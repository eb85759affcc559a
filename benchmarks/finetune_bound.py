"""How long may a step of adapters be, where no rate bounds it? The loss against `max_advance`, far above the best rate.

    python benchmarks/finetune_bound.py digits       # about 10 minutes on 1 core
    python benchmarks/finetune_bound.py docstrings   # r = 16: about 20 minutes; needs lowrank-geo[demo]

Fixed rank with qhadam and, as a control, AdamW on LoRA with the same bounds, three seeds at a rate 16 times the best or
more, so that the bound decides alone. The window is that of bounds: the largest over the smallest of those that were
run whose mean is within 5 % of the best. Runs are kept in results/ and skipped. Ends with one JSON line.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from finetune import bounded, mean_loss
from finetune_tasks import TASKS
from protocol import Run, Store, environment, spread, table
from torch import nn
from torch.optim import Optimizer

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.finetune.methods import METHODS, Method, fixed_rank, lora
from lowrank_geo.peft import optimizer_for

BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
SEEDS = 3


class Setting(NamedTuple):
    """Far too high a rate, the rate of the head, and the ranks."""

    lr: float
    head: float
    ranks: tuple[int, ...]


SETTINGS = {
    "digits": Setting(0.64, 4e-3, (4, 8, 16, 32)),
    "docstrings": Setting(0.08, 0.032, (16,)),
}


def qhadam(model: nn.Module, config: FinetuneConfig, lr: float, max_advance: float) -> Optimizer:
    make, settings = optimizer_for(
        model, "qhadam", lr=lr, euclidean_lr=config.euclidean_lr, max_advance=max_advance
    )
    return make(**settings)


COMPARED = {"fixed-rank, qhadam": (fixed_rank, qhadam), "lora": (lora(), bounded)}


def losses(store: Store, task: str, name: str, r: int, bound: float) -> list[float]:
    """Of the seeds at one bound."""
    wrap, make = COMPARED[name]
    method = f"{name} | max_advance {bound:g}"
    METHODS[method] = Method(wrap, partial(make, max_advance=bound), None)
    setting = SETTINGS[task]
    compute = partial(TASKS[task], method, "qhadam", r, setting.head)
    label = f"{method} | r {r}"
    mean_loss(store, label, compute, SEEDS, setting.lr)
    return [store.records[Run(label, setting.lr, seed)]["loss"] for seed in range(SEEDS)]


def within(found: dict[float, float]) -> float:
    """The largest over the smallest bound whose loss is within 5 % of the best."""
    good = [bound for bound, loss in found.items() if loss <= 1.05 * min(found.values())]
    return max(good) / min(good)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(SETTINGS))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = f"finetune-bound-{arguments.task}"
    store = Store(Path(__file__).parent / "results" / f"{name}.jsonl")
    rows, records = [], []
    for method in COMPARED:
        for r in SETTINGS[arguments.task].ranks:
            found = {bound: losses(store, arguments.task, method, r, bound) for bound in BOUNDS}
            means = {bound: statistics.fmean(values) for bound, values in found.items()}
            cells = [f"{means[bound]:.3f} ± {spread(found[bound]):.3f}" for bound in BOUNDS]
            rows.append([f"{method}, r {r}", *cells, f"{within(means):.1f}"])
            records.append({"method": method, "r": r, "losses": means, "window": within(means)})
    print(table(["method", *(f"{bound:g}" for bound in BOUNDS), "window"], rows))
    print(json.dumps({"benchmark": name, "rows": records, **environment()}))


if __name__ == "__main__":
    main()
