"""Does one learning rate serve adapters of every rank, and would a step that shrinks with the rank serve better?

    python benchmarks/finetune_scale.py                  # about 20 minutes on 1 core
    python benchmarks/finetune_scale.py --optimizer muon-product
    python benchmarks/finetune_scale.py --optimizer qhadam   # whose rate `optimizer_for` divides by the rank

The digits of benchmarks/finetune.py at r = 4, 8, 16 and 32, a grid of ratio √2, three seeds at every rate: near the
best the curves are flatter than one seed is certain. A step times (8/r)^p is the same as a rate times it, so the loss
at a common rate under each p is read off the same curves, between the rates in their logarithm; p = 0 is what
`optimizer_for` does. Runs are kept in results/ and skipped. Ends with one JSON line.
"""

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from finetune import RANKS
from finetune_tasks import compute_digits
from protocol import Run, Store, environment, geometric, table


class Plan(NamedTuple):
    """The grid of an optimizer, and the scales of its step that are compared."""

    first: float
    count: int
    powers: tuple[float, ...]


PLANS = {
    "muon": Plan(0.01, 7, (0.0, 0.25, 0.5)),
    "muon-product": Plan(0.04, 7, (0.0, 0.25, 0.5)),
    "qhadam": Plan(2.5e-3, 10, (-1.0, -0.5, 0.0, 0.5)),
}
HEAD = 2e-3  # rate of the new head, which matters little here


class Curve(NamedTuple):
    """Mean held-out losses of one rank over a grid of rates, and the standard error of each."""

    rates: list[float]
    losses: list[float]
    errors: list[float]

    def at(self, lr: float) -> float:
        """The loss at a rate, linear in its logarithm; NaN outside of the grid."""
        for (a, x), (b, y) in zip(
            zip(self.rates, self.losses, strict=True),
            zip(self.rates[1:], self.losses[1:], strict=True),
            strict=False,
        ):
            if a <= lr * 1.001 and lr <= b * 1.001:
                t = min(max(math.log(lr / a) / math.log(b / a), 0.0), 1.0)
                return (1 - t) * x + t * y
        return math.nan


def curve(store: Store, optimizer: str, r: int, grid: list[float], seeds: int) -> Curve:
    compute = partial(compute_digits, "fixed-rank", optimizer, r, HEAD)
    found = [
        [store.get(Run(f"r {r}", lr, seed), compute)["loss"] for seed in range(seeds)]
        for lr in grid
    ]
    means = [statistics.fmean(losses) for losses in found]
    errors = [statistics.stdev(losses) / seeds**0.5 for losses in found]
    return Curve(grid, means, errors)


def excess(curves: dict[int, Curve], lr: float, power: float) -> float:
    """How much worse than at its own best rate a rank is at lr · (8/r)^power, the mean over ranks."""
    return statistics.fmean(c.at(lr * (8 / r) ** power) - min(c.losses) for r, c in curves.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=sorted(PLANS), default="muon")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = f"finetune-scale-{arguments.optimizer}"
    store = Store(Path(__file__).parent / "results" / f"{name}.jsonl")
    plan = PLANS[arguments.optimizer]
    grid = geometric(plan.first, 2**0.5, plan.count)
    curves = {r: curve(store, arguments.optimizer, r, grid, arguments.seeds) for r in RANKS}
    cells = [
        [f"{lr:.3g}", *(f"{c.losses[i]:.3f} ± {c.errors[i]:.3f}" for c in curves.values())]
        for i, lr in enumerate(grid)
    ]
    print(table(["lr", *(f"r = {r}" for r in RANKS)], cells))
    shared = {
        power: {lr: value for lr in grid if math.isfinite(value := excess(curves, lr, power))}
        for power in plan.powers
    }
    best = {power: min(found, key=found.__getitem__) for power, found in shared.items()}
    rows = [
        [f"(8/r)^{power:g}", f"{best[power]:.3g}", f"{found[best[power]]:.3f}"]
        for power, found in shared.items()
    ]
    print(table(["step times", "best common lr", "mean excess loss"], rows))
    own = {r: min(zip(c.losses, c.rates, strict=True))[1] for r, c in curves.items()}
    print(json.dumps({"benchmark": name, "best": own, "common": rows, **environment()}))


if __name__ == "__main__":
    main()
