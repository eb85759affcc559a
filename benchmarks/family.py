"""Part c of optimizers.py: the whole family on the small language model of pretrain.py, and what a step costs.

The task is that of `pretrain.py --quick` at rank ratio 1/6. Embeddings, head and vectors have the same rate for all but
the methods that have no rate in Adam's units (SGD, signs): there one rate serves all parameters.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import language_model as lm
import torch
import torch.nn.functional as F
from pretrain import QUICK
from protocol import Run, Store, geometric, sweep
from torch import nn

from lowrank_geo import optim
from lowrank_geo.data import Batches

RANK = QUICK.width // 6
# The first learning rate of each grid; a name of optim.OPTIMIZERS.
FIRST = {
    "muon": 5e-3,
    "muon-product": 5e-3,
    "adam": 5e-3,
    "adam-core": 5e-3,
    "adam-scalar": 5e-3,
    "qhadam": 5e-3,
    "adavar": 5e-3,
    "adamw": 2e-3,
    "rmsprop": 1e-3,
    "lion": 2.5e-4,
    "signum": 2.5e-4,
    "signsgd": 2.5e-4,
    "sgd": 0.1,
    "sgd-nesterov": 0.1,
    "sgd-plain": 1.0,
    "sgd-clipped": 1.0,
    "qhm": 1.0,
    "fsgdm": 0.05,
}
OWN_RATE = ("lion", "sign", "sgd", "qhm", "fsgdm")


def make(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    one = name.startswith(OWN_RATE)
    rates = {"lr": lr, "euclidean_lr": lr if one else lm.EUCLIDEAN_LR}
    decay = 0.0 if name.startswith(("sgd", "qhm", "fsgdm")) else lm.WEIGHT_DECAY
    return optim.build(name, model, **rates, weight_decay=decay, total_steps=QUICK.steps)


def compute(name: str, run: Run) -> dict[str, Any]:
    model = lm.lowrank(QUICK, run.seed, RANK)
    return lm.train(model, [make(name, model, run.lr)], QUICK, run.seed)


def rows(store: Store) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    found = []
    for name, first in FIRST.items():
        row = sweep(store, name, geometric(first, 2.0, 3), partial(compute, name))
        loss = f"{row.loss:.3f} ± {row.spread:.3f}"
        found.append([name, loss, f"{row.lr:.3g}", f"{row.window:.1f}"])
    return ["optimizer", "loss, nats/byte", "best lr", "lr window"], found


def step_costs(repeats: int = 15) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of a step on the same layers, medians of interleaved repeats, over that of torch's AdamW."""
    calls: dict[str, Callable[[], Any]] = {}
    for name in FIRST:
        model = lm.lowrank(QUICK, 0, RANK)
        optimizer = make(name, model, 1e-4)
        x, y = Batches(lm.tokens().train, context=QUICK.context, batch=1, seed=0).at(0)
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        calls[name] = optimizer.step
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    medians = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
    cells = [[n, f"{1e3 * t:.1f}", f"{t / medians['adamw']:.2f}"] for n, t in medians.items()]
    return ["optimizer", "ms/step", "over torch's AdamW"], cells
