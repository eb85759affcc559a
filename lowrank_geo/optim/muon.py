"""Riemannian Muon: spectral directions on the manifold, Muon for dense matrices, Adam for the
rest.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.checks import check_betas
from lowrank_geo.optim.directions import EmbeddedSpectral, ProductSpectral
from lowrank_geo.optim.filters import EMA, NesterovEMA, check_decay
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule
from lowrank_geo.optim.values import check_number
from lowrank_geo.optim.variance import Variance


class RiemannianMuon(RiemannianOptimizer):
    """Steepest descent in the spectral norm on the manifold.

    In the embedded metric, the default, the whole momentum is replaced by its polar factor and projected. In the
    product metric U and V turn and S moves by the polar factors of their momenta, each with its own scale: about half
    the cost of the step, and a higher loss in our benchmarks (docs/decisions.md). Groups of geometry "matrix" get Muon
    with torch's match_rms_adamw scale, the others Adam with tied betas.

    Units: at lr 1 the embedded metric moves |ΔW|₂ = scale·√max(m, n), the scale of dense matrices, too; the product one
        |ΔU|₂ = rotation·√m, |ΔV|₂ = rotation·√n, |ΔS|₂ = spectrum.
    Raises: ValueError for a momentum or betas out of [0, 1), a negative lr or scale, an unknown
        metric.
    Source: Jordan et al., Muon, 2024; Orvieto & Gower, arXiv 2505.21829 (tied betas).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        metric: str = "embedded",
        retraction: str = "orthographic",
        rotation: float = 0.144,
        spectrum: float = 0.7,
        scale: float = 0.2,
    ) -> None:
        check_betas(betas)
        check_decay("RiemannianMuon", "momentum", momentum)
        defaults = dict(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            maximize=maximize,
            betas=tuple(betas),
            eps=eps,
            metric=metric,
            retraction=retraction,
            rotation=rotation,
            spectrum=spectrum,
            scale=scale,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        for name in ("rotation", "spectrum", "scale"):
            check_number(name, group[name], self.defaults[name])
            if not 0 <= group[name] < float("inf"):
                raise ValueError(f"{name} needs to be >= 0, got {group[name]}; leave it out")
        metric = metric_named(group["metric"], group["retraction"])
        if group["geometry"] == "euclidean":
            beta1, beta2 = group["betas"]
            gamma = beta2 if beta1 == beta2 else None
            return Rule(metric, EMA(beta1, unbiased=True), Variance(beta2, group["eps"], gamma))
        momentum = (NesterovEMA if group["nesterov"] else EMA)(group["momentum"])
        if metric.name == "product":
            scales = group["scale"], group["rotation"], group["spectrum"]
            return Rule(metric, momentum, ProductSpectral(*scales))
        return Rule(metric, momentum, EmbeddedSpectral(group["scale"]))
