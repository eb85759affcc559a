"""Schedules of α, β and ν along a run: do the theorems of QHM cover them; and the filter that runs them.

Source: Gitman, Lang, Zhang & Xiao, NeurIPS 2019, arXiv 1910.13962, theorems 1 and 2; the conditions are restated from
summaries, to be checked against the paper before they are quoted.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from lowrank_geo.analysis.checks import check_positive
from lowrank_geo.optim.filters import Coefficients, check_decay


@dataclass(frozen=True)
class PowerSchedule:
    """α_k = alpha k^−w, 1 − β_k = (1 − beta) k^−c or β_k = beta k^−d, 1 − ν_k = (1 − nu) k^−e, at k = 1, 2, …

    It is a momentum filter, for `RiemannianSGD(filter=…)`; α_k is for the caller to set, as `rate`. Exponents of 0 are
    constants. c and d exclude each other: β goes to 1 or to 0.

    Raises: ValueError for β out of [0, 1), ν out of [0, 1], α ≤ 0, a negative exponent, or both c and d.
    """

    alpha: float = 0.1
    w: float = 0.0
    beta: float = 0.9
    c: float = 0.0
    d: float = 0.0
    nu: float = 1.0
    e: float = 0.0

    def __post_init__(self) -> None:
        check_decay("PowerSchedule", "beta", self.beta)
        if not 0 <= self.nu <= 1:
            raise ValueError(f"PowerSchedule needs nu in [0, 1], got {self.nu}; pass e.g. 0.7")
        check_positive("PowerSchedule", "alpha", self.alpha)
        for name in ("w", "c", "d", "e"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"PowerSchedule needs {name} >= 0, got {getattr(self, name)}; pass e.g. 0.6"
                )
        if self.c and self.d:
            raise ValueError(
                f"PowerSchedule needs c or d to be 0, got {self.c} and {self.d}; β goes to 1 or to 0"
            )

    def rate(self, step: int) -> float:
        """α_k."""
        return self.alpha * step**-self.w

    def coefficients(self, step: Tensor) -> Coefficients:
        k = step.double()
        beta = 1 - (1 - self.beta) * k**-self.c if self.c else self.beta * k**-self.d
        nu = 1 - (1 - self.nu) * k**-self.e
        return Coefficients(beta, 1 - beta, 1 - nu, nu)


def first_theorem(schedule: PowerSchedule) -> list[str]:
    """Which conditions of theorem 1 fail: Σα = ∞, Σα² < ∞, β → 0. None: lim inf |∇L| = 0 almost surely.

    Shapes: a schedule -> a sentence for each condition that fails.
    Units: none.
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, theorem 1.

    >>> first_theorem(PowerSchedule(w=0.75, d=0.5)), first_theorem(PowerSchedule(w=0.4, d=0.5))
    ([], ['Σα² < ∞ needs w > 1/2, got 0.4'])
    """
    failed = _steps(schedule)
    if schedule.w <= 0.5:
        failed.append(f"Σα² < ∞ needs w > 1/2, got {schedule.w}")
    if schedule.beta and not schedule.d:
        failed.append(f"β → 0 needs d > 0, got {schedule.d}")
    return failed


def second_theorem(schedule: PowerSchedule) -> list[str]:
    """Which conditions of theorem 2 fail, of momentum that grows: Σα = ∞, Σ(1 − β)² < ∞, Σα²/(1 − β) < ∞, ν → 1.

    For powers: ½ < c, (1 + c)/2 < w ≤ 1. They leave nothing for c ≥ 1.

    Shapes: a schedule -> a sentence for each condition that fails.
    Units: none.
    Source: Gitman et al., NeurIPS 2019, arXiv 1910.13962, theorem 2.

    >>> second_theorem(PowerSchedule(w=0.9, c=0.6)), second_theorem(PowerSchedule(w=0.9, c=0.4))
    ([], ['Σ(1 − β)² < ∞ needs c > 1/2, got 0.4'])
    """
    failed = _steps(schedule)
    if schedule.c <= 0.5:
        failed.append(f"Σ(1 − β)² < ∞ needs c > 1/2, got {schedule.c}")
    if 2 * schedule.w - schedule.c <= 1:
        failed.append(
            f"Σα²/(1 − β) < ∞ needs w > (1 + c)/2 = {(1 + schedule.c) / 2:g}, got {schedule.w}"
        )
    if schedule.nu < 1 and not schedule.e:
        failed.append(f"ν → 1 needs e > 0 or nu = 1, got nu = {schedule.nu}")
    return failed


def _steps(schedule: PowerSchedule) -> list[str]:
    return [] if schedule.w <= 1 else [f"Σα = ∞ needs w <= 1, got {schedule.w}"]
