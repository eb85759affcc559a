"""Riemannian Adam with one second moment per row, tied betas by default."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_geo.optim import euclidean
from lowrank_geo.optim.base import RiemannianOptimizer, check_betas
from lowrank_geo.optim.directions import RowVariance
from lowrank_geo.optim.filters import EMA
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule


class RiemannianAdam(RiemannianOptimizer):
    """Adam whose moments live on the manifold, and torch.optim.AdamW's rule for the other
    parameters.

    The first moment is a tangent vector carried along; the second is a mean square per row of Up
    and Vp and one for M, which is invariant to the gauge and never moves. With β₁ = β₂ it stores
    the variance σ², not the second moment.

    Units: at lr 1 every row of the direction has mean square at most 1.
    Raises: ValueError for betas out of [0, 1), a negative lr, an unknown metric or retraction.
    Source: Orvieto & Gower, arXiv 2505.21829 (tied betas); Bécigneul & Ganea, arXiv 1810.00760
        (scalar second moments).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        euclidean_lr: float | Tensor | None = None,
        metric: str = "embedded",
        retraction: str = "orthographic",
    ) -> None:
        check_betas(betas)
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            metric=metric,
            retraction=retraction,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        metric = metric_named(group["metric"], group["retraction"])
        betas = group["betas"]
        return Rule(metric, EMA(betas[0]), RowVariance(tuple(betas), group["eps"]))

    def euclidean_slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum", "variance")

    def euclidean_directions(
        self, group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        return euclidean.adam_step(group, grads, states)
