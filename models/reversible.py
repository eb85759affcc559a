"""Backpropagation through a momentum stack that keeps only its end: states are recomputed on the way back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_geo.models.fixed_point import FixedPoint
from lowrank_geo.models.floating_point import Segments
from lowrank_geo.models.recompute import (
    Inputs,
    Template,
    autocast_state,
    output,
    random_state,
    recomputing,
    refuse_foreign,
)

Arithmetic = FixedPoint | Segments
State = Any  # of the arithmetic


class Call(NamedTuple):
    """What a reversible call needs beside tensors that may have gradients."""

    blocks: Sequence[nn.Module]
    arithmetic: Arithmetic
    template: Template
    parameters: tuple[nn.Parameter, ...]  # each once


class Tape(NamedTuple):
    """What the way back needs, besides the last state."""

    kept: list  # of the arithmetic
    marks: list[Tensor | None]
    random: list[tuple]


class Reversible(torch.autograd.Function):
    """x and v after all blocks, from those before; gradients are those of the real-valued step."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.dtype, ctx.autocast = call, x.dtype, autocast_state(x.device.type)
        ctx.tape = Tape([], [], [])
        extra = rest[: len(call.template.places)]
        ctx.state = way_there(call, x, v, call.template.fill(extra), ctx.tape)
        ctx.save_for_backward(*rest)  # for the check that nobody changed them in place
        real = call.arithmetic.real
        return real(ctx.state.x, x.dtype), real(ctx.state.v, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gx: Tensor, gv: Tensor) -> tuple:
        call, rest, tape, state = ctx.call, ctx.saved_tensors, ctx.tape, ctx.state
        extra, kept, same = rest[: len(call.template.places)], list(tape.kept), []
        total: dict[int, Tensor] = {}
        for index in reversed(range(len(call.blocks))):
            block = call.blocks[index]
            x = call.arithmetic.real(call.arithmetic.position_before(state), ctx.dtype)
            x.requires_grad_()
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in extra]
            with recomputing(block, tape.random[index], x.device, ctx.autocast):
                f = output(block, x, call.template.fill(leaves))
            push = call.arithmetic.push(f)
            if (mark := tape.marks[index]) is not None:
                same.append((f"block {index}", call.arithmetic.mark(push) == mark))
            state, agrees = call.arithmetic.resume(
                call.arithmetic.retreat(state, push), index, kept
            )
            if agrees is not None:
                same.append((f"every block from {index} on", agrees))
            s = gx + gv
            own = list(block.parameters())
            gx = gx + pull_back(
                f, call.arithmetic.share * s, x, [*leaves, *own], [*extra, *own], total
            )
            gv = call.arithmetic.decay * s
        refuse_other_values(same)
        return None, gx, gv, *(total.get(id(t)) for t in (*extra, *call.parameters))


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
        f = output(block, arithmetic.real(state.x, x.dtype), inputs)
        push = arithmetic.push(f)
        state = arithmetic.advance(state, push)
        fine = fine & arithmetic.fine(f) & arithmetic.fits(state)
        if tape is not None:
            tape.marks.append(arithmetic.mark(push))
    refuse_values(fine, isinstance(arithmetic, FixedPoint))
    return state


def pull_back(
    f: Tensor, g: Tensor, x: Tensor, inside: list, outside: list, total: dict[int, Tensor]
) -> Tensor:
    """Jᵀ g for x; those for the tensors `inside` are added to `total` under the id of their twin `outside`."""
    if not f.requires_grad:
        return torch.zeros_like(x)
    refuse_foreign(f, {id(x), *map(id, inside)})
    pairs = [(i, o) for i, o in zip(inside, outside, strict=True) if i.requires_grad]
    gradients = torch.autograd.grad(
        f, [x, *(i for i, _ in pairs)], g.to(f.dtype), allow_unused=True
    )
    for (_, twin), gradient in zip(pairs, gradients[1:], strict=True):
        if gradient is not None:
            known = total.get(id(twin))
            total[id(twin)] = gradient if known is None else known + gradient
    return torch.zeros_like(x) if gradients[0] is None else gradients[0]


def refuse_values(fine: Tensor, exact: bool) -> None:
    """Raise ValueError unless all values could be held."""
    if not fine:
        rule = "finite values below 2**29 in exact arithmetic" if exact else "finite values"
        raise ValueError(
            f"MomentumStack needs {rule}, got others; "
            "normalise inside the blocks or lower the learning rate"
        )


def refuse_other_values(same: list[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError unless all blocks have given the same values; read once, after the last one."""
    agreed = torch.stack([agrees for _, agrees in same]).tolist() if same else []
    for (name, _), agrees in zip(same, agreed, strict=True):
        if not agrees:
            raise RuntimeError(
                f"MomentumStack needs {name} to give the same values twice, got others in backward; "
                'do not change it between forward and backward, or use mode="backprop"'
            )
