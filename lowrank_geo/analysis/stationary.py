"""The noise that quasi-hyperbolic momentum ends with on a quadratic; part of `lowrank_geo.analysis.qhm`.

Source: Gitman, Lang, Zhang & Xiao, NeurIPS 2019, arXiv 1910.13962, section 4; the exact variance is derived.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lowrank_geo.analysis import linear
from lowrank_geo.analysis.checks import check_curvatures, check_positive
from lowrank_geo.analysis.two_step import quasi_hyperbolic


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
    Units: α in weights per gradient, noise in squared loss per squared weight, the variance in squared weights.
    Raises: ValueError for β, ν out of range, α ≤ 0, a curvature ≤ 0 or a variance of the noise below 0.
    Source: exact, `linear.variance`; expansion, section 4, tr(A Σₓ) = (α/2) tr Σ + (α²/4)[1 + …] tr(A Σ).

    >>> print(stationary_variance(0.1, 0.9, 0.7, [1.0, 0.1]).round(4))
    [0.0437 0.4921]
    """
    values = np.asarray(curvature, dtype=float)
    check_curvatures("stationary_variance", values)
    check_positive("stationary_variance", "alpha", alpha)
    check_variance("stationary_variance", noise)
    rule = quasi_hyperbolic(beta, nu)
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

    1 + 2νβ/(1 − β) · (2νβ/(1 + β) − 1).

    Shapes: numbers.
    Units: none.
    Source: section 4, the term of second order of tr(A Σₓ).

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

    Args: noise: variance of the gradient along each mode.
    Shapes: curvatures (d), noise () or (d).
    Units: α in weights per gradient, noise in squared loss per squared weight, the result a loss.
    Raises: as `stationary_variance`.
    Source: section 4, ½ tr(A Σₓ), with the exact variance.

    >>> round(stationary_loss(1.0, 0.9, 0.7, [1.0, 0.1], 0.3), 4)
    0.1121
    """
    check_curvatures("stationary_loss", curvatures)
    check_positive("stationary_loss", "alpha", alpha)
    check_variance("stationary_loss", noise)
    return float(linear.excess_loss(quasi_hyperbolic(beta, nu), alpha, curvatures, noise))


def check_variance(call: str, noise: ArrayLike) -> None:
    """Raise ValueError, naming `call`, unless all variances are numbers from 0 on."""
    least = float(np.asarray(noise, dtype=float).min())
    if not 0 <= least < math.inf:
        raise ValueError(
            f"{call} needs noise >= 0, got {least}; pass the variance of a gradient, which is its deviation squared"
        )
