"""Momentum in float64, for reversible mode without fixed point: undoing a step multiplies errors by 1/γ.

So the state is kept every so many steps that an error stays below a tolerance, and compared there with what the way
back has found.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SPENT = 3 / 8  # of the bits of the blocks' dtype, which a segment may lose


class FloatState(NamedTuple):
    """Position and velocity."""

    x: Tensor  # float64
    v: Tensor  # float64


class Segments(NamedTuple):
    """The arithmetic of steps of γ, with a state kept at the start of each segment."""

    gamma: float
    length: int  # steps in a segment
    tolerance: float  # of a state that has been undone, relative to the largest entry

    @property
    def decay(self) -> float:
        return self.gamma

    @property
    def share(self) -> float:
        return 1 - self.gamma

    def start(self, x: Tensor, v: Tensor) -> FloatState:
        return FloatState(x.detach().double(), v.detach().double())

    def real(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype)

    def push(self, f: Tensor) -> Tensor:
        return f.detach().double() * self.share

    def keep(self, state: FloatState, index: int) -> tuple[FloatState, FloatState | None]:
        """The state before step `index`, and what is kept of it."""
        return state, state if index % self.length == 0 else None

    def advance(self, state: FloatState, push: Tensor) -> FloatState:
        v = self.gamma * state.v + push
        return FloatState(state.x + v, v)

    def position_before(self, state: FloatState) -> Tensor:
        return state.x - state.v

    def retreat(self, state: FloatState, push: Tensor) -> FloatState:
        return FloatState(self.position_before(state), (state.v - push) / self.gamma)

    def largest(self, state: FloatState) -> Tensor:
        """The largest entry, which errors are relative to."""
        return largest_entry(*state)

    def mark(self, push: Tensor) -> Tensor | None:
        """What tells that a push is the same when computed again; here the states do."""
        return None

    def fine(self, value: Tensor) -> Tensor:
        return value.isfinite().all()

    def fits(self, state: FloatState) -> Tensor:
        return state.x.isfinite().all()


def largest_entry(*tensors: Tensor) -> Tensor:
    return torch.stack([t.abs().max() if t.numel() else t.new_zeros(()) for t in tensors]).max()


def agree(a: FloatState, b: FloatState, error: Tensor) -> Tensor:
    """Whether two states differ by at most `error` in any entry."""
    return largest_entry(a.x - b.x, a.v - b.v) <= error


def floating_point(gamma: float, dtype: torch.dtype) -> Segments:
    """The arithmetic of γ and of blocks that compute in `dtype`, with as many steps a segment as lose 3/8 of its bits.

    A position that is undone with an error far below ε may still be rounded to the neighbour of what the block got on
    the way there: an error starts with the ε of the blocks, and ends as ε γ^(−length) <= ε^(5/8), the tolerance.

    >>> [floating_point(gamma, torch.float64).length for gamma in (0.5, 0.9, 0.99)]
    [19, 128, 1344]
    >>> [floating_point(gamma, torch.float32).length for gamma in (0.5, 0.9, 0.99)]
    [8, 56, 594]
    """
    eps = torch.finfo(dtype).eps
    length = SPENT * math.log(1 / eps) / math.log(1 / gamma)
    return Segments(gamma, max(1, int(length)), eps ** (1 - SPENT))
