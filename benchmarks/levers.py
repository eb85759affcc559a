"""What each setting of RiemannianMuon is worth alone, with one seed: the screening behind its defaults.

    python benchmarks/levers.py                   # all, about 25 minutes on 2 cores
    python benchmarks/levers.py --only embedded   # those whose names match a regular expression

The quick task of benchmarks/pretrain.py, twice as long. One seed and one change at a time: differences below 0.03, the
spread between seeds, say nothing. Ends with one JSON line.
"""

import argparse
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import language_model as lm
import torch
from pretrain import QUICK
from protocol import Run, Store, environment, table
from torch import Tensor, nn

from lowrank_geo import convert, plan_ranks, to_dense
from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim import RiemannianMuon
from lowrank_geo.optim.step import Rule

TASK = QUICK._replace(steps=400)
RANK = TASK.width // 6


class Lever(NamedTuple):
    """One change against the defaults."""

    name: str
    lr: float = 0.01
    init: str = "spectral"
    settings: dict[str, Any] = {}
    metric: str = "product"
    power: float = 0.0  # p of rotations scaled by S^-p, product metric
    rank: int = RANK
    start: int = 0  # rank of the first half, cut to `rank` in the middle
    skip: tuple[str, ...] = (
        "lm_head",
    )  # what stays dense, at the parameters of all layers at `rank`


LEVERS = [
    Lever("defaults"),
    Lever("spectrum 2", settings={"spectrum": 2.0}),
    Lever("spectrum 4", settings={"spectrum": 4.0}),
    Lever("rotation 0.25", settings={"rotation": 0.25}),
    Lever("rotation 0.25, spectrum 2", settings={"rotation": 0.25, "spectrum": 2.0}),
    Lever("orthogonal start", init="orthogonal"),
    Lever("lr 0.005", lr=0.005),
    Lever("lr 0.02", lr=0.02),
    Lever("lr 0.04", lr=0.04),
    Lever("rotation by S^-1/2", power=0.5),
    Lever("rotation by S^-1", power=1.0),
    Lever("embedded", metric="embedded"),
    Lever("embedded, orthogonal start", metric="embedded", init="orthogonal"),
    # The range of a tangent is that of the augmented bases: this is a refresh of the bases in every step.
    Lever(
        "embedded, bases augmented and truncated",
        0.01,
        "spectral",
        {"retraction": "svd"},
        "embedded",
    ),
    Lever("embedded, first half at twice the rank", metric="embedded", start=2 * RANK),
    # At RANK dense attention alone is over the budget.
    Lever("embedded, r = 42", metric="embedded", rank=2 * RANK),
    Lever(
        "embedded, r = 42, attention dense",
        metric="embedded",
        rank=2 * RANK,
        skip=("lm_head", "attention"),
    ),
]


class PowerMuon(RiemannianMuon):
    """RiemannianMuon in the product metric with ΔU (SSᵀ/s²)^(−p/2) and ΔV (SᵀS/s²)^(−p/2) for ΔU and ΔV, s² the mean
    of σ²: balanced factors at p = 1/2, the rotations of the embedded metric at p = 1.
    """

    power = 0.0

    def rule(self, group: dict[str, Any]) -> Rule:
        rule = super().rule(group)
        move = partial(scaled_move, rule.metric.move, self.power)
        return rule._replace(metric=rule.metric._replace(move=move))


def scaled_move(move: Any, p: float, point: Point, step: Tangent, xi: Tangent) -> Any:
    left, right = (inverse_power(gram, p) for gram in (point.S @ point.S.mT, point.S.mT @ point.S))
    return move(point, Tangent(step.Up @ left, step.M, step.Vp @ right), xi)


def inverse_power(gram: Tensor, p: float) -> Tensor:
    """(G/s²)^(−p/2), s² the mean eigenvalue, eigenvalues at least s²/100.

    Shapes: (L, r, r) -> (L, r, r).
    """
    values, vectors = torch.linalg.eigh(gram)
    scaled = (values / values.mean(-1, keepdim=True)).clamp_min(1e-2) ** (-p / 2)
    return vectors @ (scaled[..., None] * vectors.mT)


def compute(lever: Lever, run: Run) -> dict[str, Any]:
    half = TASK.steps // 2
    model = start(lever, run.seed)
    if not lever.start:
        return lm.train(model, optimizers(lever, model, run.lr), TASK, run.seed)
    lm.train(model, optimizers(lever, model, run.lr), TASK, run.seed, steps=range(half))
    model = to_dense(model)
    model = convert(model, plan_ranks(model, rank=lever.rank, init="svd"))
    rest = range(half, TASK.steps)
    return lm.train(model, optimizers(lever, model, run.lr), TASK, run.seed, steps=rest)


def start(lever: Lever, seed: int) -> nn.Module:
    """The model at the lever's first rank; with more of it dense, at the budget of all layers at that rank."""
    rank = lever.start or lever.rank
    if lever.skip == ("lm_head",):
        return lm.lowrank(TASK, seed, rank, lever.init)
    model = lm.dense(TASK, seed)
    budget = plan_ranks(model, rank=rank).parameters / lm.size(TASK)
    return convert(model, plan_ranks(model, budget=budget, skip=lever.skip, init=lever.init))


def optimizers(lever: Lever, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    settings = {"metric": lever.metric, **lever.settings}
    if not lever.power:
        return lm.riemannian_muon(model, lr, **settings)
    [optimizer] = lm.riemannian(model, lr, PowerMuon, **settings)
    optimizer.power = lever.power
    return [optimizer]


def two_factors(run: Run) -> dict[str, Any]:
    model = lm.factors(TASK, run.seed, RANK)
    return lm.train(model, lm.muon(model, run.lr), TASK, run.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression of names")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    store = Store(Path(__file__).parent / "results" / "levers.jsonl")
    losses = {
        lever.name: store.get(Run(lever.name, lever.lr, 0), partial(compute, lever))["loss"]
        for lever in LEVERS
        if re.search(arguments.only, lever.name)
    }
    for lr in (0.005, 0.01, 0.02):
        name = f"two factors, Muon, lr {lr:g}"
        if re.search(arguments.only, name):
            losses[name] = store.get(Run(name, lr, 0), two_factors)["loss"]
    rows = [[name, f"{loss:.3f}"] for name, loss in losses.items()]
    print(table(["change", "loss, nats/byte"], rows))
    print(json.dumps({"benchmark": "levers", "rows": rows, **environment()}))


if __name__ == "__main__":
    main()
