"""Momentum as a filter of the gradients: m ← u m + v g, and the direction starts from a g + b m."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_geo.optim.values import check_count, check_number


class Coefficients(NamedTuple):
    """m ← u·m + v·g; output a·g + b·m with the new m. Numbers, or tensors (L,): one for each of a batch."""

    u: float | Tensor
    v: float | Tensor
    a: float | Tensor
    b: float | Tensor


class Filter(Protocol):
    """A momentum rule: its coefficients at step t = 1, 2, …"""

    def coefficients(self, step: Tensor) -> Coefficients:
        """Shapes: step (L,), the count of each matrix of the batch."""
        ...


@dataclass(frozen=True)
class HeavyBall:
    """m ← β m + g, as torch.optim.SGD(momentum=β). β = 0 is no momentum.

    Raises: ValueError for β out of [0, 1).
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        check_decay("HeavyBall", "beta", self.beta)

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Nesterov:
    """m ← β m + g with output g + β m, as torch.optim.SGD(momentum=β, nesterov=True).

    Raises: ValueError for β out of [0, 1).
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        check_decay("Nesterov", "beta", self.beta)

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1.0, 1.0, self.beta)


@dataclass(frozen=True)
class EMA:
    """m ← β m + (1 − β) g; `unbiased` divides the output by 1 − βᵗ: the first moment of Adam.

    Raises: ValueError for β out of [0, 1).
    """

    beta: float = 0.95
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_decay("EMA", "beta", self.beta)

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1 - self.beta, 0.0, gathered(self, step))


@dataclass(frozen=True)
class NesterovEMA:
    """m ← β m + (1 − β) g with output (1 − β) g + β m, as torch.optim.Muon: QHM with ν = β.

    Raises: ValueError for β out of [0, 1).
    """

    beta: float = 0.95

    def __post_init__(self) -> None:
        check_decay("NesterovEMA", "beta", self.beta)

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1 - self.beta, 1 - self.beta, self.beta)


@dataclass(frozen=True)
class QHM:
    """m ← β m + (1 − β) g with output (1 − ν) g + ν m: quasi-hyperbolic momentum.

    ν = 0 is SGD, ν = 1 an EMA, ν = β Nesterov. With ν = β₁/β₂ and β = β₂ it is the filter of Lion(β₁, β₂).
    `unbiased` divides m by 1 − βᵗ, as QHAdam does.

    Raises: ValueError for β out of [0, 1) or a negative ν.
    Source: Ma & Yarats, ICLR 2019, arXiv 1810.06801, section 3.
    """

    nu: float = 0.7
    beta: float = 0.999
    unbiased: bool = False

    def __post_init__(self) -> None:
        check_decay("QHM", "beta", self.beta)
        check_number("QHM's nu", self.nu, 0.7)
        if not 0 <= self.nu < float("inf"):
            raise ValueError(f"QHM needs a finite nu >= 0, got {self.nu}; pass e.g. 0.7")

    def coefficients(self, step: Tensor) -> Coefficients:
        weight = self.nu * gathered(self, step)
        return Coefficients(self.beta, 1 - self.beta, 1 - self.nu, weight)


@dataclass(frozen=True)
class FSGDM:
    """m ← u(t) m + v g with u(t) = t/(t + c·total_steps), constant on each of `stages` stages.

    The filter goes from none to a low pass of gain v(1 + 1/c) along the run, the same for every length of it. Past
    total_steps, u stays at its last value.

    Raises: ValueError unless total_steps >= 1, c > 0, v > 0 and stages >= 1; TypeError for what is no number.
    Source: Li et al., ICLR 2025, arXiv 2411.19671, algorithm 1 (c = 0.033, v = 1, 300 stages).
    """

    total_steps: int = None  # type: ignore[assignment]  # so that leaving it out is refused with what to do
    c: float = 0.033
    v: float = 1.0
    stages: int = 300

    def __post_init__(self) -> None:
        if self.total_steps is None:
            raise TypeError("FSGDM needs total_steps, got None; pass the length of the run")
        for name, what in (("total_steps", "the length of the run"), ("stages", "e.g. 300")):
            check_count(f"FSGDM's {name}", getattr(self, name), 300)
            if not getattr(self, name) >= 1:
                raise ValueError(f"FSGDM needs {name} >= 1, got {getattr(self, name)}; pass {what}")
        for name in ("c", "v"):
            check_number(f"FSGDM's {name}", getattr(self, name), 0.033 if name == "c" else 1.0)
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"FSGDM needs {name} > 0, got {getattr(self, name)}; pass e.g. "
                    f"{0.033 if name == 'c' else 1.0}"
                )

    def pole(self, step: Tensor) -> Tensor:
        """u at steps t = 1, 2, …: u(⌊t/δ⌋δ) with stages of δ steps, at least one.

        Shapes: (L,) -> (L,).
        """
        length = self.total_steps / min(self.stages, self.total_steps)
        # The small addition keeps a step that ends a stage exactly from falling back into it by rounding.
        passed = torch.floor(step.double() / length + 1e-9) * length
        t = passed.clamp(max=float(self.total_steps))
        return t / (t + self.c * self.total_steps)

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.pole(step), self.v, 0.0, 1.0)


def unbias(beta: float, step: Tensor) -> Tensor:
    """1 − βᵗ, the weight an average that started from zero has gathered after t steps.

    In float64: in float32 the difference has lost four digits at β = 0.999, t = 1.
    """
    return 1 - beta ** step.double()


def gathered(rule: "EMA | QHM", step: Tensor) -> float | Tensor:
    """1, or for unbiased filters 1/(1 − βᵗ).

    Shapes: (L,) -> (L,).
    """
    return 1 / unbias(rule.beta, step) if rule.unbiased else 1.0


def check_decay(call: str, name: str, beta: float) -> None:
    """Raise ValueError or TypeError, naming `call`, unless a decay rate is in [0, 1)."""
    check_number(f"{call}'s {name}", beta, 0.95)
    if not 0 <= beta < 1:
        raise ValueError(f"{call} needs {name} in [0, 1), got {beta}; pass e.g. 0.95")
