"""The momentum of an optimizer by name, also of those that keep it elsewhere than in a filter of ours."""

from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lowrank_geo.optim import RiemannianOptimizer, RiemannianSGD, ScheduleFree
from lowrank_geo.optim.augmented_base import AugmentedOptimizer
from lowrank_geo.optim.filters import EMA, Coefficients, Filter
from lowrank_geo.optim.named import OPTIMIZERS


@dataclass(frozen=True)
class Interpolated:
    """A filter whose output is scaled by 1 − β: the step of y in schedule-free training, late in a run.

    y = (1 − β) z + β x moves by (1 − β) of the step of z, while the average x, of weight 1/t, hardly moves.

    Source: Defazio et al., The Road Less Scheduled, NeurIPS 2024, arXiv 2405.15682, equations 1 to 3.
    """

    inner: Filter
    beta: float

    def coefficients(self, step: Tensor) -> Coefficients:
        u, v, a, b = self.inner.coefficients(step)
        return Coefficients(u, v, (1 - self.beta) * a, (1 - self.beta) * b)


def momentum_named(name: str, total_steps: int) -> tuple[Filter, bool]:
    """The filter of an optimizer by name, and whether its steps are lr times the output: only then is there an edge.

    AdamW's is its first moment; that of schedule-free optimizers is what moves y.

    Raises: ValueError for an unknown name, or an optimizer whose momentum is not one of gradients: that of the core in
        augmented bases.

    >>> momentum_named("adamw", 10)
    (EMA(beta=0.9, unbiased=True), False)
    >>> momentum_named("schedule-free-sgd", 10)
    (Interpolated(inner=HeavyBall(beta=0.0), beta=0.9), True)
    """
    made = example(name, total_steps)
    if isinstance(made, torch.optim.AdamW):
        return EMA(made.param_groups[0]["betas"][0], unbiased=True), False
    if isinstance(made, ScheduleFree):
        inner, plain = of(made.optimizer)
        return Interpolated(inner, made.beta), plain
    if keeps_filtered_gradients(made):
        return of(made)
    known = ", ".join(sorted(x for x in OPTIMIZERS if not x.startswith("dlrt")))
    raise ValueError(
        f"analyze run needs a run of {known}, got {name!r}; augmented bases keep the momentum of a core that changes"
    )


def example(name: str, total_steps: int) -> torch.optim.Optimizer | None:
    """An optimizer by name, on a parameter of its own; None for an unknown name."""
    if name not in OPTIMIZERS:
        return None
    groups = [{"params": [nn.Parameter(torch.zeros(2, 4))], "lr": 1.0}]
    return OPTIMIZERS[name].make(groups, total_steps)


def keeps_filtered_gradients(optimizer: object) -> TypeGuard[RiemannianOptimizer]:
    """Whether its momentum is one of ours, of gradients: not that of the core in augmented bases, which change."""
    return isinstance(optimizer, RiemannianOptimizer) and not isinstance(
        optimizer, AugmentedOptimizer
    )


def of(optimizer: RiemannianOptimizer) -> tuple[Filter, bool]:
    """The filter of an optimizer of ours, and whether its steps are lr times the output."""
    group = optimizer.param_groups[0]
    plain = type(optimizer) is RiemannianSGD and group.get("clip") is None
    return optimizer.rule(group).filter, plain
