"""One optimizer step on a batch of fixed-rank matrices, as pure functions of points, gradients
and state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo import dispatch
from lowrank_geo.geometry import Point, Tangent, gauge, inner, norm
from lowrank_geo.optim.directions import Direction, Signal, Slots
from lowrank_geo.optim.filters import Filter
from lowrank_geo.optim.metrics import Metric


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

    def squares(self) -> Tensor:
        """|gradient|² and |direction|² in the metric.

        Shapes: -> (2, L).
        """
        return torch.stack([inner(x, x) for x in (self.gradient, self.direction)])


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
    g, m, output = filtered(rule, point, gradient, momentum, step)
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
    moved, carried = rule.metric.move(decayed, step, proposal.momentum)
    before, after = norm(proposal.momentum), norm(carried)
    tiny = torch.finfo(before.dtype).tiny
    tau = torch.where(before > 0, after / before.clamp_min(tiny), 1.0)
    if rule.keep_norm:
        stretch = torch.where(after > 0, before / after.clamp_min(tiny), 1.0)[..., None, None]
        carried = Tangent(*(stretch * x for x in carried))
    return Moved(moved, carried, rule.direction.carry(proposal.slots, point, moved), tau)


def filtered(
    rule: Rule, point: Point, gradient: Tangent, momentum: Tangent, step: Tensor
) -> tuple[Tangent, Tangent, Tangent]:
    """The gradient g of the metric, m = u·momentum + v·g, and the output a·g + b·m.

    Shapes: as `propose`.
    """
    how = rule.filter.coefficients(step)
    if not dispatch.runs_kernels(*gradient, *momentum):
        g = rule.metric.gradient(point, gradient)
        m = combine(how.u, momentum, how.v, g)
        return g, m, combine(how.b, m, how.a, g)
    left, right = rule.metric.factors(point)
    weights = torch.stack([torch.ones_like(step) * weight for weight in how], -1).float()
    parts = [
        dispatch.tangent(Z, R=R, momentum=old, weights=weights)
        for Z, R, old in zip(gradient, (left, None, right), momentum, strict=True)
    ]
    g, m, output = (Tangent(*part) for part in zip(*parts, strict=True))
    return g, m, output


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
