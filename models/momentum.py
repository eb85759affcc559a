"""Residual blocks with momentum: v ← γ v + (1−γ) f(x), x ← x + v; γ = 0 is the plain residual network."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_geo.models import fixed_point, reversible

Mode = Literal["backprop", "reversible"]


class MomentumStack(nn.Module):
    """The blocks f in sequence, each a step of the momentum residual network; v starts at zero.

    `mode="reversible"` keeps the last state instead of every activation, computes in fixed point of 2⁻³² with γ
    rounded to 2⁻¹⁶, and undoes the steps in backward: memory is constant in depth but for the log2(1/γ) bits that a
    step loses, 8 bytes an entry every 47 of them. `exact=True` gives backprop mode the same arithmetic.
    Extra arguments of a call go to every block; a tensor among them gets gradients. Blocks may repeat.

    Shapes: x (...), kept by every block.
    Raises: ValueError for a γ outside [0, 1), γ = 0 in reversible mode, a block that changes the shape, and in
        exact arithmetic for values that are not finite or reach 2²⁹; RuntimeError for a block that computes
        other bits in backward.
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
        self.gamma, self.mode = check_gamma(gamma), mode
        if mode not in ("backprop", "reversible"):
            raise ValueError(
                f'MomentumStack needs mode "backprop" or "reversible", got {mode!r}; use one of them'
            )
        self.exact = mode == "reversible" if exact is None else exact
        if mode == "reversible" and not self.exact:
            raise ValueError(
                "MomentumStack needs exact arithmetic in reversible mode, got exact=False, whose inversion "
                "loses all digits with depth; leave exact out"
            )
        self._n = fixed_point.numerator(gamma) if self.exact else 0
        self.blocks = nn.ModuleList(blocks)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, mode={self.mode!r}, exact={self.exact}"

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        return self.flow(x, torch.zeros_like(x), *arguments)[0]

    def flow(self, x: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Position and velocity after the blocks, from those before."""
        if self.mode == "reversible":
            return self._reversible(x, v, arguments)
        if self.exact:
            return self._exact(x, v, arguments)
        for block in self.blocks:
            f = reversible.output(block, x, arguments)
            v = self.gamma * v + (1 - self.gamma) * f.to(x.dtype)
            x = x + v
        return x, v

    def _exact(self, x: Tensor, v: Tensor, arguments: tuple) -> tuple[Tensor, Tensor]:
        dtype, fine = x.dtype, fixed_point.representable(x) & fixed_point.representable(v)
        state = fixed_point.start(x, v)
        share = 1 - self._n / fixed_point.DENOMINATOR
        for index, block in enumerate(self.blocks):
            x = Rounded.apply(x, fixed_point.real(state.x, dtype))
            f = reversible.output(block, x, arguments)
            push = fixed_point.quantise(f.detach().double() * share)
            state, _ = fixed_point.renew(state, index, self._n)
            state = fixed_point.advance(state, push, self._n)
            fine = fine & fixed_point.representable(f) & fixed_point.fits(state)
            v = (1 - share) * v + share * f.to(dtype)
            x = x + v
        if not fine:
            reversible.refuse_values()
        return tuple(
            Rounded.apply(y, fixed_point.real(z, dtype))
            for y, z in zip((x, v), state, strict=False)
        )

    def _reversible(self, x: Tensor, v: Tensor, arguments: tuple) -> tuple[Tensor, Tensor]:
        places = tuple(i for i, a in enumerate(arguments) if isinstance(a, Tensor))
        constants = tuple(None if isinstance(a, Tensor) else a for a in arguments)
        parameters = tuple(self.blocks.parameters())
        call = reversible.Call(tuple(self.blocks), self._n, constants, places, parameters)
        extra = (arguments[place] for place in places)
        return reversible.Reversible.apply(call, x, v, *extra, *parameters)


class Rounded(torch.autograd.Function):
    """The second tensor, with the gradient of the first, whose rounded value it is."""

    @staticmethod
    def forward(ctx: Any, ideal: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def check_gamma(gamma: float) -> float:
    """γ.

    Raises: ValueError outside [0, 1).
    """
    if not 0.0 <= gamma < 1.0:
        raise ValueError(f"MomentumStack needs 0 <= gamma < 1, got {gamma}; 0.9 is usual")
    return gamma
