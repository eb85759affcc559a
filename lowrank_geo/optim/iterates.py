"""The points of schedule-free optimization beside the parameters of one group: z, which the steps move, and x, their
average. The parameters themselves hold the point y at which gradients are taken, or x.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent, inner, project_factors, transport
from lowrank_geo.optim.averaging import Average
from lowrank_geo.optim.groups import by_shape, check_gradient, counts, points_of, with_gradients
from lowrank_geo.optim.stacks import stack
from lowrank_geo.optim.weights import FRESH, Weights

Group = dict[str, Any]
State = Any  # of an optimizer: parameter -> name -> tensor


def create(group: Group, state: State) -> None:
    """z = x = the parameters. x is float32 or better: an average in bfloat16 would stop after some steps."""
    for p in group["params"]:
        state[p]["z"] = p.detach().clone()
        state[p]["x"] = p.detach().clone().to(torch.promote_types(p.dtype, torch.float32))
        state[p]["averaging"] = torch.tensor(FRESH, dtype=torch.float64, device=p.device)


def fresh(groups: list[Group], state: State) -> bool:
    """Whether no step has been averaged in yet."""
    return not any(bool((state[p]["averaging"] > 0).any()) for g in groups for p in g["params"])


def between(group: Group, state: State, average: Average, beta: float) -> None:
    """Write y = (1 − β) z + β x into the parameters; on the manifold, its average of rank r."""
    for points in triples(group):
        z, x = (stored(name, points, state) for name in "zx")
        write(points, average(z, x, beta))
    for p in flats(group):
        z, x = state[p]["z"], state[p]["x"]
        p.copy_(torch.lerp(z.to(x.dtype), x, beta))


def show(name: str, group: Group, state: State) -> None:
    """Write "z" or "x" into the parameters."""
    for p in group["params"]:
        p.copy_(state[p][name])


def to_z(group: Group, state: State, *, carry: bool) -> None:
    """Move the parameters that have a gradient to z, and with `carry` the gradients of triples to the tangent space
    there. Replaces `.grad`, does not write to it.
    """
    for points in triples(group, active=True):
        if carry:
            carried = transport(live(points), gradient(points), stored("z", points, state))
            for column, parts in zip(zip(*points, strict=True), carried, strict=True):
                for p, part in zip(column, parts.unbind(), strict=True):
                    p.grad = part
        write(points, stored("z", points, state))
    for p in flats(group, active=True):
        p.copy_(state[p]["z"])


def average_in(group: Group, state: State, average: Average, weights: Weights) -> None:
    """z ← the parameters, x ← (1 − c) x + c z, where there was a gradient."""
    for points in triples(group, active=True):
        z, g = live(points), gradient(points)
        c = coefficients(group, state, [p.S for p in points], weights, g)
        for column, new in zip(zip(*points, strict=True), z, strict=True):
            torch._foreach_copy_([state[p]["z"] for p in column], list(new.unbind()))
        mean = average(stored("x", points, state), z, c)
        for column, new in zip(zip(*points, strict=True), mean, strict=True):
            torch._foreach_copy_([state[p]["x"] for p in column], list(new.unbind()))
    params = flats(group, active=True)
    if params:
        c = coefficients(group, state, params, weights, [check_gradient(p) for p in params])
        torch._foreach_copy_([state[p]["z"] for p in params], params)
        for p, weight in zip(params, c.unbind(), strict=True):
            x = state[p]["x"]
            x.lerp_(p.to(x.dtype), weight.to(x.dtype))


def coefficients(
    group: Group, state: State, at: list[Tensor], weights: Weights, grads: Tangent | list[Tensor]
) -> Tensor:
    """c of each matrix or parameter; advances their counters.

    Shapes: -> (L,).
    """
    active = counts(group["lr"], grads)
    counters = [state[p]["averaging"] for p in at]
    mask = None if active is None else torch.stack(active)
    c, new = weights(torch.stack(counters), group["lr"], mask)
    torch._foreach_copy_(counters, list(new.unbind()))
    return c


def ahead(group: Group, state: State, *, of_triples: bool) -> list[Tensor]:
    """⟨g, z − parameters⟩ in parts, with the gradient g that the parameters have; without triples if so asked.

    On the manifold g is known in the tangent space only, and so is the product.

    Shapes: -> any number of ().
    """
    terms = []
    for points in triples(group, active=True) if of_triples else ():
        at, z = live(points), stored("z", points, state)
        zV, ztU = z.U @ (z.S @ (z.V.mT @ at.V)), z.V @ (z.S.mT @ (z.U.mT @ at.U))
        Up, M, Vp = project_factors(at, zV, ztU)
        terms.append(inner(gradient(points), Tangent(Up, M - at.S, Vp)).sum())
    for p in flats(group, active=True):
        kind = state[p]["x"].dtype
        away = state[p]["z"].to(kind) - p.to(kind)
        terms.append((check_gradient(p).to(kind) * away).sum())
    return terms


def idle(groups: list[Group]) -> bool:
    """Whether lr = 0 and every gradient is zero: how torch.distributed.checkpoint asks for state to be made."""
    if any(isinstance(group["lr"], Tensor) or group["lr"] != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return not any(bool((grad != 0).any()) for grad in grads)


def triples(group: Group, *, active: bool = False) -> list[list[Point]]:
    """The triples of a fixed-rank group by shape; with `active`, those that have a gradient."""
    if group["geometry"] != "fixed_rank":
        return []
    points = points_of(group)
    return list(by_shape(with_gradients(points) if active else points))


def flats(group: Group, *, active: bool = False) -> list[Tensor]:
    """The parameters of another group; with `active`, those that have a gradient."""
    if group["geometry"] == "fixed_rank":
        return []
    return [p for p in group["params"] if not active or p.grad is not None]


def live(points: list[Point]) -> Point:
    """Shapes: L triples -> one with a batch dimension L."""
    return Point(*(stack(column) for column in zip(*points, strict=True)))


def gradient(points: list[Point]) -> Tangent:
    """Shapes: L triples -> a tangent with a batch dimension L."""
    columns = zip(*points, strict=True)
    return Tangent(*(stack([check_gradient(p) for p in column]) for column in columns))


def stored(name: str, points: list[Point], state: State) -> Point:
    """Shapes: L triples -> one with a batch dimension L."""
    columns = zip(*points, strict=True)
    return Point(*(stack([state[p][name] for p in column]) for column in columns))


def write(points: list[Point], new: Point) -> None:
    """Copy a batch into its parameters."""
    for column, parts in zip(zip(*points, strict=True), new, strict=True):
        torch._foreach_copy_(list(column), list(parts.unbind()))
