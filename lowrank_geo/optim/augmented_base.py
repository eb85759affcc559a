"""The optimizer class whose matrices go through cycles of augmentation, core steps and truncation."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim.augmentation import used_rank
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.checks import check_cycle
from lowrank_geo.optim.core_rules import CoreRule
from lowrank_geo.optim.cycle import Core, Cycle, propose_core, take_core, truncate_core
from lowrank_geo.optim.groups import by_shape, gradients, points_of
from lowrank_geo.optim.pending import Pending
from lowrank_geo.optim.stacks import stack, store
from lowrank_geo.optim.step import Rule
from lowrank_geo.precision import full_precision


class AugmentedOptimizer(RiemannianOptimizer):
    """What `AugmentedAdam` and `AugmentedHeavyBall` share: the cycle of a group, and the rank of each matrix.

    The factors keep their shapes; a matrix of rank a uses the leading a columns of U and V and the leading block of S,
    and S is zero elsewhere. The momentum is that of the core, (0, M, 0) as a tangent vector. `group["phase"]` counts
    the batches of the cycle.
    """

    changes_rank = True

    def core_rule(self, group: dict[str, Any]) -> CoreRule:
        """The rule of the cores of a group."""
        raise NotImplementedError

    def cycle(self, group: dict[str, Any]) -> Cycle:
        """The cycle of a group. Raises ValueError for numbers out of range."""
        names = ("inner_steps", "tolerance", "min_rank", "max_rank", "every_batch")
        return Cycle(self.core_rule(group), **{name: group[name] for name in names})

    @torch.no_grad()
    def _create_state(self, group: dict[str, Any], rule: Rule) -> None:
        check_cycle(group)
        cycle = self.cycle(group)
        if group["geometry"] != "fixed_rank":
            return super()._create_state(group, rule)
        for parameter in group["params"]:
            self.state[parameter]["step"] = torch.zeros((), device=parameter.device)
        for point in points_of(group):
            S = point.S.detach()
            self.state[point.S]["rank"] = used_rank(S)
            for name in cycle.rule.names:
                self.state[point.S][name] = torch.zeros_like(S)

    def compile(self, **options: Any) -> None:
        """Compile the arithmetic of the cycle: for each shape, augmentation, core step and truncation.

        Args: options: of torch.compile, e.g. backend.
        """
        self._propose_core = torch.compile(propose_core, fullgraph=True, **options)
        self._take_core = torch.compile(take_core, fullgraph=True, **options)
        self._compiled = options

    _propose_core = staticmethod(propose_core)
    _take_core = staticmethod(take_core)

    @torch.no_grad()
    def pending(self) -> Iterator[Pending]:
        """As `RiemannianOptimizer`; the cycles go on when all parts have been proposed."""
        yield from super().pending()
        for group in self.param_groups:
            if group["geometry"] == "fixed_rank" and self._advances(group):
                group["phase"] = (
                    0 if self.cycle(group).event(group["phase"]).truncate else group["phase"] + 1
                )

    def _advances(self, group: dict[str, Any]) -> bool:
        still = not isinstance(group["lr"], Tensor) and group["lr"] == 0
        return not still and any(S.grad is not None for S in group["params"][1::3])

    @full_precision()
    def _propose(self, group: dict[str, Any], points: list[Point]) -> Pending:
        columns = list(zip(*points, strict=True))  # all U, all S, all V
        cycle = self.cycle(group)
        event = cycle.event(group["phase"])
        gradient = Tangent(*(stack(gradients(group, column)) for column in columns))
        core = self._core(cycle, points)
        proposal = self._propose_core(cycle, event, core, gradient)

        @torch.no_grad()
        @full_precision()
        def move(lr: float | Tensor) -> None:
            if not isinstance(lr, Tensor):
                if lr == 0:
                    return  # not even the frames turn
                if self._compiled is not None:  # a number would be compiled in
                    lr = torch.full((), lr, device=core.rank.device)
            taken = self._take_core(cycle, event, core, proposal, lr, group["weight_decay"])
            self._store(points, taken.core)
            if event.truncate:
                for at, kept in zip(points, taken.kept.unbind(), strict=True):
                    self._transports[at.S] = kept

        return Pending(
            group, lambda: proposal.slope().sum(), lambda: proposal.squares().sum(-1), move
        )

    def _core(self, cycle: Cycle, points: list[Point]) -> Core:
        cores = [point.S for point in points]
        names = ("rank", "step", *cycle.rule.names)
        rank, step, *slots = (stack([self.state[S][name] for S in cores]) for name in names)
        columns = zip(*points, strict=True)
        return Core(
            Point(*(stack(column) for column in columns)),
            rank,
            step,
            dict(zip(cycle.rule.names, slots, strict=True)),
        )

    def _store(self, points: list[Point], core: Core) -> None:
        columns = list(zip(*points, strict=True))
        for column, new in zip(columns, core.point, strict=True):
            store(list(column), new)
            store([self.state[p]["step"] for p in column], core.step)
        for name, value in {"rank": core.rank, **core.slots}.items():
            store([self.state[S][name] for S in columns[1]], value)

    @torch.no_grad()
    @full_precision()
    def truncate(self) -> None:
        """End the cycles now: truncate every matrix and start with an augmentation. Before evaluating, saving or
        exporting in the middle of a cycle.
        """
        for group in self.param_groups:
            if group["geometry"] == "fixed_rank":
                cycle = self.cycle(group)
                for points in by_shape(points_of(group)):
                    core, _ = truncate_core(cycle, self._core(cycle, points))
                    self._store(points, core)
                group["phase"] = 0

    def ranks(self) -> dict[str, int]:
        """The rank of each layer now, by name. Reads back to the host."""
        return {
            name: int(self.state[S]["rank"])
            for group in self.param_groups
            for name, S in zip(group.get("layers", ()), group["params"][1::3], strict=False)
        }
