"""A low-rank layer evaluated between two points: W_y = W + β (W₂ − W), as two branches of rank r.

The parameters get the gradient ∂L/∂W_y as it is, projected to the tangent space at W and not shortened by 1 − β; inputs
get the true one; and β gets ⟨∂L/∂W_y, W₂ − W⟩.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_geo.geometry import Point
from lowrank_geo.gradients import Gradient

Product = Callable[[Tensor, Point, Gradient], Tensor]


class Branch(NamedTuple):
    """The second point of a layer."""

    point: Point  # W₂, no gradients
    weight: Tensor  # β, (); if it requires a gradient it gets ⟨∂L/∂W_y, W₂ − W⟩


def branched(
    product: Product, x: Tensor, point: Point, gradient: Gradient, second: Branch
) -> Tensor:
    """(1 − β) x Wᵀ + β x W₂ᵀ, for any `product` that is linear in x and in the matrix.

    Shapes: as `product`.
    """
    near = product(_Damped.apply(x, second.weight), point, gradient)
    far = product(x, second.point, "factors")
    return _Between.apply(near, far, second.weight)


class _Damped(torch.autograd.Function):
    """x itself, whose gradient is multiplied by 1 − β.

    Shapes: x (...), β () -> (...).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(beta)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (beta,) = ctx.saved_tensors
        return g * (1 - beta).to(g.dtype), None


class _Between(torch.autograd.Function):
    """a + β (b − a) with the gradients g to a, not (1 − β) g, β g to b and ⟨g, b − a⟩ to β.

    `_Damped` makes up for the first on the way to the inputs.

    Shapes: a, b (...), β () -> (...).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, beta: Tensor) -> Tensor:
        difference = b - a
        ctx.save_for_backward(beta, difference if ctx.needs_input_grad[2] else None)
        return a + beta.to(a.dtype) * difference

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        beta, difference = ctx.saved_tensors
        towards = None
        if difference is not None:
            towards = (g.to(beta.dtype) * difference.to(beta.dtype)).sum()
        return g, g * beta.to(g.dtype), towards
