"""Riemannian Adam: second moments by row, by matrix or by entry of the core, tied betas by default."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.checks import check_betas, check_nus
from lowrank_geo.optim.filters import QHM, unbias
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule
from lowrank_geo.optim.variance import Over, Variance


class Posterior(NamedTuple):
    """A Gaussian belief about the gradient of one parameter."""

    mean: Tensor  # of the shape of the parameter
    variance: Tensor  # of one gradient; of that shape, or one for each row or matrix that shares it


class RiemannianAdam(RiemannianOptimizer):
    """Adam whose moments live on the manifold, and torch.optim.AdamW's rule for the other
    parameters.

    The first moment is a tangent vector carried along; the second belongs to `over`: rows of Up and Vp and one for M,
    the whole matrix, or rows and every entry of M (`Variance`). With β₁ = β₂ it stores the variance σ², not the second
    moment.

    Args: nus: weights of the averages against the current gradient and square, (1, 1) for Adam; QHAdam otherwise, and
        (β₁, 1) is Nadam without momentum decay. gamma: second = m² + γ EMA[(g − m)²] whatever the betas (AdaVar).
        max_rms: largest root mean square of a direction, over a triple or a tensor off the manifold; None for any.
        max_advance: longest way of a step along the gradient, over all groups that have this bound, a length of 8 times
        it counting as its way at least; longer steps are shortened (`advance.share`). A number in a group of another
        optimizer does the same; None for any.
    Units: at lr 1 every row of the direction has mean square at most 1.
    Raises: ValueError for betas out of [0, 1), a negative lr, an unknown metric or retraction.
    Source: Orvieto & Gower, arXiv 2505.21829 (tied betas, AdaVar); Ma & Yarats, arXiv 1810.06801 (QHAdam); Bécigneul &
        Ganea, arXiv 1810.00760 (scalar second moments); Shazeer & Stern, arXiv 1804.04235 (largest root mean square).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 5e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        over: Over = "row",
        nus: tuple[float, float] = (1.0, 1.0),
        gamma: float | None = None,
        max_rms: float | None = None,
        max_advance: float | None = None,
        weight_decay: float = 0.0,
        maximize: bool = False,
        euclidean_lr: float | Tensor | None = None,
        metric: str = "embedded",
        retraction: str = "orthographic",
    ) -> None:
        check_betas(betas)
        check_nus(nus)
        defaults = dict(
            lr=lr,
            betas=tuple(betas),
            eps=eps,
            over=over,
            nus=tuple(nus),
            gamma=gamma,
            max_rms=max_rms,
            max_advance=max_advance,
            weight_decay=weight_decay,
            maximize=maximize,
            metric=metric,
            retraction=retraction,
        )
        super().__init__(params, defaults, euclidean_lr=euclidean_lr)

    def rule(self, group: dict[str, Any]) -> Rule:
        metric = metric_named(group["metric"], group["retraction"])
        beta = group["betas"][0]
        return Rule(metric, QHM(group["nus"][0], beta, unbiased=True), self._variance(group))

    def _variance(self, group: dict[str, Any]) -> Variance:
        gamma, (beta1, beta2) = group["gamma"], group["betas"]
        if gamma is None and beta1 == beta2:
            gamma = beta2
        bound = group.get("max_rms")  # not in states of before it was there
        return Variance(beta2, group["eps"], gamma, group["nus"][1], group["over"], bound)

    @torch.no_grad()
    def gradient_posterior(self, parameter: Tensor) -> Posterior:
        """What the moments say about the gradient of a parameter: mean, and variance of one gradient.

        Adam with tied betas is online variational inference of a Gaussian: m is its mean, and σ²(1 + β)/(2β) estimates
        the variance of the gradients without bias once the averages have settled. A factor of a low-rank layer
        gets its part of the tangent vector.

        Raises: ValueError for a parameter of another optimizer, or one without tied betas.
        Source: Orvieto & Gower, arXiv 2505.21829, theorem 4.1.
        """
        for group in self.param_groups:
            if any(parameter is p for p in group["params"]):
                beta1, beta2 = group["betas"]
                if not _is_tied(group):
                    raise ValueError(
                        f"gradient_posterior needs tied betas > 0 and no gamma, got {group['betas']} and "
                        f"{group['gamma']}; make the optimizer with betas=(0.95, 0.95)"
                    )
                state = self.state[parameter]
                weight = unbias(beta1, state["step"].clamp(min=1)).to(state["momentum"].dtype)
                scale = (1 + beta1) / (2 * beta1)
                held = weight * state.get("kept", torch.ones_like(weight))
                return Posterior(state["momentum"] / weight, scale * state["variance"] / held)
        raise ValueError(
            f"gradient_posterior needs a parameter of this optimizer, got one of shape "
            f"{tuple(parameter.shape)}; pass e.g. layer.S"
        )

    @torch.no_grad()
    def signal_to_noise(self) -> Tensor:
        """|mean|²/variance of the gradients, summed over all parameters with tied betas; 0 if there is nothing to sum.

        Shapes: -> ().
        """
        signal, noise = [torch.zeros(())], [torch.zeros(())]
        tied = (p for group in self.param_groups if _is_tied(group) for p in group["params"])
        for parameter in tied:
            mean, variance = self.gradient_posterior(parameter)
            signal.append(mean.square().sum().float().cpu())
            noise.append((variance.sum() * (mean.numel() / variance.numel())).float().cpu())
        total = torch.stack(noise).sum()
        return torch.where(total > 0, torch.stack(signal).sum() / total, 0.0)


def _is_tied(group: dict[str, Any]) -> bool:
    beta1, beta2 = group["betas"]
    return beta1 == beta2 and beta1 > 0 and group["gamma"] is None
