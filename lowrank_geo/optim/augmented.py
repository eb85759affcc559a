"""Optimizers that adapt the rank: dynamical low-rank training as published, in an ordinary training loop."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowrank_geo.optim.augmented_base import AugmentedOptimizer
from lowrank_geo.optim.checks import check_betas
from lowrank_geo.optim.core_rules import CoreAdam, CoreHeavyBall, CoreRule, Second
from lowrank_geo.optim.directions import Identity
from lowrank_geo.optim.filters import QHM, HeavyBall
from lowrank_geo.optim.metrics import metric_named
from lowrank_geo.optim.step import Rule
from lowrank_geo.optim.variance import Variance


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
        are right for uncorrelated entries.
    Units: at lr 1 entries of S move by about 1 a step; without `age`, those just augmented by (1−β₁)/√(1−β₂) = 3.2.
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
