"""Momentum in fixed point: x and v are integers in units of 2⁻³², so that a step can be undone bit for bit.

v ← γ v loses log2(1/γ) bits. They are pushed into a remainder, which the way back pops; a remainder that could
overflow is kept aside and an empty one begun.

Source: Maclaurin, Duvenaud and Adams, arXiv 1502.03492, section 3.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 2.0**-32
DENOMINATOR = 2**16  # γ is a fraction over it
LARGEST = 2**61  # of |x| and |v|: the sum of two still fits 63 bits


class State(NamedTuple):
    """Position and velocity in units of 2⁻³², and the bits that v has lost."""

    x: Tensor  # int64
    v: Tensor  # int64
    lost: Tensor  # int64, >= 0, below 2⁴⁷


class FixedPoint(NamedTuple):
    """The arithmetic of steps v ← (n / 2¹⁶) v + share f, x ← x + v."""

    n: int
    share: float  # 1 − γ, not rounded: close to γ = 1 the rounding of n would be a large part of it

    @property
    def decay(self) -> float:
        return self.n / DENOMINATOR

    def start(self, x: Tensor, v: Tensor) -> State:
        """The state of real positions and velocities, rounded."""
        x, v = quantise(x.detach()), quantise(v.detach())
        return State(x, v, torch.zeros_like(x))

    def real(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return (value.double() * UNIT).to(dtype)

    def push(self, f: Tensor) -> Tensor:
        """What f adds to v."""
        return quantise(f.detach().double() * self.share)

    def keep(self, state: State, index: int) -> tuple[State, Tensor | None]:
        """Before step `index`: an empty remainder where the old one, then returned too, could overflow."""
        if not self.begins_remainder(index):
            return state, None
        return state._replace(lost=torch.zeros_like(state.lost)), state.lost

    def begins_remainder(self, index: int) -> bool:
        return index > 0 and index % blocks_per_remainder(self.n) == 0

    def advance(self, state: State, push: Tensor) -> State:
        x, v, lost = state
        lost = (
            lost * DENOMINATOR + v % DENOMINATOR
        )  # floor division: 0 <= v % d < d, also for v < 0
        v = v.div(DENOMINATOR, rounding_mode="floor") * self.n + lost % self.n + push
        return State(x + v, v, lost.div(self.n, rounding_mode="floor"))

    def position_before(self, state: State) -> Tensor:
        """x before the step, known before `push` is."""
        return state.x - state.v

    def retreat(self, state: State, push: Tensor) -> State:
        """The state before `advance(·, push)`."""
        v = state.v - push
        lost = state.lost * self.n + v % self.n
        v = v.div(self.n, rounding_mode="floor") * DENOMINATOR + lost % DENOMINATOR
        return State(self.position_before(state), v, lost.div(DENOMINATOR, rounding_mode="floor"))

    def resume(self, state: State, index: int, kept: list) -> State:
        """The state before step `index`, with the remainder that was kept there."""
        if self.begins_remainder(index):
            state = state._replace(lost=kept.pop())
        return state

    def mark(self, push: Tensor) -> Tensor:
        """A sum modulo 2⁶⁴ with odd weights, which differs if one entry or the order does."""
        odd = 2 * torch.arange(push.numel(), device=push.device) + 1
        return (push.flatten() * odd).sum()

    def fine(self, value: Tensor) -> Tensor:
        """Whether all of a real tensor is finite and has a fixed-point form, as a 0-d bool tensor."""
        return (value.double().abs() < LARGEST * UNIT).all()

    def fits(self, state: State) -> Tensor:
        """Whether x and v are far enough from the ends of int64 for one more step, as a 0-d bool tensor."""
        return ((state.x.abs() < LARGEST) & (state.v.abs() < LARGEST)).all()


def fixed_point(gamma: float) -> FixedPoint:
    """The arithmetic of γ, in units of 2⁻¹⁶, rounded.

    Raises: ValueError for a γ that rounds to 0 or 1, where no step can be undone.

    >>> fixed_point(0.5).n
    32768
    """
    n = round(gamma * DENOMINATOR)
    if not 0 < n < DENOMINATOR:
        raise ValueError(
            f"MomentumStack needs gamma from 2**-16 to 1 - 2**-16 in exact arithmetic, got {gamma}; "
            "use exact=False"
        )
    return FixedPoint(n, 1 - gamma)


@cache
def blocks_per_remainder(n: int) -> int:
    """How many steps fit one remainder for any values of v; about 47 / log2(1/γ), less log2(1/(1-γ)) bits.

    >>> [blocks_per_remainder(fixed_point(gamma).n) for gamma in (0.5, 0.9, 0.99)]
    [47, 291, 2842]
    """
    largest = count = 0
    while (largest := ((largest + 1) * DENOMINATOR - 1) // n) < 2**47 and count < 10**6:
        count += 1
    return count


def quantise(value: Tensor) -> Tensor:
    """The nearest multiples of 2⁻³², as int64; wrong, and found by `fine` and `fits`, beyond ±2²⁹."""
    return (value.double() / UNIT).round().to(torch.int64)
