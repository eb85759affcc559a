"""Residual blocks with momentum: v ← γ v + (1−γ) f(x), x ← x + v; γ = 0 is the plain residual network."""

from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_geo.models.fixed_point import FixedPoint, fixed_point
from lowrank_geo.models.floating_point import floating_point
from lowrank_geo.models.recompute import Inputs, block_dtype, output, take_apart
from lowrank_geo.models.reversible import Call, Reversible, refuse_values, way_there

Mode = Literal["backprop", "reversible"]


class MomentumStack(nn.Module):
    """The blocks f in sequence, each a step of the momentum residual network; v starts at zero.

    `mode="reversible"` keeps the last state instead of every activation and undoes the steps in backward. By
    default it computes in fixed point of 2⁻³² with a decay rounded to 2⁻¹⁶, bit for bit: memory is constant in
    depth but for the log2(1/γ) bits that a step loses, 8 bytes an entry every 47 of them. With `exact=False` it
    computes in float64, for any values and any γ > 0, and keeps 16 bytes an entry every 19 of them, with blocks in
    float32 every 8.
    Both add 5 kB for a block that draws random numbers. `exact=True` gives backprop mode the fixed point, too.
    Extra arguments of a call go to every block; tensors among them get gradients. Blocks may repeat.

    Shapes: x (...), kept by every block.
    Raises: ValueError for a γ outside [0, 1), γ = 0 in reversible mode, a block that changes the shape, values that
        are not finite or reach 2²⁹ in exact arithmetic; TypeError for x that is not real, a γ that is no number, or
        blocks that are no modules; RuntimeError for a block
        that computes other values in backward, or reads a tensor whose gradient would be lost.
    Source: Sander, Ablin, Blondel and Peyré, arXiv 2102.07870; Biswas et al., arXiv 2408.05692.

    >>> stack = MomentumStack([nn.Linear(4, 4) for _ in range(3)], gamma=0.9, mode="reversible")
    >>> stack(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        gamma: float = 0.9,
        *,
        mode: Mode = "backprop",
        exact: bool | None = None,
    ) -> None:
        super().__init__()
        self.gamma, self.mode = check_gamma(gamma, mode), mode
        self.exact = mode == "reversible" if exact is None else exact
        self._arithmetic = fixed_point(gamma) if self.exact else None
        self.blocks = nn.ModuleList(check_blocks(blocks))

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, mode={self.mode!r}, exact={self.exact}"

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return self.flow(x, torch.zeros_like(x), *arguments, **keywords)[0]

    def flow(self, x: Tensor, v: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """Position and velocity after the blocks, from those before."""
        if not x.is_floating_point():
            raise TypeError(
                f"MomentumStack needs real floating-point x, got {x.dtype}; embed or convert it first"
            )
        inputs = arguments, keywords
        if self.mode == "reversible":
            return self._reversible(x, v, inputs)
        if self._arithmetic is not None:
            return self._exact(x, v, inputs, self._arithmetic)
        for block in self.blocks:
            f = output(block, x, inputs)
            v = self.gamma * v + (1 - self.gamma) * f.to(x.dtype)
            x = x + v
        return x, v

    def _exact(
        self, x: Tensor, v: Tensor, inputs: Inputs, arithmetic: FixedPoint
    ) -> tuple[Tensor, Tensor]:
        dtype, fine = x.dtype, arithmetic.fine(x) & arithmetic.fine(v)
        state = arithmetic.start(x, v)
        for index, block in enumerate(self.blocks):
            x = Rounded.apply(x, arithmetic.real(state.x, dtype))
            f = output(block, x, inputs)
            state, _ = arithmetic.keep(state, index)
            state = arithmetic.advance(state, arithmetic.push(f))
            fine = fine & arithmetic.fine(f) & arithmetic.fits(state)
            v = arithmetic.decay * v + arithmetic.share * f.to(dtype)
            x = x + v
        refuse_values(fine, exact=True)
        new_x, new_v = (arithmetic.real(y, dtype) for y in (state.x, state.v))
        return Rounded.apply(x, new_x), Rounded.apply(v, new_v)

    @torch.compiler.disable(reason="the way back recomputes in eager mode")
    def _reversible(self, x: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        arithmetic = self._arithmetic or floating_point(self.gamma, block_dtype(x))
        template, extra = take_apart(inputs)
        parameters = tuple(self.blocks.parameters())
        call = Call(tuple(self.blocks), arithmetic, template, parameters)
        if torch.is_grad_enabled():
            return Reversible.apply(call, x, v, *extra, *parameters)
        end = way_there(call, x, v, inputs, None)
        return arithmetic.real(end.x, x.dtype), arithmetic.real(end.v, x.dtype)


class Rounded(torch.autograd.Function):
    """The second tensor, with the gradient of the first, whose rounded value it is."""

    @staticmethod
    def forward(ctx: Any, ideal: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def check_gamma(gamma: float, mode: str) -> float:
    """γ.

    Raises: ValueError outside [0, 1), for γ = 0 in reversible mode, and for an unknown mode; TypeError for no number.
    """
    if mode not in ("backprop", "reversible"):
        raise ValueError(
            f'MomentumStack needs mode "backprop" or "reversible", got {mode!r}; use one of them'
        )
    if isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"MomentumStack needs a number as gamma, got {gamma!r}; 0.9 is usual")
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"MomentumStack needs 0 <= gamma < 1, got {gamma}; 0.9 is usual")
    if gamma == 0.0 and mode == "reversible":
        raise ValueError(
            "MomentumStack needs gamma > 0 in reversible mode, got 0.0, whose steps cannot be undone; "
            'use mode="backprop"'
        )
    return float(gamma)


def check_blocks(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks.

    Raises: TypeError unless they are modules in a list, Sequential or other iterable.
    """
    if not isinstance(blocks, Iterable):
        raise TypeError(
            f"MomentumStack needs a list of blocks, got {type(blocks).__name__}; put the block into one"
        )
    found = list(blocks)
    for block in found:
        if not isinstance(block, nn.Module):
            raise TypeError(
                f"MomentumStack needs blocks that are modules, got {type(block).__name__}; wrap it in an nn.Module"
            )
    return found
