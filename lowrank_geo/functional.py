"""y = x (U S Vᵀ)ᵀ + bias, with one of two meanings of the gradients of U, S, V.

`factors`: the ordinary partial derivatives, by autograd. `tangent`: the coordinates (Up, M, Vp)
of the Riemannian gradient P_T(∂L/∂W), from x and a = x V alone; S is never inverted. With G =
∂L/∂W (never formed) and b = (∂L/∂y) U:

    G V = (∂L/∂y)ᵀ a      Gᵀ U = xᵀ b      M = UᵀG V = bᵀ a      ∂L/∂x = (b S) Vᵀ
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

Gradient = Literal["factors", "tangent"]
GRADIENTS: tuple[Gradient, ...] = ("factors", "tangent")


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
    Raises: ValueError if the last dimension of x is not n, or for an unknown `gradient`.
    """
    if x.shape[-1] != V.shape[0]:
        raise ValueError(
            f"lowrank_linear needs x with last dimension {V.shape[0]}, got {tuple(x.shape)}; "
            "check the input features of the layer"
        )
    if gradient not in GRADIENTS:
        raise ValueError(
            f"lowrank_linear needs gradient 'factors' or 'tangent', got {gradient!r}; use one of them"
        )
    x = autocast(x)
    if gradient == "tangent":
        refuse_forward_derivatives("lowrank_linear", x, U, S, V)
        y = tangent_linear(x.reshape(-1, x.shape[-1]), U, S, V)[0]
        y = y.reshape(*x.shape[:-1], U.shape[0])
        return y if bias is None else y + bias.to(y.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    left, right = fold(x.numel() // max(x.shape[-1], 1), U.to(x.dtype), S.to(x.dtype))
    a = x @ V.to(x.dtype)
    return F.linear(a if right is None else a @ right, left, bias)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast would give a linear layer: float64 is left alone.

    Shapes: (...) -> (...).
    """
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def refuse_forward_derivatives(call: str, *inputs: Tensor) -> None:
    """Raise RuntimeError, naming `call`, if an input carries a forward-mode tangent: the operator would drop it."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            f"{call} needs gradient='factors' for forward derivatives, got 'tangent'; "
            "set layer.gradient = 'factors' before the forward pass"
        )


def fold(tokens: int, U: Tensor, S: Tensor) -> tuple[Tensor, Tensor | None]:
    """The cheaper association of a Sᵀ Uᵀ: (U S, None) for many tokens, (U, Sᵀ) for few.

    Shapes: U (m, r), S (r, r) -> left (m, r), right (r, r) or None.
    """
    return (U @ S, None) if tokens >= U.shape[0] else (U, S.mT)


@torch.library.custom_op("lowrank_geo::tangent_linear", mutates_args=())
def tangent_linear(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """y = x V Sᵀ Uᵀ and a = x V, the only activation kept besides x.

    Shapes: x (B, n), U (m, r), S (r, r), V (n, r) -> y (B, m), a (B, r).
    """
    U, S, V = U.to(x.dtype), S.to(x.dtype), V.to(x.dtype)
    a = x @ V
    left, right = fold(x.shape[0], U, S)
    return (a if right is None else a @ right) @ left.mT, a


@tangent_linear.register_fake
def _(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], U.shape[0]), x.new_empty(x.shape[0], V.shape[1])


@torch.library.custom_op("lowrank_geo::tangent_linear_backward", mutates_args=())
def tangent_linear_backward(
    g: Tensor, x: Tensor, a: Tensor, U: Tensor, S: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂L/∂x and the tangent coordinates of the Riemannian gradient, gauged in the dtype of U.

    Shapes: g = ∂L/∂y (B, m), x (B, n), a = x V (B, r) -> dx (B, n), Up (m, r), M (r, r), Vp (n, r).
    """
    low = (U.to(g.dtype), S.to(g.dtype), V.to(g.dtype))
    b = g @ low[0]  # (B, r)
    left, right = fold(g.shape[0], low[2], low[1].mT)
    dx = (b if right is None else b @ right) @ left.mT
    GV, GtU = (g.mT @ a).to(U.dtype), (x.mT @ b).to(U.dtype)
    # In low precision bᵀa is not UᵀGV to the rounding of U, and the gauge would leak.
    M = U.mT @ GV
    Vp = GtU - V @ (V.mT @ GtU if g.dtype != U.dtype else M.mT)
    # The products may come back transposed; the fake kernel, and so torch.compile, counts on rows.
    return dx.contiguous(), (GV - U @ M).contiguous(), M.contiguous(), Vp.contiguous()


@tangent_linear_backward.register_fake
def _(
    g: Tensor, x: Tensor, a: Tensor, U: Tensor, S: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), U.new_empty(U.shape), S.new_empty(S.shape), V.new_empty(V.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, U, S, V = inputs
    _, a = output
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(True)
    ctx.save_for_backward(x, a, U, S, V)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple:
    x, a, U, S, V = ctx.saved_tensors
    return tangent_linear_backward(g, x, a, U, S, V)


def refuse_double_backward(call: str, ctx: Any, *_: Tensor) -> tuple:
    """Raise RuntimeError, naming `call`: the backward of a tangent backward."""
    raise RuntimeError(
        f"{call} needs gradient='factors' for second derivatives, got 'tangent'; "
        "set layer.gradient = 'factors' before the forward pass"
    )


tangent_linear.register_autograd(_backward, setup_context=_save)
tangent_linear_backward.register_autograd(partial(refuse_double_backward, "lowrank_linear"))
