"""Part a of optimizers.py: a quadratic on matrices of rank 5, iterations until the loss has fallen by 10⁶.

    L(W) = ½⟨W − W*, A(W − W*)B⟩,  W* 50×40 with singular values from 1 down to 1/κ, A and B of one condition number

Every method starts at the same point of rank 5, sees exact gradients, has momentum 0.9 and the same eight learning
rates; three draws of the problem, the mean at the rate where it is lowest. An iteration is one gradient; DLRT spends
one of each cycle on its bases. Truncation of DLRT is to rank 5 exactly: a tolerance of 0.1 would cut W* itself.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from protocol import Run, Store, table
from torch import Tensor, nn

from lowrank_geo import geometry, param_groups
from lowrank_geo.geometry import Point
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.optim import AugmentedAdam, AugmentedHeavyBall, RiemannianSGD, reserve

ROWS, COLUMNS, RANK, LONGEST, SEEDS = 50, 40, 5, 2000, 3
GOAL = 1e-6
RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]  # the largest curvature is 1
PROBLEMS = {(10, 1): "κ 10, cond 1", (1000, 1): "κ 1000, cond 1"}
PROBLEMS |= {(1000, 10): "κ 1000, cond 10", (10, 30): "κ 10, cond 30", (100, 30): "κ 100, cond 30"}

Solver = tuple[torch.optim.Optimizer, Callable[[], Tensor]]  # and the matrix as a function
Make = Callable[[LowRankLayer, float], Solver]


def riemannian(layer: LowRankLayer, lr: float) -> Solver:
    return RiemannianSGD(param_groups(layer), lr=lr, momentum=0.9), layer.matrix


def augmented(cls: Callable[..., Any], layer: LowRankLayer, lr: float, **settings: Any) -> Solver:
    groups = param_groups(reserve(layer))
    exact = {"tolerance": 0.0, "min_rank": RANK, "max_rank": RANK}
    return cls(groups, lr=lr, **exact, **settings), layer.matrix


def naive(layer: LowRankLayer, lr: float) -> Solver:
    return torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9), layer.matrix


def two_factors(layer: LowRankLayer, lr: float) -> Solver:
    U, S, V = (x.detach() for x in layer.point)
    P, sigma, Qt = torch.linalg.svd(S)
    X, Y = nn.Parameter(U @ (P * sigma.sqrt())), nn.Parameter(V @ (Qt.mT * sigma.sqrt()))
    return torch.optim.SGD([X, Y], lr=lr, momentum=0.9), lambda: X @ Y.mT


METHODS: dict[str, Make] = {
    "Riemannian heavy ball": riemannian,
    "DLRT core-only momentum, one gradient a cycle": partial(
        augmented, AugmentedHeavyBall, inner_steps=1, every_batch=True
    ),
    "DLRT core-only momentum, s* = 1": partial(augmented, AugmentedHeavyBall, inner_steps=1),
    "DLRT heavy ball, s* = 10": partial(augmented, AugmentedHeavyBall),
    "DLRT Adam, s* = 10": partial(augmented, AugmentedAdam),
    "DLRT Adam, mixed and aged": partial(augmented, AugmentedAdam, second="mixed", age=True),
    "naive U, S, V momentum": naive,
    "two-factor momentum": two_factors,
}


class Problem(NamedTuple):
    """A quadratic and where to start."""

    A: Tensor  # (m, m)
    B: Tensor  # (n, n)
    target: Tensor  # (m, n)
    start: Point

    def loss(self, W: Tensor) -> Tensor:
        error = W - self.target
        return 0.5 * (error * (self.A @ error @ self.B)).sum()


def falling(condition: float, count: int) -> Tensor:
    """From 1 down to 1/condition, evenly in the logarithm."""
    return torch.logspace(0, -math.log10(condition), count, dtype=torch.float64)


def draw(kappa: float, condition: float, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def curvature(size: int) -> Tensor:
        Q = geometry.random(size, size, size, dtype=torch.float64, generator=generator).U
        return (Q * falling(condition, size)) @ Q.mT

    def point() -> Point:
        return geometry.random(ROWS, COLUMNS, RANK, dtype=torch.float64, generator=generator)

    A, B, solution, start = curvature(ROWS), curvature(COLUMNS), point(), point()
    target = (solution.U * falling(kappa, RANK)) @ solution.V.mT
    core = 0.3 * torch.eye(RANK, dtype=torch.float64)
    return Problem(A, B, target, Point(start.U, core, start.V))


def gaps(make: Make, problem: Problem, lr: float) -> Iterator[float]:
    """L/L₀ after 0, 1, … gradients, until it is not finite or has grown by 10³."""
    optimizer, matrix = make(LowRankLayer(problem.start, None), lr)
    first = None
    for _ in range(LONGEST + 1):
        optimizer.zero_grad()
        loss = problem.loss(matrix())
        first = loss.item() if first is None else first
        gap = loss.item() / first
        if not gap <= 1e3:
            return
        yield gap
        loss.backward()
        optimizer.step()


def compute(make: Make, kappa: float, condition: float, run: Run) -> dict[str, Any]:
    """`iterations` is None if the goal is not reached; `loss` is the smallest gap."""
    smallest, count = math.inf, None
    for iteration, gap in enumerate(gaps(make, draw(kappa, condition, run.seed), run.lr)):
        smallest = min(smallest, gap)
        if gap <= GOAL:
            count = iteration
            break
    return {"loss": smallest, "iterations": count}


def measure(store: Store, problem: tuple[int, int], name: str) -> list[str]:
    """One row: best rate, mean iterations, the rates that reach the goal in all draws, and how far others come."""
    compute_one = partial(compute, METHODS[name], *problem)
    found: dict[float, list[dict[str, Any]]] = {
        lr: [
            store.get(Run(f"{PROBLEMS[problem]} | {name}", lr, seed), compute_one)
            for seed in range(SEEDS)
        ]
        for lr in RATES
    }
    counts = {lr: [r["iterations"] for r in records] for lr, records in found.items()}
    reached = {lr: mean(c) for lr, c in counts.items() if None not in c}
    if not reached:
        gap = {lr: max(r["loss"] for r in records) for lr, records in found.items()}
        best = min(gap, key=lambda lr: gap[lr])
        return [PROBLEMS[problem], name, f"never, {gap[best]:.0e}", f"{best:g}", "-", "-"]
    best = min(reached, key=lambda lr: reached[lr])
    near = [lr for lr in reached if reached[lr] <= 1.05 * reached[best]]
    return [
        PROBLEMS[problem],
        name,
        f"{reached[best]:.0f} ± {stdev(counts[best]):.0f}",
        f"{best:g}",
        f"{max(near) / min(near):.0f}",
        f"{min(reached):g} to {max(reached):g}",
    ]


def goals(found: list[list[str]]) -> str:
    """The two numbers that the Riemannian heavy ball has to meet, as a table."""
    ours, core = "Riemannian heavy ball", "DLRT core-only momentum, one gradient a cycle"
    cells = {(row[0], row[1]): row[2] for row in found}

    def count(problem: tuple[int, int], name: str) -> float:
        cell = cells[PROBLEMS[problem], name]
        return math.inf if cell.startswith("never") else float(cell.split()[0])

    first, second = count((1000, 10), ours), count((10, 30), ours)
    other = count((10, 30), core)
    rows = [
        ["κ 1000, cond 10: at most 120 iterations", f"{first:.0f}", str(first <= 120)],
        [f"κ 10, cond 30: below {core}", f"{second:.0f} against {other:.0f}", str(second < other)],
    ]
    return table(["goal", "measured", "met"], rows)


def rows(store: Store) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; prints the goals above it."""
    found = [measure(store, problem, name) for problem in PROBLEMS for name in METHODS]
    print(goals(found))
    header = ["problem", "method", "iterations", "best lr", "lr window, 5 %", "reaches the goal"]
    return header, found
