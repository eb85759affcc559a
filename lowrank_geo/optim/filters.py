"""Momentum as a filter of the gradients: m ← u m + v g, and the direction starts from a g + b m."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class Coefficients(NamedTuple):
    """m ← u·m + v·g; output a·g + b·m. Floats, or tensors that broadcast over the batch."""

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
    """m ← β m + g, as torch.optim.SGD(momentum=β). β = 0 is no momentum."""

    beta: float = 0.9

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Nesterov:
    """m ← β m + g with output g + β m, as torch.optim.SGD(momentum=β, nesterov=True)."""

    beta: float = 0.9

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1.0, 1.0, self.beta)


@dataclass(frozen=True)
class EMA:
    """m ← β m + (1 − β) g, the first moment of Adam."""

    beta: float = 0.95

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1 - self.beta, 0.0, 1.0)


@dataclass(frozen=True)
class NesterovEMA:
    """m ← β m + (1 − β) g with output (1 − β) g + β m, as torch.optim.Muon."""

    beta: float = 0.95

    def coefficients(self, step: Tensor) -> Coefficients:
        return Coefficients(self.beta, 1 - self.beta, 1 - self.beta, self.beta)
