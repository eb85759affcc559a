"""Part c of optimizers.py: the whole family on the small language model of pretrain.py, and what a step costs.

The task is that of `pretrain.py --quick` at rank ratio 1/6. Embeddings, head and vectors have the same rate for all but
the methods that have no rate in Adam's units (SGD, signs): there one rate serves all parameters.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from statistics import fmean, median
from typing import Any

import language_model as lm
import torch
import torch.nn.functional as F
from pretrain import QUICK
from protocol import Run, Store, geometric, sweep
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lowrank_geo import optim, param_groups
from lowrank_geo.data import Batches
from lowrank_geo.optim import schedules
from lowrank_geo.optim.filters import EMA, FSGDM
from lowrank_geo.train.step import descend

RANK = QUICK.width // 6
# The first learning rate of each grid; a name of optim.OPTIMIZERS. The seven of arXiv 2505.21829 are adam, signum,
# rmsprop, sgd-clipped, signsgd, sgd and sgd without clipping.
FIRST = {
    "muon": 5e-3,
    "muon-product": 5e-3,
    "adam": 5e-3,
    "sgd": 0.1,
    "fsgdm": 0.05,
    "lion": 2.5e-4,
    "signum": 2.5e-4,
    "dlrt-adam": 1e-2,
    "signsgd": 2.5e-4,
    "rmsprop": 1e-3,
    "sgd-clipped": 1.0,
    "dlrt-heavy-ball": 0.1,
    "adamw": 2e-3,
    "qhm": 1.0,
    "qhadam": 5e-3,
    "adam-scalar": 5e-3,
    "adam-core": 5e-3,
    "adavar": 5e-3,
    "sgd-nesterov": 0.1,
    "sgd-plain": 1.0,
}
# Without a schedule, to be held against the same rule tuned with one: its first learning rate.
SCHEDULE_FREE = {
    "schedule-free-muon": 5e-3,
    "schedule-free-adam": 5e-3,
    "schedule-free-polyak": 1e-2,
    "schedule-free-sgd": 1.0,
}
OWN_RATE = ("lion", "sign", "sgd", "qhm", "fsgdm", "dlrt-heavy-ball")
WITHOUT_DECAY = ("sgd", "qhm", "fsgdm", "dlrt-heavy-ball")


def make(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    one = name.startswith(OWN_RATE) or name == "schedule-free-sgd"
    rates = {"lr": lr, "euclidean_lr": lr if one else lm.EUCLIDEAN_LR}
    if name == "sgd-ema":  # RiemannianSGD whose momentum has gain 1
        groups = param_groups(model, **rates)
        return optim.RiemannianSGD(groups, filter=EMA(0.9))
    decay = 0.0 if name.startswith(WITHOUT_DECAY) else lm.WEIGHT_DECAY
    return optim.build(name, model, **rates, weight_decay=decay, total_steps=QUICK.steps)


def compute(name: str, run: Run, **how: Any) -> dict[str, Any]:
    model = lm.lowrank(QUICK, run.seed, RANK)
    return lm.train(model, [make(name, model, run.lr)], QUICK, run.seed, **how)


def adaptive(name: str, run: Run) -> dict[str, Any]:
    """Dynamical low-rank training with room for twice the rank, judged where it is back below it, as others are."""
    model = optim.reserve(lm.lowrank(QUICK, run.seed, RANK))
    optimizer = make(name, model, run.lr)
    record = lm.train(model, [optimizer], QUICK, run.seed)
    optimizer.truncate()
    ranks = sorted(optimizer.ranks().values())
    parameters = sum(p.numel() for p in optim.compact(model).parameters())
    measured = {"loss": lm.evaluate(model, QUICK), "parameters": parameters, "ranks": ranks}
    return {**record, **measured, "peak_parameters": record["parameters"]}


def level(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Warmup and then always the same."""
    return schedules.warmup_stable_decay(optimizer, steps, warmup=0.05, decay=0.0)


def gain_of_fsgdm(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The common schedule times the gain v/(1 − u(t)) of FSGDM's filter, in units of its last: a fixed average with it
    moves as far as FSGDM does, so that what is left between the two is the filter.
    """
    filter, common = FSGDM(steps), lm.decaying(optimizer, steps).lr_lambdas[0]
    poles = filter.pole(torch.arange(1.0, steps + 2))
    gains = ((1 - poles[-1]) / (1 - poles)).tolist()
    return LambdaLR(optimizer, lambda step: common(step) * gains[min(step, steps)])


def methods() -> dict[str, tuple[float, Callable[[Run], dict[str, Any]]]]:
    """First learning rate of the grid and run, by the name of the row."""
    found = {
        name: (first, partial(adaptive if name.startswith("dlrt") else compute, name))
        for name, first in FIRST.items()
    }
    for name, first in SCHEDULE_FREE.items():
        found[f"{name}, no schedule"] = first, partial(compute, name, plan=level)
    found["muon, no schedule"] = FIRST["muon"], partial(compute, "muon", plan=level)
    found["sgd, no clipping"] = FIRST["sgd"] / 4, partial(compute, "sgd", clip=math.inf)
    found["average with the gain of fsgdm"] = 1.0, partial(compute, "sgd-ema", plan=gain_of_fsgdm)
    return found


def rows(store: Store, only: list[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, of all methods or those named.

    Raises: SystemExit naming the rows there are, for another.
    """
    every = methods()
    names = list(every) if only is None else only
    if unknown := set(names) - set(every):
        raise SystemExit(f"--only needs rows of {', '.join(every)}, got {', '.join(unknown)}")
    found = []
    for name in names:
        first, run = every[name]
        row = sweep(store, name, geometric(first, 2.0, 3), run)
        loss = f"{row.loss:.3f} ± {row.spread:.3f}"
        found.append([name, loss, f"{row.lr:.3g}", f"{row.window:.1f}"])
    return ["optimizer", "loss, nats/byte", "best lr", "lr window"], found


def step_costs(cycles: int = 3) -> tuple[list[str], list[list[str]]]:
    """Milliseconds of a step on the same layers, interleaved, over that of torch's AdamW.

    Every step of a cycle of augmentation and truncation has its median over the cycles; a row is their mean.
    """
    calls: dict[str, Callable[[], Any]] = {}
    for name in [*FIRST, *SCHEDULE_FREE]:
        model = lm.lowrank(QUICK, 0, RANK)
        optimizer = make(name, optim.reserve(model) if name.startswith("dlrt") else model, 1e-4)
        if isinstance(optimizer, optim.ScheduleFree):
            optimizer.train()
        x, y = Batches(lm.tokens().train, context=QUICK.context, batch=1, seed=0).at(0)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        calls[name] = partial(descend, optimizer, loss.item())
    length = 11  # of the default cycle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range((cycles + 1) * length):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= length:
                times[name].append(time.perf_counter() - start)
    costs = {
        name: fmean(median(t[phase::length]) for phase in range(length))
        for name, t in times.items()
    }
    cells = [[n, f"{1e3 * t:.1f}", f"{t / costs['adamw']:.2f}"] for n, t in costs.items()]
    return ["optimizer", "ms/step", "over torch's AdamW"], cells
