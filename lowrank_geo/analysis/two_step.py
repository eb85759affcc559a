"""Momentum as a recursion of two points: x₊ = x + β(x − x₋) − lr (a g(x) + b g(x₋)), b only from the second step on.

Every filter of `lowrank_geo.optim.filters` whose coefficients do not change is one of these, so that theory for three
numbers is theory for the whole family.
"""

import math
from typing import NamedTuple

import torch

from lowrank_geo.optim.filters import QHM, Coefficients, Filter, HeavyBall, check_decay


class TwoStep(NamedTuple):
    """x₊ = x + beta (x − x₋) − lr (current·g(x) + previous·g(x₋))."""

    beta: float
    current: float
    previous: float

    @property
    def gain(self) -> float:
        """The total weight that one gradient ever gets: lr·gain is the effective learning rate."""
        return (self.current + self.previous) / (1 - self.beta)

    @property
    def warmup(self) -> float:
        """Σₖ (gain − weight gathered after k + 1 steps): what the start from zero momentum loses, in steps·lr."""
        return (self.gain - self.current) / (1 - self.beta)


def constants(filter: Filter, step: int | None = None) -> Coefficients:
    """The four numbers u, v, a, b of a filter, at `step` if they change along the run.

    Raises: ValueError for a filter that changes when no step is named, or a step below 1.

    >>> constants(HeavyBall(0.9))
    Coefficients(u=0.9, v=1.0, a=0.0, b=1.0)
    """
    if step is not None and step < 1:
        raise ValueError(f"a filter needs a step >= 1, got {step}; count steps from 1")
    early, late = (at_step(filter, n) for n in ((1, 10**6) if step is None else (step, step)))
    if early != late:
        raise ValueError(
            f"this needs a filter with constant coefficients, got {filter}, whose change along the run; "
            "name the step at which it is looked at, or leave out `unbiased`"
        )
    return early


def at_step(filter: Filter, step: int) -> Coefficients:
    found = filter.coefficients(torch.tensor([float(step)], dtype=torch.float64))
    return Coefficients(*map(float, found))


def two_step(filter: Filter, step: int | None = None) -> TwoStep:
    """The recursion that gradient descent with `filter` follows.

    From x₊ = x − lr (a g + b m) and m = u m₋ + v g, by eliminating m.

    Shapes: a filter -> three numbers.
    Units: none.
    Raises: as `constants`.
    Source: derived; for QHM the recursion of Gitman et al., NeurIPS 2019, arXiv 1910.13962.

    >>> two_step(HeavyBall(0.9))
    TwoStep(beta=0.9, current=1.0, previous=0.0)
    """
    u, v, a, b = map(float, constants(filter, step))
    return TwoStep(u, a + b * v, -u * a if a and u else 0.0)


def heavy_ball(call: str, mu: float) -> TwoStep:
    """x₊ = x + μ(x − x₋) − lr g(x).

    Raises: ValueError, naming `call`, for μ outside [0, 1).
    """
    check_decay(call, "mu", mu)
    return two_step(HeavyBall(mu))


def quasi_hyperbolic(beta: float, nu: float) -> TwoStep:
    """x₊ = x + β(x − x₋) − α((1 − νβ) g(x) − β(1 − ν) g(x₋)), the normalised QHM.

    Raises: ValueError for β out of [0, 1) or ν out of [0, 1].
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, section 1, with d_k eliminated.

    >>> quasi_hyperbolic(0.5, 1.0)
    TwoStep(beta=0.5, current=0.5, previous=0.0)
    """
    if not 0 <= nu <= 1:
        raise ValueError(f"qhm needs nu in [0, 1], got {nu}; 0 is SGD, 1 heavy ball")
    return two_step(QHM(nu, beta))


def validity_bound(method: TwoStep) -> float:
    """The largest lr·λ, exclusive, for which a first-order flow follows the method for ever.

    Beyond it the companion roots are complex: the iterates oscillate, which no first-order flow in one variable does.
    It is the smallest positive s at which (1 + β − a s)² = 4 (β + b s).

    Shapes: numbers.
    Units: lr times curvature, no unit.
    Source: derived: where the companion polynomial z² − C₁ z + C₂ has a double root.

    >>> f"{validity_bound(two_step(HeavyBall(0.81))):.4f}"  # (1 − √β)²
    '0.0100'
    """
    beta, a, b = method
    half = (1 + beta) * a + 2 * b
    root = math.sqrt(max(half**2 - (a * (1 - beta)) ** 2, 0.0))
    # The smaller root by the product of both, which loses no digits when they are far apart.
    return (1 - beta) ** 2 / (half + root)
