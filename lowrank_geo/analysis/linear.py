"""Any two-point momentum method on a quadratic: roots, rate, stability and the noise it ends with.

Per curvature λ the iterates follow z² − C₁ z + C₂ with C₁ = 1 + β − lr a λ and C₂ = β + lr b λ (`TwoStep`).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lowrank_geo.analysis.two_step import TwoStep


def companion(
    method: TwoStep, lr: ArrayLike, curvature: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """(C₁, C₂) of z² − C₁ z + C₂.

    Shapes: lr and curvature of shapes that broadcast -> theirs, twice.
    Units: lr·curvature has none.
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, section 3, for any two-point method.
    """
    s = np.asarray(lr, dtype=float) * np.asarray(curvature, dtype=float)
    return 1 + method.beta - method.current * s, method.beta + method.previous * s


def radius(method: TwoStep, lr: ArrayLike, curvature: ArrayLike) -> np.ndarray:
    """The larger modulus of the two roots: the factor by which a step shrinks the error, in the end.

    Shapes: as `companion`, once.
    Units: none.
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, section 3: (|C₁| + √(C₁² − 4C₂))/2, or √C₂.
    """
    first, second = companion(method, lr, curvature)
    inside = first**2 - 4 * second
    real = (abs(first) + np.sqrt(np.maximum(inside, 0))) / 2
    return np.where(inside >= 0, real, np.sqrt(np.maximum(second, 0)))


def largest_step(method: TwoStep) -> float:
    """The bound on lr·λ below which the method is stable: |C₂| < 1 and |C₁| < 1 + C₂.

    Shapes: numbers.
    Units: none: lr times curvature.
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, section 3; the criterion of Schur and Cohn.

    >>> from lowrank_geo.analysis.two_step import two_step
    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> largest_step(two_step(HeavyBall(0.5)))  # 2 (1 + β)
    3.0
    """
    beta, a, b = method
    bounds = [2 * (1 + beta) / (a - b) if a > b else math.inf]
    if b > 0:
        bounds.append((1 - beta) / b)
    if b < 0:
        bounds.append((1 + beta) / -b)
    return min(bounds)


def variance(
    method: TwoStep, lr: ArrayLike, curvature: ArrayLike, noise: ArrayLike = 1.0
) -> np.ndarray:
    """The stationary variance of x on λx²/2 with gradient noise of variance `noise`; infinite where it is unstable.

    x is an ARMA(2, 1) process: x₊ = C₁ x − C₂ x₋ + b₀ ε + b₁ ε₋, with b₀ = −lr a and b₁ = −lr b.

    Shapes: all broadcast.
    Units: noise in squared loss per weight, the result in squared weights.
    Source: derived; Yule and Walker's equations of an ARMA(2, 1) process.
    """
    first, second = companion(method, lr, curvature)
    lr = np.asarray(lr, dtype=float)
    b0, b1 = -lr * method.current, -lr * method.previous
    stable = lr * np.asarray(curvature) < largest_step(method)
    above = (b0**2 + b1**2) * (1 + second) + 2 * b0 * b1 * first
    below = (1 - second) * ((1 + second) ** 2 - first**2)
    return np.asarray(noise) * np.where(stable, above / np.where(stable, below, 1.0), np.inf)


def excess_loss(
    method: TwoStep, lr: ArrayLike, curvatures: Sequence[float], noise: ArrayLike = 1.0
) -> np.ndarray:
    """How far above the minimum the loss stays: Σ λ Var/2.

    Args: noise: the variance of the gradient, of all modes or of each.
    Shapes: lr (...), curvatures (d), noise () or (d) -> (...).
    Units: noise in squared loss per squared weight, the result a loss.
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, section 4: ½ tr(A Σₓ).
    """
    values = np.asarray(curvatures, dtype=float)
    each = variance(method, np.asarray(lr, dtype=float)[..., None], values, noise)
    return (values * each / 2).sum(-1)
