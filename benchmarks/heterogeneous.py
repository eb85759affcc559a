"""Part b of optimizers.py: a quadratic whose blocks have curvatures of three scales, and the same eigenvalues mixed.

Nine dimensions, three blocks, three rows of nine a gradient, 500 steps, warmup and cosine, from ones; median over a
hundred draws of the loss at the end, each method at its best learning rate of a grid of ratio √2. What separates Adam
from SGD here is the heterogeneity of the blocks alone (Orvieto & Gower, arXiv 2505.21829; the toy of their notebook).
"""

from collections.abc import Callable
from typing import Any

import torch
from protocol import Run, Store, geometric, sweep, table
from torch import Tensor, nn

from lowrank_geo.optim import RiemannianAdam, RiemannianSGD, RiemannianSignum, schedules
from lowrank_geo.optim.filters import EMA

DRAWS, STEPS, ROWS = 100, 500, 3
SCALES = torch.tensor([[1.0, 2, 3], [99, 100, 101], [4998, 4999, 5000]], dtype=torch.float64)
SPECTRA = {"heterogeneous": SCALES, "homogeneous": SCALES.T}
Make = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]
METHODS: dict[str, tuple[Make, float]] = {
    "SGD, EMA": (lambda p, lr: RiemannianSGD(p, lr=lr, filter=EMA(0.95)), 1e-4),
    "Signum": (lambda p, lr: RiemannianSignum(p, lr=lr), 4e-3),
    "Adam, tied": (lambda p, lr: RiemannianAdam(p, lr=lr), 1e-2),
}


def roots(spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """Symmetric matrices A with A² = blockdiag(Q diag(λ) Qᵀ), one a draw.

    Shapes: spectrum (3, 3), a row for each block -> (DRAWS, 9, 9).
    """
    A = torch.zeros(DRAWS, 9, 9, dtype=torch.float64)
    for block, values in enumerate(spectrum):
        noise = torch.randn(DRAWS, 3, 3, dtype=torch.float64, generator=generator)
        Q, _ = torch.linalg.qr(noise)
        at = slice(3 * block, 3 * block + 3)
        A[:, at, at] = (Q * values.sqrt()) @ Q.mT
    return A


def median_loss(make: Make, spectrum: Tensor, lr: float, seed: int) -> float:
    """All three rules act on single entries, so that the draws are rows of one parameter."""
    generator = torch.Generator().manual_seed(seed)
    A = roots(spectrum, generator)
    w = nn.Parameter(torch.ones(DRAWS, 9, dtype=torch.float64))
    optimizer = make([w], lr)
    schedule = schedules.cosine(optimizer, STEPS, warmup=0.05)
    for _ in range(STEPS):
        chosen = torch.rand(DRAWS, 9, generator=generator).argsort(1)[:, :ROWS]
        rows = A.gather(1, chosen[..., None].expand(-1, -1, 9))  # (DRAWS, ROWS, 9)
        residual = torch.einsum("dri,di->dr", rows, w.detach())
        w.grad = torch.einsum("dri,dr->di", rows, residual) * (9 / ROWS)
        optimizer.step()
        schedule.step()
    losses = 0.5 * torch.einsum("dij,dj->di", A, w.detach()).square().sum(1)
    return losses.median().item()


def compute(make: Make, spectrum: Tensor, run: Run) -> dict[str, Any]:
    return {"loss": median_loss(make, spectrum, run.lr, run.seed), "draws": DRAWS}


def goals(found: dict[tuple[str, str], float]) -> str:
    """What the paper's picture says in numbers, as a table."""
    sgd, signum, adam = (found["heterogeneous", name] for name in METHODS)
    mixed = [found["homogeneous", name] for name in METHODS]
    ratios = [
        ["heterogeneous: Signum over Adam, above 10", signum / adam, signum / adam > 10],
        ["heterogeneous: SGD over Signum, above 10", sgd / signum, sgd / signum > 10],
        [
            "homogeneous: worst over best, within 2",
            max(mixed) / min(mixed),
            max(mixed) / min(mixed) <= 2,
        ],
    ]
    rows = [[str(name), f"{value:.3g}", str(met)] for name, value, met in ratios]
    return table(["goal", "measured", "met"], rows)


def rows(store: Store) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table; prints the goals above it."""
    cells, losses = [], {}
    for problem, spectrum in SPECTRA.items():
        for name, (make, first) in METHODS.items():
            row = sweep(
                store,
                f"{problem} | {name}",
                geometric(first, 2**0.5, 5),
                lambda run, make=make, spectrum=spectrum: compute(make, spectrum, run),
            )
            losses[problem, name] = row.loss
            loss = f"{row.loss:.2g} ± {row.spread:.1g}"
            cells.append([problem, name, loss, f"{row.lr:.3g}", f"{row.window:.1f}"])
    print(goals(losses))
    return ["problem", "method", "loss", "best lr", "lr window"], cells
