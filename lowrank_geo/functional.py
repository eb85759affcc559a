"""y = x (U S Vᵀ)ᵀ + bias, with one of two meanings of the gradients of U, S, V.

`factors`: the ordinary partial derivatives, by autograd. `tangent`: the coordinates (Up, M, Vp)
of the Riemannian gradient P_T(∂L/∂W), from x and a = x V alone; S is never inverted. With G =
∂L/∂W (never formed) and b = (∂L/∂y) U:

    G V = (∂L/∂y)ᵀ a      Gᵀ U = xᵀ b      M = UᵀG V = bᵀ a      ∂L/∂x = (b S) Vᵀ
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_geo import dispatch, reference
from lowrank_geo.gradients import (
    GRADIENTS,
    Gradient,
    autocast,
    keep,
    no_autocast,
    once,
    refuse_forward_derivatives,
)
from lowrank_geo.reference import fold


def lowrank_linear(
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None = None,
    *,
    gradient: Gradient = "factors",
) -> Tensor:
    """x Wᵀ + bias with W = U S Vᵀ, in the dtype of x (or of autocast); W is never formed.

    Shapes: x (..., n), U (m, r), S (r, r), V (n, r), bias (m) -> (..., m).
    Raises: ValueError if shapes do not fit together, for tensors on several devices, or an unknown `gradient`;
        TypeError for an x of integers.
    """
    check_operands(x, U, S, V, bias)
    if gradient not in GRADIENTS:
        raise ValueError(
            f"lowrank_linear needs gradient 'factors' or 'tangent', got {gradient!r}; use one of them"
        )
    x = autocast(x)
    if gradient == "tangent":
        refuse_forward_derivatives("lowrank_linear", x, U, S, V)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        kernel = dispatch.layer_kernel(rows, U, S, V, bias)
        if kernel is not None:
            return kernel(rows, U, S, V, bias)[0].reshape(*x.shape[:-1], U.shape[0])
        y, _ = TangentLinear.apply(rows, U, S, V)
        y = y if x.dim() == 2 else y.reshape(*x.shape[:-1], U.shape[0])
        return y if bias is None else y + bias.to(y.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    left, right = fold(x.numel() // max(x.shape[-1], 1), U.to(x.dtype), S.to(x.dtype))
    a = x @ V.to(x.dtype)
    return F.linear(a if right is None else a @ right, left, bias)


def check_operands(x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError or TypeError unless x fits to the factors of one layer.

    Shapes: as `lowrank_linear`.
    """
    if x.shape[-1:] != V.shape[:1]:
        raise ValueError(
            f"lowrank_linear needs x with last dimension {V.shape[0]}, got {tuple(x.shape)}; "
            "check the input features of the layer"
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"lowrank_linear needs an x of floating point, got {x.dtype}; convert it with x.float()"
        )
    (m, r), n = U.shape, V.shape[0]
    given = [z for z in (U, S, V, bias) if z is not None]
    if [z.shape for z in given] != [(m, r), (r, r), (n, r), (m,)][: len(given)]:
        raise ValueError(
            f"lowrank_linear needs U (m, r), S (r, r), V (n, r) and bias (m), got "
            f"{[tuple(z.shape) for z in given]}; pass the factors of one layer"
        )
    if any(z.device != x.device for z in given):
        raise ValueError(
            f"lowrank_linear needs x and the factors on one device, got {x.device} and "
            f"{', '.join(sorted({str(z.device) for z in given}))}; move one of them with .to()"
        )


def add_lowrank_linear(
    y: Tensor,
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    *,
    scale: float = 1.0,
    gradient: Gradient = "factors",
) -> Tensor:
    """y + scale · x Wᵀ with W = U S Vᵀ, in the dtype of y; the product is added as it is made, where torch can.

    Shapes: y (..., m), x (..., n), U (m, r), S (r, r), V (n, r) -> (..., m).
    Raises: as `lowrank_linear`.
    """
    cast = autocast(x)
    rows = cast.reshape(-1, x.shape[-1])
    onto = y.reshape(-1, y.shape[-1])
    alike = x.shape[-1] == V.shape[0] and onto.shape == (rows.shape[0], U.shape[0])
    if (
        gradient not in GRADIENTS
        or not alike
        or y.dtype != cast.dtype
        or onto.device != rows.device
    ):
        change = lowrank_linear(x, U, S, V, gradient=gradient)
        return y + (change if scale == 1 else scale * change).to(y.dtype)
    if gradient == "tangent":
        if dispatch.layer_kernel(rows, U, S, V, None) is not None:
            change = lowrank_linear(x, U, S, V, gradient=gradient)
            return y + (change if scale == 1 else scale * change)
        refuse_forward_derivatives("lowrank_linear", y, x, U, S, V)
        return AddTangentLinear.apply(onto, rows, U, S, V, scale)[0].reshape(y.shape)
    left, right = fold(rows.shape[0], U.to(cast.dtype), S.to(cast.dtype))
    a = rows @ V.to(cast.dtype)
    a = a if right is None else a @ right
    return torch.addmm(onto, a, left.mT, alpha=scale).reshape(y.shape)


class TangentLinear(torch.autograd.Function):
    """y = x V Sᵀ Uᵀ and a = x V, the only activation kept besides x; backward is its twin in `reference`.

    Shapes: x (B, n), U (m, r), S (r, r), V (n, r) -> y (B, m), a (B, r).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        return reference.lowrank_linear(x, U, S, V)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        keep(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple:
        if g is None:
            return (None,) * 4
        with no_autocast(g):
            x, U, S, V, a = ctx.saved_tensors
            with_x = ctx.needs_input_grad[0]
            grads = reference.lowrank_linear_backward(g, x, U, S, V, a, with_x)
        return once("lowrank_linear", grads)


class AddTangentLinear(torch.autograd.Function):
    """`TangentLinear`, times a number and added to y0.

    Shapes: y0 (B, m), x (B, n), U (m, r), S (r, r), V (n, r) -> y (B, m), a (B, r).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        y0: Tensor, x: Tensor, U: Tensor, S: Tensor, V: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return reference.add_lowrank_linear(y0, x, U, S, V, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.scale = inputs[-1]
        keep(ctx, inputs[1:], output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple:
        if g is None:
            return (None,) * 6
        with no_autocast(g):
            x, U, S, V, a = ctx.saved_tensors
            scaled = g if ctx.scale == 1 else ctx.scale * g
            with_x = ctx.needs_input_grad[1]
            grads = reference.lowrank_linear_backward(scaled, x, U, S, V, a, with_x)
        return g, *once("lowrank_linear", grads), None
