"""One optimizer step on a batch of fixed-rank matrices, as a pure function of points, gradients
and state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent, gauge, norm
from lowrank_geo.optim.directions import Direction, Signal, Slots
from lowrank_geo.optim.filters import Filter
from lowrank_geo.optim.metrics import Metric
from lowrank_geo.retraction import keep_if_zero


class Rule(NamedTuple):
    """An optimizer of the family: metric × filter × direction; the metric brings retraction and
    transport.
    """

    metric: Metric
    filter: Filter
    direction: Direction


class Moved(NamedTuple):
    """The result of a step."""

    point: Point
    momentum: Tangent  # a tangent at `point`
    slots: Slots
    transport: Tensor  # (L,), τ = |Tm|/|m|, 1 where m = 0


def move(
    rule: Rule,
    point: Point,
    gradient: Tangent,
    momentum: Tangent,
    slots: Slots,
    at: "Schedule",
) -> Moved:
    """metric -> filter -> direction -> retract -> transport, for L matrices of one shape.

    The momentum is a tangent at the current point before and after. A zero step leaves U, S, V
    bit for bit.

    Shapes: U, Up (L, m, r), S, M (L, r, r), V, Vp (L, n, r).
    """
    g = rule.metric.gradient(point, gradient)
    how = rule.filter.coefficients(at.step)
    m = combine(how.u, momentum, how.v, g)
    direction, slots = rule.direction(
        Signal(combine(how.b, m, how.a, g), g, momentum, at.step), slots
    )
    # Row scaling leaves the tangent space; the projection is where rounding errors of the gauge end, too.
    direction = gauge(point, direction)
    step = Tangent(*(-at.lr * x for x in direction))
    decayed = Point(point.U, (1 - at.lr * at.weight_decay) * point.S, point.V)
    moved = keep_if_zero(decayed, step, rule.metric.retract(decayed, step))
    carried = rule.metric.transport(point, m, moved)
    before, after = norm(m), norm(carried)
    tau = torch.where(before > 0, after / before.clamp_min(torch.finfo(before.dtype).tiny), 1.0)
    return Moved(moved, carried, slots, tau)


class Schedule(NamedTuple):
    """Where in the run a step is."""

    step: Tensor  # (L,), counts from 1
    lr: float | Tensor
    weight_decay: float


def combine(a: float | Tensor, xi: Tangent, b: float | Tensor, eta: Tangent) -> Tangent:
    """a ξ + b η; a factor that is the number 0 skips its term.

    Shapes: as `Tangent`.
    """
    if not isinstance(a, Tensor) and a == 0:
        return Tangent(*(b * y for y in eta))
    if not isinstance(b, Tensor) and b == 0:
        return xi if not isinstance(a, Tensor) and a == 1 else Tangent(*(a * x for x in xi))
    return Tangent(*(a * x + b * y for x, y in zip(xi, eta, strict=True)))
