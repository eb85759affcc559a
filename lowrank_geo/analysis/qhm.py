"""Quasi-hyperbolic momentum on quadratics: how fast, how stable, how noisy, and with which settings best.

α is the learning rate of `RiemannianSGD(filter=QHM(nu, beta))`, the normalised one: heavy ball of torch with lr η
is α = η/(1 − β), ν = 1. Source of this file: Gitman, Lang, Zhang & Xiao, NeurIPS 2019, arXiv 1910.13962.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lowrank_geo.analysis import linear
from lowrank_geo.analysis.checks import check_curvatures, check_positive, check_spectrum
from lowrank_geo.analysis.stationary import (
    expansion_bracket,
    stationary_loss,
    stationary_variance,
)
from lowrank_geo.analysis.two_step import TwoStep, quasi_hyperbolic

__all__ = [
    "Optimum",
    "alpha_max",
    "expansion_bracket",
    "optimal",
    "optimal_beta",
    "plateau",
    "rate",
    "stationary_loss",
    "stationary_variance",
]

GRID = 240  # decay rates tried in the first round of `optimal`; 30 in the rounds that refine
LONGEST = 14.0  # −ln(1 − β) of the largest decay tried: β = 1 − 8e-7


class Optimum(NamedTuple):
    """Settings and the factor by which each step shrinks the error."""

    alpha: float
    beta: float
    rate: float


def rate(alpha: float, beta: float, nu: float, curvatures: Sequence[float]) -> float:
    """The factor by which a step shrinks the error in the end: the largest root over the curvatures.

    Shapes: curvatures (d); the smallest and the largest are enough.
    Units: α in weights per gradient, curvatures in loss per squared weight, the rate without.
    Raises: ValueError for β, ν out of range, α ≤ 0 or a curvature ≤ 0.
    Source: section 3, the roots of z² − C₁ z + C₂ of the companion matrix.

    >>> round(rate(1.0, 0.9, 1.0, [0.1, 10.0]), 4)  # √β anywhere on the plateau
    0.9487
    """
    check_curvatures("rate", curvatures)
    check_positive("rate", "alpha", alpha)
    return float(linear.radius(quasi_hyperbolic(beta, nu), alpha, np.asarray(curvatures)).max())


def alpha_max(beta: float, nu: float, curvature_max: float) -> float:
    """The stability bound, exclusive: 2(1 + β)/(L(1 + β(1 − 2ν))).

    Shapes: numbers.
    Units: curvature in loss per squared weight, the bound in weights per gradient.
    Raises: as `rate`.
    Source: section 3, from |C₂| < 1 and |C₁| < 1 + C₂.

    >>> round(alpha_max(0.9, 1.0, 10.0), 6)
    3.8
    """
    check_curvatures("alpha_max", [curvature_max])
    return linear.largest_step(quasi_hyperbolic(beta, nu)) / curvature_max


def optimal(curvature_min: float, curvature_max: float, nu: float = 1.0) -> Optimum:
    """The α and β with the best rate on curvatures between the two, for a given ν; closed form for ν = 1.

    Shapes: numbers.
    Units: curvatures in loss per squared weight, α in weights per gradient.
    Error:  rate to 1e-6; of settings with the same rate those with the smallest α.
    Raises: ValueError for curvatures that are not 0 < min <= max, a ratio above 1e12, or ν out of [0, 1].
    Source: section 3: α equalises the rates of both curvatures, β by search; ν = 1 is Polyak's heavy ball.

    >>> round(optimal(0.1, 10.0).rate, 4), round(optimal(0.1, 10.0, nu=0.7).rate, 3)
    (0.8182, 0.907)
    """
    check_spectrum("optimal", curvature_min, curvature_max)
    quasi_hyperbolic(0.0, nu)
    if nu == 1:
        root = math.sqrt(curvature_max / curvature_min)
        best = (root - 1) / (root + 1)
        return Optimum(1 / math.sqrt(curvature_max * curvature_min), best**2, best)
    low, high, count = 0.0, LONGEST, GRID
    for _ in range(6):
        places = np.linspace(low, high, count)
        betas = 1 - np.exp(-places)
        alphas, rates = _balanced(betas, nu, curvature_min, curvature_max)
        at = int(rates.argmin())
        width = (high - low) / (count - 1)
        low, high, count = max(0.0, places[at] - width), min(LONGEST, places[at] + width), 30
    return Optimum(float(alphas[at]), float(betas[at]), float(rates[at]))


def _balanced(
    betas: np.ndarray, nu: float, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """For each β the α at which both ends of the spectrum shrink alike, by bisection, and the rate there.

    Shapes: (k) -> (k), (k).
    """
    rules = [quasi_hyperbolic(beta, nu) for beta in betas.tolist()]
    every = TwoStep(*np.array(rules).T)  # of arrays (k)
    left, right = np.zeros(len(betas)), np.array([linear.largest_step(r) for r in rules]) / high
    for _ in range(60):
        alphas = (left + right) / 2
        longer = linear.radius(every, alphas, low) > linear.radius(every, alphas, high)
        left, right = np.where(longer, alphas, left), np.where(longer, right, alphas)
    return right, np.maximum(linear.radius(every, right, low), linear.radius(every, right, high))


def optimal_beta(alpha: float, curvature_min: float) -> float:
    """The β of heavy ball (ν = 1) that is fastest at a given α: √β = (1 − αμ)/(1 + αμ).

    It rises when α is lowered: momentum has to make up for shorter steps.

    Shapes: numbers.
    Units: α in weights per gradient, curvature in loss per squared weight, β without.
    Source: section 5, the last guideline; from C₁² = 4 C₂ at the smallest curvature.
    Raises: ValueError for α ≤ 0 or a curvature ≤ 0.

    >>> round(optimal_beta(0.1, 1.0), 4)
    0.6694
    """
    check_curvatures("optimal_beta", [curvature_min])
    check_positive("optimal_beta", "alpha", alpha)
    s = alpha * curvature_min
    return ((1 - s) / (1 + s)) ** 2 if s < 1 else 0.0


def plateau(beta: float, curvature_min: float, curvature_max: float) -> tuple[float, float]:
    """The α between which heavy ball (ν = 1) has one and the same rate √β, whatever α.

    Shapes: numbers.
    Units: curvatures in loss per squared weight, the two α in weights per gradient.
    Raises: ValueError where there are none: √β below (√κ − 1)/(√κ + 1).
    Source: sections 3 and 5; where both curvatures have complex roots, C₁² ≤ 4 C₂.

    >>> tuple(round(x, 3) for x in plateau(0.9, 0.1, 10.0))
    (0.263, 3.797)
    """
    check_spectrum("plateau", curvature_min, curvature_max)
    quasi_hyperbolic(beta, 1.0)
    ratio = (1 - math.sqrt(beta)) / (1 + math.sqrt(beta))
    low, high = ratio / curvature_min, 1 / (ratio * curvature_max)
    if low > high * (1 + 1e-12):
        least = optimal(curvature_min, curvature_max).beta
        raise ValueError(
            f"a plateau needs beta >= {least:.4g} at these curvatures, got {beta}; raise beta"
        )
    return low, high
