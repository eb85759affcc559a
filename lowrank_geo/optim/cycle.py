"""One step of the cycle "augment, core steps, truncate" on a batch of matrices, as pure functions of points, gradients
and state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim.augmentation import augment, augmented_gradient, block, truncate
from lowrank_geo.optim.core_rules import CoreRule, CoreSlots


class Cycle(NamedTuple):
    """What a group's matrices go through; the numbers of `augmentation.truncate`."""

    rule: CoreRule
    inner_steps: int
    tolerance: float
    min_rank: int
    max_rank: int | None
    every_batch: bool = False  # the batch that augments also takes a core step

    def event(self, phase: int) -> "Event":
        """What the batch after `phase` batches of this cycle does."""
        return Event(phase == 0, phase == self.inner_steps - self.every_batch)


class Event(NamedTuple):
    """What happens to the rank in one step."""

    augment: bool
    truncate: bool


class Core(NamedTuple):
    """Matrices in factors of width R, and what goes with them."""

    point: Point
    rank: Tensor  # (L,)
    step: Tensor  # (L,), core steps taken
    slots: CoreSlots


class CoreProposal(NamedTuple):
    """What a step would do at learning rate 1; the point is the old matrix, in new frames if the step augments."""

    core: Core
    direction: Tensor  # (L, R, R), zero where this batch only augments
    gradient: Tensor  # (L, R, R)
    moves: Tensor  # (L,), bool

    def slope(self) -> Tensor:
        """⟨gradient, direction⟩.

        Shapes: -> (L,).
        """
        return (self.gradient * self.direction).sum((-2, -1))

    def squares(self) -> Tensor:
        """|gradient|² and |direction|².

        Shapes: -> (2, L).
        """
        return torch.stack([x.square().sum((-2, -1)) for x in (self.gradient, self.direction)])


def propose_core(cycle: Cycle, event: Event, core: Core, gradient: Tangent) -> CoreProposal:
    """Augment, if it is time, and find the direction of the core.

    A batch that augments takes no core step, as published, except for matrices that have no room to be augmented, and
    with `every_batch`.

    Shapes: a batch of points, its tangent coordinates.
    """
    point, rank, step, slots = core
    width = point.S.shape[-1]
    moves = torch.ones_like(rank, dtype=torch.bool)
    if event.augment:
        if not cycle.every_batch:
            moves = rank == width
        change = augment(point, gradient, rank)
        G = augmented_gradient(point, gradient, rank, change)
        point, rank, slots = change.point, change.rank, cycle.rule.carry(slots, change)
    else:
        G = torch.where(block(rank, width), gradient.M, 0.0)
    step = step + moves.to(step.dtype)
    used = block(rank, width)
    direction, found = cycle.rule(G, slots, used, step.clamp(min=1))
    chosen = moves[:, None, None]
    slots = {name: torch.where(chosen, found[name], slots[name]) for name in slots}
    direction = torch.where(used & chosen, direction, 0.0)
    return CoreProposal(Core(point, rank, step, slots), direction, G, moves)


class Taken(NamedTuple):
    """The result of a step."""

    core: Core
    kept: Tensor  # (L,), |m| after truncation over |m| before, 1 where m = 0


def take_core(
    cycle: Cycle,
    event: Event,
    before: Core,
    proposal: CoreProposal,
    lr: float | Tensor,
    weight_decay: float,
) -> Taken:
    """Move the core, and truncate if it is time. At a learning rate of 0 everything stays bit for bit.

    Shapes: as `propose_core`; lr a number or a 0-d tensor.
    """
    (U, S, V), rank, step, slots = proposal.core
    decay = (lr * weight_decay) * proposal.moves.to(S.dtype)[:, None, None]
    point = Point(U, (1 - decay) * S - lr * proposal.direction, V)
    after, kept = Core(point, rank, step, slots), torch.ones_like(step)
    if event.truncate:
        after, kept = truncate_core(cycle, after)
    return Taken(_unless_zero(lr, before, after) if isinstance(lr, Tensor) else after, kept)


def truncate_core(cycle: Cycle, core: Core) -> Taken:
    """Truncate, by default to half the width at most, so that every direction can be augmented again."""
    width, slots = core.point.S.shape[-1], core.slots
    largest = (width + 1) // 2 if cycle.max_rank is None else min(cycle.max_rank, width)
    change = truncate(
        core.point,
        core.rank,
        tolerance=cycle.tolerance,
        min_rank=min(cycle.min_rank, largest),
        max_rank=largest,
    )
    carried = cycle.rule.carry(slots, change)
    before, after = (torch.linalg.matrix_norm(x["momentum"]) for x in (slots, carried))
    tiny = torch.finfo(before.dtype).tiny
    kept = torch.where(before > 0, after / before.clamp_min(tiny), 1.0)
    return Taken(Core(change.point, change.rank, core.step, carried), kept)


def _unless_zero(lr: Tensor, before: Core, after: Core) -> Core:
    moved = lr != 0

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(moved, b, a)

    return Core(
        Point(*(choose(a, b) for a, b in zip(before.point, after.point, strict=True))),
        choose(before.rank, after.rank),
        choose(before.step, after.step),
        {name: choose(before.slots[name], after.slots[name]) for name in after.slots},
    )
