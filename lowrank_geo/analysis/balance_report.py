"""The report of `lowrank-geo analyze balance`: what momentum does to UᵀU − VᵀV of two factors."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank_geo.analysis import figures
from lowrank_geo.analysis.balance import balance_change, imbalance
from lowrank_geo.analysis.checks import check_positive
from lowrank_geo.analysis.diagonal_report import STEP_SIZE
from lowrank_geo.analysis.pages import Report
from lowrank_geo.analysis.two_step import heavy_ball, two_step
from lowrank_geo.canvas import STEP
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import HeavyBall

TIME = 2.0  # η/(1 − μ) × steps


def factor_run(mu: float, lr: float, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """|UᵀU − VᵀV| since the start, measured and predicted after each step of the real optimizer, and the distance of
    the two at the end.

    Shapes: -> (steps), (steps), ().
    """
    method = two_step(HeavyBall(mu))
    generator = torch.Generator().manual_seed(seed)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    target = torch.randn(8, 7, **kind)
    U, V = (nn.Parameter(0.6 * torch.randn(k, 3, **kind)) for k in (8, 7))
    optimizer = RiemannianSGD([U, V], lr=lr, momentum=mu)
    before, total = imbalance(U.detach(), V.detach()), torch.zeros(3, 3, dtype=torch.float64)
    changes, laws = [], []
    for _ in range(math.ceil(TIME * (1 - mu) / lr)):
        gap = U.detach() @ V.detach().mT - target
        U.grad, V.grad = gap @ V.detach(), gap.mT @ U.detach()
        total += lr * (U.grad.mT @ U.grad - V.grad.mT @ V.grad)
        optimizer.step()
        changes.append(imbalance(U.detach(), V.detach()) - before)
        laws.append(balance_change(method, lr, total))
    error = float((changes[-1] - laws[-1]).norm() / changes[-1].norm())
    measured, predicted = (torch.stack(x).norm(dim=(1, 2)).numpy() for x in (changes, laws))
    return measured, predicted, error


def balance_report(mu: float, lam: float, seed: int) -> Report:
    """The change of balance of a factorised matrix, measured and predicted, and its error over the step.

    Args: lam: η/(1 − μ)²; also a half and a quarter of it are run.
    Raises: ValueError for μ outside [0, 1), a step that is not positive or one too long for the law.
    """
    heavy_ball("analyze balance", mu)
    check_positive("analyze balance", "lam", lam)
    sizes, errors = [lam, lam / 2, lam / 4], []
    for size in sizes:
        measured, predicted, error = factor_run(mu, size * (1 - mu) ** 2, seed)
        errors.append(error)
        if not error < 1:
            raise ValueError(
                f"analyze balance needs a step at which the law is near, got lam {size:g} with an error of "
                f"{error:.3g}; lower --lam"
            )
    steps = range(1, len(measured) + 1)
    return Report(
        f"Balance of two factors: μ = {mu:g}",
        "done",
        f"Momentum moves UᵀU − VᵀV, which gradient flow conserves, by {measured[-1]:.3g}; "
        f"predicted: {predicted[-1]:.3g}.",
        [
            ("error of the law", f"{errors[-1]:.2%}", f"at η/(1 − μ)² = {sizes[-1]:.3g}, relative"),
            ("its fall per halving", f"{errors[-2] / errors[-1]:.2f}", "2 is first order")
            if mu
            else ("without momentum", "exact", "a sum over the steps"),
        ],
        [
            (
                "Change of balance over the run",
                figures.curves(
                    {"measured": (steps, measured), "predicted": (steps, predicted)},
                    STEP,
                    "|Δ(UᵀU − VᵀV)| (weight²)",
                ),
                "RiemannianSGD on two factors of a random 8 × 7 matrix at rank 3; predicted is "
                "η(1 + μ)/(1 − μ)³ ∫ (g_Uᵀg_U − g_Vᵀg_V) dt.",
            ),
            (
                "Error of the law",
                figures.curves(
                    {"measured": (sizes, errors)},
                    STEP_SIZE,
                    "relative error (no unit)",
                    dots={"": (sizes, errors)},
                    logs="xy",
                ),
                "First order in the step: the error halves with it.",
            ),
        ],
        settings={"mu": mu, "lam": lam, "seed": seed},
    )
