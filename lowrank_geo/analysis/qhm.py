"""Quasi-hyperbolic momentum on quadratics: how fast, how stable, how noisy, and with which settings best.

α is the learning rate of `RiemannianSGD(filter=QHM(nu, beta))`, the normalised one: heavy ball of torch with lr η
is α = η/(1 − β), ν = 1. Source of this file: Gitman, Lang, Zhang & Xiao, NeurIPS 2019, arXiv 1910.13962.
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lowrank_geo.analysis import linear
from lowrank_geo.analysis.two_step import TwoStep, two_step
from lowrank_geo.optim.filters import QHM

GRID = 240  # decay rates tried in the first round of `optimal`; 30 in the rounds that refine
LONGEST = 14.0  # −ln(1 − β) of the largest decay tried: β = 1 − 8e-7


class Optimum(NamedTuple):
    """Settings and the factor by which each step shrinks the error."""

    alpha: float
    beta: float
    rate: float


def method(beta: float, nu: float) -> TwoStep:
    """QHM(ν, β) as a recursion of two points.

    Raises: ValueError for β out of [0, 1) or ν out of [0, 1].
    """
    if not 0 <= nu <= 1:
        raise ValueError(f"qhm needs nu in [0, 1], got {nu}; 0 is SGD, 1 heavy ball")
    return two_step(QHM(nu, beta))


def rate(alpha: float, beta: float, nu: float, curvatures: Sequence[float]) -> float:
    """The factor by which a step shrinks the error in the end: the largest root over the curvatures.

    Shapes: curvatures (d); the smallest and the largest are enough.
    Raises: ValueError for β, ν out of range, α ≤ 0 or a curvature ≤ 0.
    Source: section 4, the companion matrix.

    >>> round(rate(1.0, 0.9, 1.0, [0.1, 10.0]), 4)  # √β anywhere on the plateau
    0.9487
    """
    check_curvatures("rate", curvatures)
    check_positive("rate", "alpha", alpha)
    return float(linear.radius(method(beta, nu), alpha, np.asarray(curvatures)).max())


def alpha_max(beta: float, nu: float, curvature_max: float) -> float:
    """The stability bound, exclusive: 2(1 + β)/(L(1 + β(1 − 2ν))).

    Units: weights per gradient.
    Raises: as `rate`.
    Source: section 4.

    >>> round(alpha_max(0.9, 1.0, 10.0), 6)
    3.8
    """
    check_curvatures("alpha_max", [curvature_max])
    return linear.largest_step(method(beta, nu)) / curvature_max


def optimal(curvature_min: float, curvature_max: float, nu: float = 1.0) -> Optimum:
    """The α and β with the best rate on curvatures between the two, for a given ν; closed form for ν = 1.

    Error:  rate to 1e-6; of settings with the same rate those with the smallest α.
    Raises: ValueError for curvatures that are not 0 < min <= max, or ν out of [0, 1].
    Source: section 4; heavy ball's optimum is Polyak's.

    >>> round(optimal(0.1, 10.0).rate, 4), round(optimal(0.1, 10.0, nu=0.7).rate, 3)
    (0.8182, 0.907)
    """
    check_curvatures("optimal", [curvature_min, curvature_max])
    method(0.0, nu)
    if nu == 1:
        root = math.sqrt(curvature_max / curvature_min)
        best = (root - 1) / (root + 1)
        return Optimum(1 / math.sqrt(curvature_max * curvature_min), best**2, best)
    low, high, count = 0.0, LONGEST, GRID
    for _ in range(6):
        found = [
            _balanced(1 - math.exp(-x), nu, curvature_min, curvature_max)
            for x in np.linspace(low, high, count)
        ]
        place = min(range(count), key=[x.rate for x in found].__getitem__)
        width = (high - low) / (count - 1)
        centre = low + place * width
        low, high, count = max(0.0, centre - width), min(LONGEST, centre + width), 30
    return found[place]


def _balanced(beta: float, nu: float, low: float, high: float) -> Optimum:
    """The α at which both ends of the spectrum shrink alike."""
    rule = method(beta, nu)
    left, right = 0.0, linear.largest_step(rule) / high
    for _ in range(60):
        alpha = (left + right) / 2
        slow, fast = linear.radius(rule, alpha, np.array([low, high]))
        left, right = (alpha, right) if slow > fast else (left, alpha)
    return Optimum(right, beta, float(linear.radius(rule, right, np.array([low, high])).max()))


def optimal_beta(alpha: float, curvature_min: float) -> float:
    """The β of heavy ball (ν = 1) that is fastest at a given α: √β = (1 − αμ)/(1 + αμ).

    It rises when α is lowered: momentum has to make up for shorter steps.

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

    Raises: ValueError where there are none: √β below (√κ − 1)/(√κ + 1).

    >>> tuple(round(x, 3) for x in plateau(0.9, 0.1, 10.0))
    (0.263, 3.797)
    """
    check_curvatures("plateau", [curvature_min, curvature_max])
    method(beta, 1.0)
    ratio = (1 - math.sqrt(beta)) / (1 + math.sqrt(beta))
    low, high = ratio / curvature_min, 1 / (ratio * curvature_max)
    if low > high * (1 + 1e-12):
        least = optimal(curvature_min, curvature_max).beta
        raise ValueError(
            f"a plateau needs beta >= {least:.4g} at these curvatures, got {beta}; raise beta"
        )
    return low, high


def stationary_variance(
    alpha: float,
    beta: float,
    nu: float,
    curvature: ArrayLike,
    noise: ArrayLike = 1.0,
    *,
    exact: bool = True,
) -> np.ndarray:
    """The variance of each mode that gradient noise keeps up; infinite beyond the stability bound.

    Args: noise: variance of the gradient along the mode. exact: False for the expansion of the paper to second order in
        α, which is good for αλ far below 1 − β only, and warns from αλ = 1 − β on, where it can turn negative.
    Shapes: curvature and noise (d) -> (d).
    Raises: as `rate`.
    Source: exact, `linear.variance`; expansion, section 5, tr(A Σₓ) = (α/2) tr Σ + (α²/4)[1 + …] tr(A Σ).

    >>> print(stationary_variance(0.1, 0.9, 0.7, [1.0, 0.1]).round(4))
    [0.0437 0.4921]
    """
    values = np.asarray(curvature, dtype=float)
    check_curvatures("stationary_variance", values.ravel())
    check_positive("stationary_variance", "alpha", alpha)
    rule = method(beta, nu)
    if exact:
        return linear.variance(rule, alpha, values, noise)
    if alpha * values.max() >= 1 - beta:
        warnings.warn(
            f"the expansion of the stationary variance needs αλ < 1 − β = {1 - beta:.3g}, "
            f"got {alpha * values.max():.3g}; pass exact=True",
            stacklevel=2,
        )
    trace = alpha / 2 + alpha**2 / 4 * expansion_bracket(beta, nu) * values
    return np.asarray(noise) * trace / values


def expansion_bracket(beta: float, nu: float) -> float:
    """The factor of α²/4 in the paper's expansion of the variance: 1 for SGD, negative for much momentum.

    >>> round(expansion_bracket(0.9, 1.0), 4)  # (1 − β)/(1 + β)
    0.0526
    """
    return 1 + 2 * nu * beta / (1 - beta) * (2 * nu * beta / (1 + beta) - 1)


def stationary_loss(
    alpha: float,
    beta: float,
    nu: float,
    curvatures: Sequence[float],
    noise: float | Sequence[float] = 1.0,
) -> float:
    """The mean loss above the minimum in the end: Σ λ Var/2, exact.

    Shapes: curvatures (d), noise () or (d).
    Raises: as `rate`.

    >>> round(stationary_loss(1.0, 0.9, 0.7, [1.0, 0.1], 0.3), 4)
    0.1121
    """
    check_curvatures("stationary_loss", curvatures)
    check_positive("stationary_loss", "alpha", alpha)
    return float(linear.excess_loss(method(beta, nu), alpha, curvatures, noise))


def check_curvatures(call: str, curvatures: ArrayLike) -> None:
    """Raise ValueError, naming `call`, unless all curvatures are positive and do not fall."""
    values = np.asarray(curvatures, dtype=float)
    if values.size == 0 or not (np.isfinite(values).all() and values.min() > 0):
        raise ValueError(
            f"{call} needs curvatures > 0, got {values.tolist()}; leave out flat directions"
        )
    if call in ("optimal", "plateau", "advice") and values[0] > values[-1]:
        raise ValueError(
            f"{call} needs curvature_min <= curvature_max, got {values[0]:g} and {values[-1]:g}; exchange them"
        )


def check_positive(call: str, name: str, value: float) -> None:
    """Raise ValueError, naming `call`, unless `value` is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{call} needs {name} > 0, got {value}; pass e.g. 0.1")
