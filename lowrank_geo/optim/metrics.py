"""Two geometries of the fixed-rank manifold, as the four functions an optimizer needs.

`EMBEDDED` is the metric of R^(m×n): gradients (Up, M, Vp), retractions of
`lowrank_geo.retraction`, transport by projection. `PRODUCT` moves the frames and the core
separately: gradients (Up Sᵀ, M, Vp S), which are the ordinary gradients of U and V with their
part inside span(U), span(V) removed, and the polar retraction.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from lowrank_geo import retraction
from lowrank_geo.geometry import Point, Tangent, gauge, transport


class Metric(NamedTuple):
    """What a step does to tangents; all functions take batches."""

    name: str
    gradient: Callable[[Point, Tangent], Tangent]  # tangent coordinates -> gradient of this metric
    retract: Callable[[Point, Tangent], Point]
    transport: Callable[[Point, Tangent, Point], Tangent]


def product_gradient(point: Point, xi: Tangent) -> Tangent:
    """((I − UUᵀ)∂L/∂U, ∂L/∂S, (I − VVᵀ)∂L/∂V) from the tangent coordinates, without an inverse of
    S.

    Shapes: as `Tangent`.
    """
    return Tangent(xi.Up @ point.S.mT, xi.M, xi.Vp @ point.S)


def embedded(method: str = "orthographic") -> Metric:
    """The metric of R^(m×n) with the retraction called `method`.

    Raises: ValueError for an unknown retraction.
    """
    if method not in retraction.RETRACTIONS:
        names = ", ".join(sorted(retraction.RETRACTIONS))
        raise ValueError(
            f"the embedded metric needs a retraction out of {names}, got {method!r}; use one of them"
        )
    return Metric("embedded", lambda point, xi: xi, retraction.RETRACTIONS[method], transport)


PRODUCT = Metric("product", product_gradient, retraction.polar, lambda point, xi, to: gauge(to, xi))


@cache  # the same object each time: torch.compile guards on its functions
def metric_named(name: str, retraction_method: str = "orthographic") -> Metric:
    """The metric called "embedded" or "product".

    Raises: ValueError for another name.
    """
    if name == "embedded":
        return embedded(retraction_method)
    if name == "product":
        return PRODUCT
    raise ValueError(f"metric needs to be 'embedded' or 'product', got {name!r}; use one of them")
