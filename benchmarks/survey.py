"""Part e of optimizers.py: the five methods of a survey on digits and diabetes, from single samples to the whole set.

A low-rank MLP (half the parameters) on scikit-learn's digits (classification, 1 797 images of 8×8; test error) and
diabetes (regression, 442 patients, 10 features; root mean square error of the standardised target). Every method sees
the data the same number of times at one batch size and has its learning rate swept by factors of 2; a fifth of the data
is held out.
Source of the list: Deng et al., Gradient Descent Algorithm Survey, arXiv 2511.20725.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from protocol import Run, Store, geometric, sweep
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn

from lowrank_geo import convert, param_groups
from lowrank_geo.optim import RiemannianAdam, RiemannianLion, RiemannianSGD, schedules

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Problem(NamedTuple):
    """A data set, split, and how it is learned and judged."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    epochs: int


# "SGD" of the survey is one sample a step, "mini-batch SGD" the same rule with more: here a row for each batch size.
METHODS: dict[str, tuple[Make, float]] = {
    "SGD": (partial(RiemannianSGD, momentum=0.0), 0.02),
    "momentum": (partial(RiemannianSGD, momentum=0.9), 0.005),
    "Adam": (partial(RiemannianAdam, betas=(0.9, 0.999)), 1e-3),
    "Adam, tied": (RiemannianAdam, 1e-3),
    "Lion": (RiemannianLion, 1.6e-3),
}
BATCHES = {"1": 1, "16": 16, "128": 128, "all": None}
# The whole set takes one step an epoch: it gets ten times the epochs, and still far fewer steps; single samples get a
# fifth, and still far more.
PASSES: dict[int | None, float] = {1: 0.2, None: 10}


def error_rate(y: Tensor, target: Tensor) -> Tensor:
    return (y.argmax(1) != target).float().mean()


def rms(y: Tensor, target: Tensor) -> Tensor:
    return (y[:, 0] - target).square().mean().sqrt()


@cache
def problem(name: str) -> Problem:
    source = load_digits() if name == "digits" else load_diabetes()
    x = torch.tensor(source.data, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    y = torch.tensor(source.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    if name == "digits":
        return Problem((x[train], y[train]), (x[test], y[test]), 10, F.cross_entropy, error_rate, 5)
    y = ((y - y.mean()) / y.std()).float()
    loss = lambda out, target: F.mse_loss(out[:, 0], target)  # noqa: E731 (a field)
    return Problem((x[train], y[train]), (x[test], y[test]), 1, loss, rms, 20)


def compute(make: Make, name: str, batch: int | None, run: Run) -> dict[str, Any]:
    p = problem(name)
    x, y = p.train
    torch.manual_seed(run.seed)
    net: nn.Module = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, p.outputs)
    )
    net = convert(net, budget=0.5, init="spectral")
    optimizer = make(param_groups(net, lr=run.lr, euclidean_lr=run.lr))
    size = min(batch or len(x), len(x))
    epochs = max(1, round(p.epochs * PASSES.get(batch, 1)))
    schedule = schedules.cosine(optimizer, epochs * (len(x) // size), warmup=0.05)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: len(x) // size * size].split(size):
            optimizer.zero_grad()
            p.loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        score = p.score(net(p.test[0]), p.test[1]).item()
        return {"loss": p.loss(net(p.test[0]), p.test[1]).item(), "score": score}


def rows(store: Store) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; the swept and printed loss is that of held-out data."""
    found = []
    for name in ("digits", "diabetes"):
        for label, (make, first) in METHODS.items():
            for size, batch in BATCHES.items():
                row = sweep(
                    store,
                    f"{name} | {label} | batch {size}",
                    geometric(first, 2.0, 3),
                    partial(compute, make, name, batch),
                )
                scores = [
                    r["score"]
                    for run, r in store.records.items()
                    if run.method == row.method and run.lr == row.lr
                ]
                found.append(
                    [
                        name,
                        label,
                        size,
                        f"{row.loss:.3f} ± {row.spread:.3f}",
                        f"{sum(scores) / len(scores):.3f}",
                        f"{row.lr:.3g}",
                        f"{row.window:.1f}",
                    ]
                )
    score = "error rate / RMSE"
    return ["data", "method", "batch", "held-out loss", score, "best lr", "lr window"], found
