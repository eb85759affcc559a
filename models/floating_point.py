"""Momentum in float64, for reversible mode without fixed point: undoing a step multiplies errors by 1/γ.

So the state is kept every so many steps that an error stays below a tolerance, and compared there with what the way
back has found.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-10  # of a state that has been undone, relative to the largest entry
EPS = torch.finfo(torch.float64).eps


class FloatState(NamedTuple):
    """Position and velocity."""

    x: Tensor  # float64
    v: Tensor  # float64
    largest: (
        Tensor  # of the entries met on the way back through a segment, which errors are relative to
    )


class Segments(NamedTuple):
    """The arithmetic of steps of γ, with a state kept at the start of each segment."""

    gamma: float
    length: int  # steps in a segment

    @property
    def decay(self) -> float:
        return self.gamma

    @property
    def share(self) -> float:
        return 1 - self.gamma

    def start(self, x: Tensor, v: Tensor) -> FloatState:
        x, v = x.detach().double(), v.detach().double()
        return FloatState(x, v, x.new_zeros(()))

    def real(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype)

    def push(self, f: Tensor) -> Tensor:
        return f.detach().double() * self.share

    def keep(self, state: FloatState, index: int) -> tuple[FloatState, FloatState | None]:
        """The state before step `index`, and what is kept of it."""
        return state, state if index % self.length == 0 else None

    def advance(self, state: FloatState, push: Tensor) -> FloatState:
        v = self.gamma * state.v + push
        return state._replace(x=state.x + v, v=v)

    def position_before(self, state: FloatState) -> Tensor:
        return state.x - state.v

    def retreat(self, state: FloatState, push: Tensor) -> FloatState:
        largest = torch.stack([state.largest, state.x.abs().max(), state.v.abs().max()]).max()
        return FloatState(self.position_before(state), (state.v - push) / self.gamma, largest)

    def resume(self, state: FloatState, index: int, kept: list) -> tuple[FloatState, Tensor | None]:
        """The state before step `index`, from what was kept where something was, and whether both agree."""
        if index % self.length:
            return state, None
        exact = kept.pop()
        error = torch.maximum((state.x - exact.x).abs().max(), (state.v - exact.v).abs().max())
        # Errors of f, which is computed from a position with the error of the state, add up.
        return exact, error <= 1e4 * TOLERANCE * state.largest

    def mark(self, push: Tensor) -> Tensor | None:
        """What tells that a push is the same when computed again; here the states do."""
        return None

    def fine(self, value: Tensor) -> Tensor:
        return value.isfinite().all()

    def fits(self, state: FloatState) -> Tensor:
        return state.x.isfinite().all()


def floating_point(gamma: float) -> Segments:
    """The arithmetic of γ, in segments so long that ε γ^(−length) stays below the tolerance.

    >>> [floating_point(gamma).length for gamma in (0.5, 0.9, 0.99)]
    [18, 123, 1295]
    """
    return Segments(gamma, max(1, int(math.log(TOLERANCE / EPS) / math.log(1 / gamma))))
