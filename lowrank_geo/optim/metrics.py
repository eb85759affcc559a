"""Two geometries of the fixed-rank manifold, as the two functions an optimizer needs.

`EMBEDDED` is the metric of R^(m×n): gradients (Up, M, Vp), retractions of
`lowrank_geo.retraction`, transport by projection. `PRODUCT` moves the frames and the core
separately: gradients (Up Sᵀ, M, Vp S), which are the ordinary gradients of U and V with their
part inside span(U), span(V) removed, and the polar retraction.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from torch import Tensor

from lowrank_geo import retraction
from lowrank_geo.geometry import Point, Tangent


class Metric(NamedTuple):
    """What a step does to tangents; all functions take batches."""

    name: str
    # What Up and Vp of the tangent coordinates are multiplied by in the gradient of this metric; None for nothing.
    factors: Callable[[Point], tuple[Tensor | None, Tensor | None]]
    # (point, step, ξ) -> new point, ξ there; a zero step keeps the point bit for bit.
    move: Callable[[Point, Tangent, Tangent], tuple[Point, Tangent]]

    def gradient(self, point: Point, xi: Tangent) -> Tangent:
        """The gradient of this metric from the tangent coordinates.

        Shapes: as `Tangent`.
        """
        left, right = self.factors(point)
        if left is None or right is None:
            return xi
        return Tangent(xi.Up @ left, xi.M, xi.Vp @ right)


def product_factors(point: Point) -> tuple[Tensor, Tensor]:
    """Sᵀ and S: ((I − UUᵀ)∂L/∂U, ∂L/∂S, (I − VVᵀ)∂L/∂V) = (Up Sᵀ, M, Vp S), without an inverse of S.

    Shapes: -> twice (..., r, r).
    """
    return point.S.mT, point.S


@cache  # the same object each time: torch.compile guards on its functions
def embedded(method: str) -> Metric:
    """The metric of R^(m×n) with the retraction called `method`."""
    move = partial(retraction.carried, method=method)
    return Metric("embedded", lambda point: (None, None), move)


PRODUCT = Metric("product", product_factors, retraction.polar_carried)


def metric_named(name: str, method: str = "orthographic") -> Metric:
    """The metric called "embedded" or "product", and the retraction; "product" has one of its own.

    Raises: ValueError for another name, or a retraction that the metric does not have.
    """
    if name not in ("embedded", "product"):
        raise ValueError(
            f"metric needs to be 'embedded' or 'product', got {name!r}; use one of them"
        )
    if not isinstance(method, str) or method not in retraction.RETRACTIONS:
        names = ", ".join(sorted(retraction.RETRACTIONS))
        raise ValueError(
            f"the {name} metric needs a retraction out of {names}, got {method!r}; use one of them"
        )
    if name == "embedded":
        return embedded(method)
    if method != "orthographic":  # the default of the optimizers, which name no metric
        raise ValueError(
            f"the product metric has a retraction of its own, got {method!r}; leave it out, or "
            "pass metric='embedded'"
        )
    return PRODUCT
