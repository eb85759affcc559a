"""Riemannian stochastic gradient descent with any momentum filter."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.directions import Clip, Identity
from lowrank_geo.optim.filters import Filter, HeavyBall, Nesterov
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule
from lowrank_geo.optim.values import check_number


class RiemannianSGD(RiemannianOptimizer):
    """W ← R(−lr·m) with m ← β T(m) + grad, and torch.optim.SGD's rule for the other parameters.

    Args: filter: a momentum rule of `lowrank_geo.optim.filters` in place of momentum and nesterov; it is not part of
        state_dict. clip: largest coordinate of the filtered gradient. keep_norm: rescale the transported momentum to
        the norm it had, so that the filter has the gain it was designed with.
    Units: lr is W per gradient, as in torch.optim.SGD.
    Raises: ValueError for a momentum out of [0, 1) or beside a filter, a negative lr, an unknown metric or retraction.
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
        filter: Filter | None = None,
        clip: float | None = None,
        keep_norm: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor | None = None,
        metric: str = "embedded",
        retraction: str = "orthographic",
    ) -> None:
        check_number("momentum", momentum, 0.9)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum needs to be in [0, 1), got {momentum}; pass e.g. 0.9")
        if filter is not None and (isinstance(filter, type) or not hasattr(filter, "coefficients")):
            raise TypeError(
                f"filter needs a rule of lowrank_geo.optim.filters, got {filter!r}; pass e.g. QHM(0.7, 0.99)"
            )
        if filter is not None and (nesterov or momentum not in (0.0, 0.9)):
            raise ValueError(
                f"RiemannianSGD needs a filter or a momentum, got {filter!r} beside momentum={momentum}, "
                f"nesterov={nesterov}; leave these out"
            )
        self._filter = filter
        defaults = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            clip=clip,
            keep_norm=keep_norm,
            weight_decay=weight_decay,
            maximize=maximize,
            metric=metric,
            retraction=retraction,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        metric = metric_named(group["metric"], group["retraction"])
        momentum = (Nesterov if group["nesterov"] else HeavyBall)(group["momentum"])
        direction = Identity() if group["clip"] is None else Clip(group["clip"])
        return Rule(metric, self._filter or momentum, direction, group["keep_norm"])
