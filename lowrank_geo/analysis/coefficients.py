"""The coefficients of the flow that a momentum method follows, step by step, to any order.

On [k·lr, (k+1)·lr) it follows x' = F_k(x) = Σ c_k(τ) lr^(|τ|−1) F(τ), a series over rooted trees in f = −∇L. With
g = ∇L, H and T its derivatives, the first terms are −c g − lr γ H g − lr² (p H²g + q T[g, g]).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lowrank_geo.analysis.trees import LARGEST_ORDER, Forest, Tree, forest
from lowrank_geo.analysis.two_step import TwoStep, heavy_ball
from lowrank_geo.optim.filters import check_decay

SETTLED = (
    1e-15  # relative change from one step to the next below which the coefficients have converged
)


class CounterTerms(NamedTuple):
    """The coefficients of −g, −lr H g, −lr² H²g and −lr² T[g, g]."""

    c: float
    gamma: float
    p: float
    q: float


def counter_terms(mu: float, k: int | None) -> CounterTerms:
    """The first three orders for heavy ball, by the scalar recursions; k = None for their limit.

    Shapes: numbers.
    Units: none; the terms are −c g, −η γ H g, −η²(p H²g + q T[g, g]).
    Raises: ValueError for μ outside [0, 1) or a negative k.
    Source: Lyu et al., arXiv 2506.14806 (the flow); the recursions are derived in docs/laboratory.md.

    >>> counter_terms(0.9, 5).gamma, counter_terms(0.9, None).gamma
    (43.96..., 950.0...)
    """
    check_decay("counter_terms", "mu", mu)
    check_step("counter_terms", k)
    if k is None:
        rest = 1 - mu
        return CounterTerms(
            1 / rest,
            (1 + mu) / (2 * rest**3),
            (1 + 4 * mu + mu**2) / (3 * rest**5),
            (1 + 10 * mu + mu**2) / (12 * rest**5),
        )
    found = CounterTerms(1.0, 1 / 2, 1 / 3, 1 / 12)
    for _ in range(k):
        found = _next(mu, found)
    return found


def _next(mu: float, old: CounterTerms) -> CounterTerms:
    c = 1 + mu * old.c
    gamma = c**2 / 2 + mu * (old.gamma + old.c**2 / 2)
    return CounterTerms(
        c,
        gamma,
        c * gamma - c**3 / 6 + mu * (old.p + old.c * old.gamma + old.c**3 / 6),
        c * gamma / 2 - c**3 / 6 + mu * (old.q + old.c * old.gamma / 2 + old.c**3 / 6),
    )


def flow_coefficients(mu: float, k: int | None, order: int) -> dict[Tree, float]:
    """c_k(τ) of heavy ball for every tree of at most `order` vertices; k = None for the limit.

    Shapes: a number for each tree.
    Units: none; c_k(τ) stands before η^(|τ|−1) F(τ).
    Error:  relative 1e-12 up to order 5 at μ = 0.9, against the closed forms.
    Raises: ValueError for μ outside [0, 1), a negative k or an order outside 1 … 8.
    Source: Lyu et al., arXiv 2506.14806; the functional equation of the step map, solved order by order.

    >>> {tree: round(c, 3) for tree, c in flow_coefficients(0.5, None, 3).items()}
    {(): 2.0, ((),): -6.0, ((), ()): 16.6..., (((),),): 34.6...}
    """
    method = heavy_ball("flow_coefficients", mu)
    check_step("flow_coefficients", k)
    check_order("flow_coefficients", order)
    if k is None:
        series = steady(method, order)
    else:
        series = next(found for at, found in enumerate(transient(method, order)) if at == k)
    return dict(zip(forest(order).trees, series.tolist(), strict=True))


def transient(method: TwoStep, order: int) -> Iterator[np.ndarray]:
    """The series of F_0, F_1, …, without end.

    The step map is Φ_k = id + β (id − Φ_{k−1}⁻¹) + a f + b f∘Φ_{k−1}⁻¹ and F_k its generator.

    Shapes: -> (trees), again and again.
    """
    trees = forest(order)
    leaf = trees.leaf()
    field = trees.generator(method.current * leaf)
    while True:
        yield field
        back = trees.displacement(field, -1.0)
        earlier = method.previous * trees.pull(field, leaf, -1.0) if method.previous else 0.0
        field = trees.generator(method.current * leaf + earlier - method.beta * back)


def settled(method: TwoStep, order: int) -> Iterator[np.ndarray]:
    """`transient` until it no longer changes."""
    last = None
    for series in transient(method, order):
        yield series
        if last is not None and np.all(abs(series - last) <= SETTLED * abs(series)):
            return
        last = series


def steady(method: TwoStep, order: int) -> np.ndarray:
    """The series of F_∞, from (e^F − 1) id − β (1 − e^−F) id = a f + b f∘e^−F.

    Shapes: -> (trees).
    """
    trees = forest(order)
    leaf = trees.leaf()
    field = np.zeros_like(leaf)
    for _ in range(order):  # each pass is right for one more order
        field = _refine(trees, method, leaf, field)
    return field


def _refine(trees: Forest, method: TwoStep, leaf: np.ndarray, field: np.ndarray) -> np.ndarray:
    ahead, back = trees.displacement(field), trees.displacement(field, -1.0)
    force = method.current * leaf + method.previous * trees.pull(field, leaf, -1.0)
    return (force - (ahead - field) - method.beta * (back + field)) / (1 - method.beta)


def check_step(call: str, k: int | None) -> None:
    """Raise ValueError, naming `call`, for a step that is none."""
    if k is not None and k < 0:
        raise ValueError(f"{call} needs k >= 0, got {k}; pass None for the limit")


def check_order(call: str, order: int, most: int = LARGEST_ORDER) -> None:
    """Raise ValueError, naming `call`, for an order that is not available."""
    if not 1 <= order <= most:
        raise ValueError(
            f"{call} needs an order between 1 and {most}, got {order}; 1 is the rescaled gradient flow"
        )
