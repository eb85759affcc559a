"""Part b of optimizers.py: a quadratic whose blocks have curvatures of three scales, and the same eigenvalues mixed.

Nine dimensions, three blocks, three rows of nine a gradient, 500 steps, warmup and cosine, from ones; median of ten
seeds of the loss at the end, each method at its best learning rate. What separates Adam from SGD here is the
heterogeneity of the blocks alone (Orvieto & Gower, arXiv 2505.21829; the toy of their notebook).
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from protocol import Run, Store, geometric, sweep
from torch import Tensor, nn

from lowrank_geo.optim import RiemannianAdam, RiemannianSGD, RiemannianSignum, schedules
from lowrank_geo.optim.filters import EMA

SEEDS, STEPS, ROWS = 10, 500, 3
SCALES = torch.tensor([[1.0, 2, 3], [99, 100, 101], [4998, 4999, 5000]], dtype=torch.float64)
SPECTRA = {"heterogeneous": SCALES, "homogeneous": SCALES.T}
Make = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
METHODS: dict[str, tuple[Make, float]] = {
    "SGD, EMA": (lambda p, lr: RiemannianSGD(p, lr=lr, filter=EMA(0.95)), 1e-4),
    "Signum": (lambda p, lr: RiemannianSignum(p, lr=lr), 1e-3),
    "Adam, tied": (lambda p, lr: RiemannianAdam(p, lr=lr), 1e-2),
}


def root(spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """A with AᵀA = blockdiag(Q diag(λ) Qᵀ).

    Shapes: spectrum (3, 3), a row for each block -> (9, 9).
    """
    blocks = []
    for values in spectrum:
        Q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
        blocks.append(Q @ values.sqrt().diag() @ Q.mT)
    return torch.block_diag(*blocks)


def final_loss(make: Make, spectrum: Tensor, lr: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    A = root(spectrum, generator)
    w = nn.Parameter(torch.ones(9, dtype=torch.float64))
    optimizer = make([w], lr)
    schedule = schedules.cosine(optimizer, STEPS, warmup=0.05)
    for _ in range(STEPS):
        rows = A[torch.randperm(9, generator=generator)[:ROWS]]
        w.grad = rows.mT @ (rows @ w.detach()) * (9 / ROWS)
        optimizer.step()
        schedule.step()
    return 0.5 * (A @ w.detach()).square().sum().item()


def compute(make: Make, spectrum: Tensor, run: Run) -> dict[str, Any]:
    # Ten draws of the problem make one measurement: single ones differ by orders of magnitude.
    first = run.seed * SEEDS
    losses = [final_loss(make, spectrum, run.lr, seed) for seed in range(first, first + SEEDS)]
    return {"loss": median(losses)}


def rows(store: Store) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    found = []
    for problem, spectrum in SPECTRA.items():
        for name, (make, first) in METHODS.items():
            row = sweep(
                store,
                f"{problem} | {name}",
                geometric(first, 2.0, 5),
                lambda run, make=make, spectrum=spectrum: compute(make, spectrum, run),
            )
            found.append(
                [
                    problem,
                    name,
                    f"{row.loss:.2g} ± {row.spread:.1g}",
                    f"{row.lr:.3g}",
                    f"{row.window:.1f}",
                ]
            )
    return ["problem", "method", "loss", "best lr", "lr window"], found
