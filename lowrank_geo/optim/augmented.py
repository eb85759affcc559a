"""Optimizers that adapt the rank: dynamical low-rank training as published, in an ordinary training loop."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim.augmentation import used_rank
from lowrank_geo.optim.base import Pending, RiemannianOptimizer, gradients, stack, store
from lowrank_geo.optim.checks import check_betas, check_cycle
from lowrank_geo.optim.core_rules import CoreAdam, CoreHeavyBall, CoreRule, Second
from lowrank_geo.optim.cycle import Core, Cycle, propose_core, take_core, truncate_core
from lowrank_geo.optim.directions import Identity
from lowrank_geo.optim.filters import QHM, HeavyBall
from lowrank_geo.optim.groups import by_shape, points_of
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule
from lowrank_geo.optim.variance import Variance


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
        self._compiled = True

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

    def _propose(self, group: dict[str, Any], points: list[Point]) -> Pending:
        columns = list(zip(*points, strict=True))  # all U, all S, all V
        cycle = self.cycle(group)
        event = cycle.event(group["phase"])
        gradient = Tangent(*(stack(gradients(group, column)) for column in columns))
        core = self._core(cycle, points)
        proposal = self._propose_core(cycle, event, core, gradient)

        @torch.no_grad()
        def move(lr: float | Tensor) -> None:
            if not isinstance(lr, Tensor):
                if lr == 0:
                    return  # not even the frames turn
                if self._compiled:  # a number would be compiled in
                    lr = torch.full((), lr, device=core.rank.device)
            taken = self._take_core(cycle, event, core, proposal, lr, group["weight_decay"])
            self._store(points, taken.core)
            if event.truncate:
                for at, kept in zip(points, taken.kept.unbind(), strict=True):
                    self._transports[id(at.S)] = kept

        return Pending(group, lambda: proposal.slope().sum(), move)

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


class AugmentedAdam(AugmentedOptimizer):
    """DLRT Adam, after the algorithm and code of RobustDLRT: dynamical low-rank training with Adam on the core. Other
    parameters follow AdamW.

    One batch augments the bases by the gradient, `inner_steps` batches train the core S in them, the last of these
    truncates to the lowest rank with an error below `tolerance`·|S|_F. Other parameters train on every batch. A layer
    uses its factors up to their whole width after an augmentation and up to half of it after a truncation, so its rank
    is a hard bound of both; `reserve` widens the factors of a model beforehand. A layer that starts with its whole
    width in use is first augmented when a truncation has made room.

    Args: inner_steps: s*. The published code counts the augmenting batch among its s*, so its s* = 10 is 9 here.
        tolerance: τ. min_rank, max_rank: bounds of the rank after truncation; None for half the width of the factors,
        rounded up. every_batch: the augmenting batch takes the first of the core steps, too, with the blocks of the
        gradient that it knows. second, age: "square-root" and False as published; "mixed" and True are the rules that
        are right for uncorrelated entries, with a wider window of learning rates.
    Units: at lr 1 no entry of S moves by more than about 1.
    Raises: ValueError for numbers out of range.
    Source: Schotthöfer, Yang & Schnake, arXiv 2505.08022, algorithm 1, table 8 (defaults) and code; the same method for
        momentum in Schotthöfer, Klein & Kusch, arXiv 2506.17475.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        inner_steps: int = 10,
        tolerance: float = 0.1,
        min_rank: int = 2,
        max_rank: int | None = None,
        every_batch: bool = False,
        second: Second = "square-root",
        age: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor | None = None,
    ) -> None:
        check_betas(betas)
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            inner_steps=inner_steps,
            tolerance=tolerance,
            min_rank=min_rank,
            max_rank=max_rank,
            every_batch=every_batch,
            second=second,
            age=age,
            weight_decay=weight_decay,
            maximize=maximize,
            phase=0,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        beta1, beta2 = group["betas"]
        adam = QHM(1.0, beta1, unbiased=True), Variance(beta2, group["eps"], None)
        return Rule(metric_named("embedded"), *adam)

    def core_rule(self, group: dict[str, Any]) -> CoreRule:
        return CoreAdam(group["betas"], group["eps"], group["second"], group["age"])


class AugmentedHeavyBall(AugmentedOptimizer):
    """DLRT heavy ball, reconstructed: the cycle of `AugmentedAdam` with m ← β m + g, S ← S − lr·m on the core.

    No code of it is published. The paper writes V ← (1 − γ)V − λ∇L, W ← W + λV: its λ enters twice, so lr here is λ²
    and β is 1 − γ. The momentum of the core is all there is: bases move by augmentation without memory.

    Args: as `AugmentedAdam`.
    Units: lr is W per gradient, as in torch.optim.SGD.
    Raises: ValueError for numbers out of range.
    Source: Schotthöfer, Klein & Kusch, arXiv 2506.17475 (abstract and quoted updates).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        inner_steps: int = 10,
        tolerance: float = 0.1,
        min_rank: int = 2,
        max_rank: int | None = None,
        every_batch: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            inner_steps=inner_steps,
            tolerance=tolerance,
            min_rank=min_rank,
            max_rank=max_rank,
            every_batch=every_batch,
            weight_decay=weight_decay,
            maximize=maximize,
            phase=0,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(metric_named("embedded"), HeavyBall(group["momentum"]), Identity())

    def core_rule(self, group: dict[str, Any]) -> CoreRule:
        return CoreHeavyBall(group["momentum"])
