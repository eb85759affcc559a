"""Diagonal linear networks θ = u∘u − v∘v: which of the solutions of Xθ = y momentum converges to.

Source: Lyu et al., arXiv 2506.14806, and its companion on momentum in diagonal networks, AAAI 2025, theorem 3.
"""

import math

import torch
from torch import Tensor

from lowrank_geo.analysis.coefficients import steady
from lowrank_geo.analysis.two_step import TwoStep

NEWTON = 100  # iterations at most; some 10 to 20 are needed
RESIDUAL = 1e-12  # of the constraint, relative


def implicit_bias(X: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """argmin Q_ξ(θ) with Xθ = y: where the gradient flow ends that starts with u = v = √ξ.

    Q_ξ = ¼ Σ [θ arcsinh(θ/2ξ) − √(4ξ² + θ²) + 2ξ], which is l₁ for small ξ and l₂ for large. By Newton's method on the
    dual, where θ = 2ξ sinh(4 Xᵀν).

    Shapes: X (n, d), y (n), scale ξ (d), all positive -> (d).
    Units: those of θ, and of ξ, which are squared weights of u and v.
    Error:  |Xθ − y| ≤ 1e-12 |y| in float64.
    Raises: ValueError for shapes that do not fit, a scale that is not positive, or rows of X that are not independent.
    Source: AAAI 2025 companion of arXiv 2506.14806, theorem 3.

    >>> X, y = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([2.0]).double()
    >>> implicit_bias(X, y, torch.full((2,), 1e-9).double()).round(decimals=1)  # the sparsest
    tensor([0., 1.], dtype=torch.float64)
    """
    n, d = X.shape
    if y.shape != (n,) or scale.shape != (d,) or not bool((scale > 0).all()):
        raise ValueError(
            f"implicit_bias needs y ({n},) and a positive scale ({d},), got {tuple(y.shape)} and {tuple(scale.shape)} "
            f"with entries from {float(scale.min()):g}; pass ξ = |u₀||v₀|"
        )
    if int(torch.linalg.matrix_rank(X)) < n:
        raise ValueError(
            f"implicit_bias needs independent rows of X, got rank {int(torch.linalg.matrix_rank(X))} of {n}; "
            "drop the rows that depend on others"
        )
    multiplier = torch.zeros_like(y)
    for _ in range(NEWTON):
        z = 4 * (X.mT @ multiplier)
        gap = X @ (2 * scale * z.sinh()) - y
        if gap.norm() <= RESIDUAL * y.norm():
            break
        step = torch.linalg.solve((X * (8 * scale * z.cosh())) @ X.mT, gap)
        multiplier = multiplier - _fraction(X, y, scale, multiplier, step, gap) * step
    return 2 * scale * (4 * (X.mT @ multiplier)).sinh()


def _fraction(
    X: Tensor, y: Tensor, scale: Tensor, multiplier: Tensor, step: Tensor, gap: Tensor
) -> float:
    """How much of a Newton step lowers the dual Σ (ξ/2) cosh(4 Xᵀν) − ⟨y, ν⟩, which is convex."""

    def dual(nu: Tensor) -> float:
        return float((scale / 2 * (4 * (X.mT @ nu)).cosh()).sum() - y @ nu)

    now, slope, fraction = dual(multiplier), float(gap @ step), 1.0
    # At the end the fall is below the rounding of the dual, and whole steps are right.
    while fraction > 1e-10:
        after = dual(multiplier - fraction * step)
        if math.isfinite(after) and after <= now - 1e-4 * fraction * slope + 1e-13 * abs(now):
            break
        fraction /= 2
    return fraction


def shrinkage(method: TwoStep, lr: float, squares: Tensor) -> Tensor:
    """ln(u v) at the end over the start: −8 lr γ ∫ (∂L/∂θ)² dt, the same as a smaller initialisation.

    For heavy ball −4 η(1 + μ)/(1 − μ)³ ∫ r² dt, with r = ∂L/∂θ.

    Args: squares: Σ lr·r², over the steps of a run.
    Shapes: squares (d) -> (d).
    Units: none; squares times lr has none.
    Error:  relative O(lr).
    Source: derived from the first counter term of arXiv 2506.14806; equal to theorem 3 of the companion.

    >>> from lowrank_geo.analysis.two_step import two_step
    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> shrinkage(two_step(HeavyBall(0.5)), 0.01, torch.ones(1))
    tensor([-0.4800])
    """
    return 8 * lr * float(steady(method, 2)[1]) * squares  # steady(…)[1] is −γ


def momentum_bias(
    X: Tensor, y: Tensor, scale: Tensor, method: TwoStep, lr: float, squares: Tensor
) -> Tensor:
    """Where momentum ends: `implicit_bias` at the scale ξ e^(shrinkage), which is nearer to l₁.

    Shapes: X (n, d), y (n), scale and squares (d) -> (d).
    Units: those of θ.
    Error:  O(lr²) for u = v at the start; the gradient flow's own limit, `implicit_bias` at ξ, is O(lr) away.
    Raises: as `implicit_bias`.
    Source: derived: `implicit_bias` at ξ exp(−4 η(1 + μ)/(1 − μ)³ ∫ r² dt), as theorem 3 of the AAAI 2025
        companion.
    """
    return implicit_bias(X, y, scale * shrinkage(method, lr, squares).exp())
