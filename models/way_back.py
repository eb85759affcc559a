"""Steps of a momentum stack undone one by one, with their gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_geo.models.fixed_point import FixedPoint
from lowrank_geo.models.floating_point import Segments
from lowrank_geo.models.recompute import Template, output, recomputing, refuse_foreign

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


class Way(NamedTuple):
    """A call, and all that lets its blocks be called again."""

    call: Call
    tape: Tape
    extra: tuple[Tensor, ...]
    dtype: torch.dtype
    autocast: list[tuple]

    def again(self, index: int, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f(x) of a block as it was on the way there, and the leaves that stand for the extra tensors."""
        block = self.call.blocks[index]
        leaves = leaves_of(self.extra)
        with recomputing(block, self.tape.random[index], x.device, self.autocast):
            return output(block, x, self.call.template.fill(leaves)), leaves


class Gradients(NamedTuple):
    """Those for x and v after a step, and for other tensors, by their ids."""

    x: Tensor
    v: Tensor
    total: dict[int, Tensor]


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without their history, with gradients where they had some."""
    return [t.detach().requires_grad_(t.requires_grad) for t in tensors]


def step_back(way: Way, index: int, position: Tensor, after: Gradients) -> tuple[Tensor, Gradients]:
    """What block `index` pushed from a position, and the gradients before its step; `total` is added to."""
    block, arithmetic = way.call.blocks[index], way.call.arithmetic
    x = arithmetic.real(position, way.dtype).detach().requires_grad_()
    f, leaves = way.again(index, x)
    own, s = list(block.parameters()), after.x + after.v
    back = pull_back(f, arithmetic.share * s, x, [*leaves, *own], [*way.extra, *own], after.total)
    return arithmetic.push(f), Gradients(after.x + back, arithmetic.decay * s, after.total)


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
            add(total, id(twin), gradient)
    return torch.zeros_like(x) if gradients[0] is None else gradients[0]


def add(total: dict[int, Tensor], key: int, gradient: Tensor) -> None:
    known = total.get(key)
    total[key] = gradient if known is None else known + gradient


def through_fixed_point(
    way: Way, arithmetic: FixedPoint, state: State, end: Gradients
) -> Gradients:
    """The gradients before all blocks, whose steps are undone bit for bit.

    Raises: RuntimeError if a block gives other values than on the way there; read once, after the last one.
    """
    kept, found = list(way.tape.kept), end
    same: list[Tensor] = []
    for index in reversed(range(len(way.call.blocks))):
        push, found = step_back(way, index, arithmetic.position_before(state), found)
        mark = way.tape.marks[index]
        assert mark is not None  # fixed point always leaves one
        same.append(torch.eq(arithmetic.mark(push), mark))
        state = arithmetic.resume(arithmetic.retreat(state, push), index, kept)
    for done, agrees in enumerate(torch.stack(same).tolist() if same else []):
        if not agrees:
            raise other_values(f"block {len(same) - 1 - done}")
    return found


def other_values(name: str) -> RuntimeError:
    """The refusal of blocks that changed, or that do not compute the same twice."""
    return RuntimeError(
        f"MomentumStack needs {name} to give the same values twice, got others in backward; "
        'do not change it between forward and backward, or use mode="backprop"'
    )
