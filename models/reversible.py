"""Backpropagation through a momentum stack that keeps only its end: states are recomputed on the way back."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_geo.models.fixed_point import FixedPoint
from lowrank_geo.models.recompute import Inputs, autocast_state, output, random_state
from lowrank_geo.models.segments import through_segments
from lowrank_geo.models.way_back import (
    Call,
    Gradients,
    State,
    Tape,
    Way,
    leaves_of,
    through_fixed_point,
)


class Reversible(torch.autograd.Function):
    """x and v after all blocks, from those before; gradients are those of the real-valued step."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.dtype, ctx.autocast = call, x.dtype, autocast_state(x.device.type)
        ctx.tape = Tape([], [], [])
        extra = rest[: len(call.template.places)]
        ctx.state = way_there(call, x, v, call.template.fill(leaves_of(extra)), ctx.tape)
        ctx.save_for_backward(*rest)  # for the check that nobody changed them in place
        real = call.arithmetic.real
        return real(ctx.state.x, x.dtype), real(ctx.state.v, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gx: Tensor, gv: Tensor) -> tuple:
        call, rest = ctx.call, ctx.saved_tensors
        extra = rest[: len(call.template.places)]
        way, end = Way(call, ctx.tape, extra, ctx.dtype, ctx.autocast), Gradients(gx, gv, {})
        if isinstance(call.arithmetic, FixedPoint):
            found = through_fixed_point(way, call.arithmetic, ctx.state, end)
        else:
            found = through_segments(way, call.arithmetic, ctx.state, end)
        return None, found.x, found.v, *(found.total.get(id(t)) for t in (*extra, *call.parameters))


def way_there(call: Call, x: Tensor, v: Tensor, inputs: Inputs, tape: Tape | None) -> State:
    """The state after all blocks.

    Raises: ValueError for values that the arithmetic cannot hold.
    """
    arithmetic: Any = call.arithmetic
    fine, state = arithmetic.fine(x) & arithmetic.fine(v), arithmetic.start(x, v)
    for index, block in enumerate(call.blocks):
        state, kept = arithmetic.keep(state, index)
        if tape is not None:
            tape.kept.extend([] if kept is None else [kept])
            tape.random.append(random_state(x.device, tape.random))
        at = arithmetic.real(state.x, x.dtype)
        with nullcontext() if tape is None else torch.enable_grad():
            # As in backward: layers, kernels and autocast's cache may depend on whether gradients are wanted.
            f = output(block, at if tape is None else at.detach().requires_grad_(), inputs).detach()
        push = arithmetic.push(f)
        state = arithmetic.advance(state, push)
        fine = fine & arithmetic.fine(f) & arithmetic.fits(state)
        if tape is not None:
            tape.marks.append(arithmetic.mark(push))
    refuse_values(fine, isinstance(arithmetic, FixedPoint))
    return state


def refuse_values(fine: Tensor, exact: bool) -> None:
    """Raise ValueError unless all values could be held."""
    if not fine:
        rule = "finite values below 2**29 in exact arithmetic" if exact else "finite values"
        raise ValueError(
            f"MomentumStack needs {rule}, got others; "
            "normalise inside the blocks or lower the learning rate"
        )
