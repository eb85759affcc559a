"""Riemannian stochastic gradient descent with heavy-ball or Nesterov momentum."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_geo.optim import euclidean
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.directions import Identity
from lowrank_geo.optim.filters import Filter, HeavyBall, Nesterov
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule


class RiemannianSGD(RiemannianOptimizer):
    """W ← R(−lr·m) with m ← β T(m) + grad, and torch.optim.SGD's rule for the other parameters.

    Units: lr is W per gradient, as in torch.optim.SGD.
    Raises: ValueError for a momentum out of [0, 1), a negative lr, an unknown metric or retraction.
    Source: Absil, Mahony & Sepulchre, Optimization Algorithms on Matrix Manifolds, 2008 (the
        retraction framework).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        euclidean_lr: float | Tensor | None = None,
        metric: str = "embedded",
        retraction: str = "orthographic",
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum needs to be in [0, 1), got {momentum}; pass e.g. 0.9")
        defaults = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            metric=metric,
            retraction=retraction,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        metric = metric_named(group["metric"], group["retraction"])
        return Rule(metric, self._filter(group), Identity())

    def _filter(self, group: dict[str, Any]) -> Filter:
        return (Nesterov if group["nesterov"] else HeavyBall)(group["momentum"])

    def euclidean_directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        how = self._filter(group).coefficients(states[0]["step"])
        return euclidean.filtered(grads, [s["momentum"] for s in states], how)
