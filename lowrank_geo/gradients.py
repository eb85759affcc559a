"""The two meanings of the gradients of U, S, V, and what every operation that offers both shares.

`factors`: the ordinary partial derivatives, by autograd. `tangent`: the coordinates (Up, M, Vp) of the Riemannian
gradient, written by a backward pass that cannot be differentiated.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lowrank_geo.guard import refuse_derivative

Gradient = Literal["factors", "tangent"]
GRADIENTS: tuple[Gradient, ...] = ("factors", "tangent")


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast would give a linear layer: float64 is left alone.

    Shapes: (...) -> (...).
    """
    device = x.device.type
    if x.dtype == torch.float64 or not is_autocast_on(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def is_autocast_on(device: str) -> bool:
    """As torch.is_autocast_enabled, which knows no device such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def keep(ctx: Any, inputs: tuple, a: Tensor) -> None:
    """Save the inputs (x, U, S, V, ...) and a = x V, which gets no gradient of its own."""
    ctx.mark_non_differentiable(a)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], a)


def no_autocast(g: Tensor) -> AbstractContextManager:
    """A backward pass inside autocast would round the gauge to its dtype."""
    if is_autocast_on(g.device.type):
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
        refuse_derivative(ctx.call, "second")


def once(call: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Gradients that cannot be differentiated again."""
    if not torch.is_grad_enabled():
        return gradients
    dx, *rest = gradients
    if dx is None:
        return None, *Once.apply(call, *rest)
    return Once.apply(call, dx, *rest)


def refuse_forward_derivatives(call: str, *inputs: Tensor) -> None:
    """`refuse_derivative` if an input carries a forward-mode tangent.

    Not as the `jvp` of the Function: torch.compile breaks the graph at one that has it.
    """
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        refuse_derivative(call, "forward")
