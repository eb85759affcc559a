"""Riemannian sign descent: Signum and Lion."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.checks import check_betas
from lowrank_geo.optim.directions import Sign
from lowrank_geo.optim.filters import EMA, QHM
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule


class RiemannianSignum(RiemannianOptimizer):
    """W ← R(−lr·sign(m)) with m an average of gradients; momentum 0 is SignSGD.

    The sign is taken of tangent coordinates and depends on the choice of the frames U, V; `RiemannianMuon` takes the
    spectral counterpart, which does not.

    Units: at lr 1 every coordinate moves by 1.
    Raises: ValueError for a momentum out of [0, 1), a negative lr, an unknown metric or retraction.
    Source: Bernstein et al., signSGD, ICML 2018.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor | None = None,
        metric: str = "embedded",
        retraction: str = "orthographic",
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            maximize=maximize,
            metric=metric,
            retraction=retraction,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        metric = metric_named(group["metric"], group["retraction"])
        return Rule(metric, EMA(group["momentum"]), Sign())


class RiemannianLion(RiemannianOptimizer):
    """W ← R(−lr·sign((1 − β₁) g + β₁ m)), then m ← β₂ m + (1 − β₂) g.

    That is the sign of a quasi-hyperbolic momentum with ν = β₁/β₂. Like Signum it depends on the choice of the frames.

    Units: at lr 1 every coordinate moves by 1: lr is 3 to 10 times below Adam's, weight decay as much above.
    Raises: ValueError unless 0 <= β₁ < 1 and 0 < β₂ < 1; for a negative lr, an unknown metric or retraction.
    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor | None = None,
        metric: str = "embedded",
        retraction: str = "orthographic",
    ) -> None:
        check_betas(betas)
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            weight_decay=weight_decay,
            maximize=maximize,
            metric=metric,
            retraction=retraction,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        metric = metric_named(group["metric"], group["retraction"])
        beta1, beta2 = group["betas"]
        if beta2 == 0:
            raise ValueError(
                f"RiemannianLion needs betas[1] > 0, got {group['betas']}; pass (0.9, 0.99)"
            )
        return Rule(metric, QHM(beta1 / beta2, beta2), Sign())
