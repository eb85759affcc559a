"""One optimizer step on a batch of fixed-rank matrices, as pure functions of points, gradients
and state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent, gauge, inner, norm
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
    keep_norm: bool = False  # transport keeps the norm of the momentum


class Proposal(NamedTuple):
    """What a step would do at learning rate 1, before anything moves."""

    direction: Tangent
    momentum: Tangent  # at the old point
    slots: Slots
    gradient: Tangent  # of the metric

    def slope(self) -> Tensor:
        """⟨gradient, direction⟩ in the metric: to first order the loss falls by lr·slope.

        Shapes: -> (L,).
        """
        return inner(self.gradient, self.direction)


class Moved(NamedTuple):
    """The result of a step."""

    point: Point
    momentum: Tangent  # a tangent at `point`
    slots: Slots
    transport: Tensor  # (L,), τ = |Tm|/|m|, 1 where m = 0


def propose(
    rule: Rule, point: Point, gradient: Tangent, momentum: Tangent, slots: Slots, step: Tensor
) -> Proposal:
    """metric -> filter -> direction, for L matrices of one shape.

    Shapes: U, Up (L, m, r), S, M (L, r, r), V, Vp (L, n, r), step (L,), counting from 1.
    """
    g = rule.metric.gradient(point, gradient)
    how = rule.filter.coefficients(step)
    m = combine(how.u, momentum, how.v, g)
    output = combine(how.b, m, how.a, g)
    direction, slots = rule.direction(Signal(output, g, momentum, m, step), slots)
    if rule.direction.leaves_tangents:
        direction = gauge(point, direction)
    return Proposal(direction, m, slots, g)


def take(
    rule: Rule, point: Point, proposal: Proposal, lr: float | Tensor, weight_decay: float
) -> Moved:
    """retract -> transport. A zero step leaves U, S, V bit for bit.

    Shapes: as `propose`; lr a number or a 0-d tensor.
    """
    step = Tangent(*(-lr * x for x in proposal.direction))
    decayed = Point(point.U, (1 - lr * weight_decay) * point.S, point.V)
    moved = keep_if_zero(decayed, step, rule.metric.retract(decayed, step))
    carried = rule.metric.transport(point, proposal.momentum, moved)
    before, after = norm(proposal.momentum), norm(carried)
    tiny = torch.finfo(before.dtype).tiny
    tau = torch.where(before > 0, after / before.clamp_min(tiny), 1.0)
    if rule.keep_norm:
        stretch = torch.where(after > 0, before / after.clamp_min(tiny), 1.0)[..., None, None]
        carried = Tangent(*(stretch * x for x in carried))
    return Moved(moved, carried, rule.direction.carry(proposal.slots, point, moved), tau)


def combine(a: float | Tensor, xi: Tangent, b: float | Tensor, eta: Tangent) -> Tangent:
    """a ξ + b η; a factor that is the number 0 skips its term.

    Shapes: as `Tangent`; a, b numbers or (L,).
    """
    if not isinstance(a, Tensor) and a == 0:
        return scaled(b, eta)
    if not isinstance(b, Tensor) and b == 0:
        return scaled(a, xi)
    if isinstance(b, Tensor):
        pairs = zip(scaled(a, xi), eta, strict=True)
        return Tangent(*(torch.addcmul(x, b.to(y.dtype)[..., None, None], y) for x, y in pairs))
    return Tangent(*(torch.add(x, y, alpha=b) for x, y in zip(scaled(a, xi), eta, strict=True)))


def scaled(a: float | Tensor, xi: Tangent) -> Tangent:
    """a ξ.

    Shapes: as `combine`.
    """
    if isinstance(a, Tensor):
        return Tangent(*(a.to(x.dtype)[..., None, None] * x for x in xi))
    return xi if a == 1 else Tangent(*(a * x for x in xi))
