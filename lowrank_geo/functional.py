"""y = x (U S Vᵀ)ᵀ + bias, with one of two meanings of the gradients of U, S, V.

`factors`: the ordinary partial derivatives, by autograd. `tangent`: the coordinates (Up, M, Vp)
of the Riemannian gradient P_T(∂L/∂W), from x and a = x V alone; S is never inverted. With G =
∂L/∂W (never formed) and b = (∂L/∂y) U:

    G V = (∂L/∂y)ᵀ a      Gᵀ U = xᵀ b      M = UᵀG V = bᵀ a      ∂L/∂x = (b S) Vᵀ
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NoReturn

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
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y, _ = TangentLinear.apply(rows, U, S, V)
        y = y if x.dim() == 2 else y.reshape(*x.shape[:-1], U.shape[0])
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


def fold(tokens: int, U: Tensor, S: Tensor) -> tuple[Tensor, Tensor | None]:
    """The cheaper association of a Sᵀ Uᵀ: (U S, None) for many tokens, (U, Sᵀ) for few.

    Shapes: U (m, r), S (r, r) -> left (m, r), right (r, r) or None.
    """
    return (U @ S, None) if tokens >= U.shape[0] else (U, S.mT)


class TangentLinear(torch.autograd.Function):
    """y = x V Sᵀ Uᵀ and a = x V, the only activation kept besides x; backward is `tangent_gradients`.

    Shapes: x (B, n), U (m, r), S (r, r), V (n, r) -> y (B, m), a (B, r).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        U, S, V = U.to(x.dtype), S.to(x.dtype), V.to(x.dtype)
        a = x @ V
        left, right = fold(x.shape[0], U, S)
        return (a if right is None else a @ right) @ left.mT, a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        keep(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple:
        if g is None:
            return (None,) * 4
        with no_autocast(g):
            grads = tangent_gradients(g, *ctx.saved_tensors, with_x=ctx.needs_input_grad[0])
        return once("lowrank_linear", grads)


def tangent_gradients(
    g: Tensor, x: Tensor, U: Tensor, S: Tensor, V: Tensor, a: Tensor, *, with_x: bool = True
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """∂L/∂x, if asked for, and the tangent coordinates of the Riemannian gradient.

    Shapes: g = ∂L/∂y (B, m), x (B, n), U (m, r), S (r, r), V (n, r), a = x V (B, r) -> dx (B, n),
        Up (m, r), M (r, r), Vp (n, r).
    """
    dx = None
    b = g @ U.to(g.dtype)  # (B, r)
    if with_x:
        left, right = fold(g.shape[0], V.to(g.dtype), S.to(g.dtype).mT)
        dx = (b if right is None else b @ right) @ left.mT
    return dx, *coordinates(U, V, g.mT @ a, x.mT @ b)


def coordinates(U: Tensor, V: Tensor, GV: Tensor, GtU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Up, M, Vp) of P_T G from G V and GᵀU, gauged in the dtype of U and V.

    Shapes: U (m, r), V (n, r), GV (m, r), GtU (n, r) -> Up (m, r), M (r, r), Vp (n, r).
    """
    if GV.dtype != U.dtype:
        # Rounded products disagree on M, and each would leak into the gauge of the other.
        GV, GtU = GV.to(U.dtype), GtU.to(U.dtype)
        M, Mt = U.mT @ GV, V.mT @ GtU
    else:
        M = U.mT @ GV if U.shape[0] <= V.shape[0] else GtU.mT @ V
        Mt = M.mT
    return torch.addmm(GV, U, M, alpha=-1), M, torch.addmm(GtU, V, Mt, alpha=-1)


def keep(ctx: Any, inputs: tuple, a: Tensor) -> None:
    """Save the inputs (x, U, S, V, ...) and a = x V, which gets no gradient of its own."""
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], a)


def no_autocast(g: Tensor) -> AbstractContextManager:
    """A backward pass inside autocast would round the gauge to its dtype."""
    if torch.is_autocast_enabled(g.device.type):
        return torch.autocast(g.device.type, enabled=False)
    return nullcontext()


class Once(torch.autograd.Function):
    """The gradients themselves; their backward refuses, in the name of `call`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse(ctx.call, "second")


def once(call: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that cannot be differentiated again."""
    if not torch.is_grad_enabled():
        return gradients
    dx, *rest = gradients
    if dx is None:
        return None, *Once.apply(call, *rest)
    return Once.apply(call, dx, *rest)


def refuse_forward_derivatives(call: str, *inputs: Tensor) -> None:
    """`refuse` if an input carries a forward-mode tangent. Not as the `jvp` of the Function: torch.compile breaks the
    graph at one that has it.
    """
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        refuse(call, "forward")


def refuse(call: str, which: str) -> NoReturn:
    """Raise RuntimeError: tangent gradients have no second or forward derivatives, and zero would be silently wrong."""
    raise RuntimeError(
        f"{call} needs gradient='factors' for {which} derivatives, got 'tangent'; "
        "set layer.gradient = 'factors' before the forward pass"
    )
