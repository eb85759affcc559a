"""Backpropagation through a momentum stack that keeps only its end: states are recomputed on the way back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_geo.models import fixed_point

Blocks = Sequence[nn.Module]


class Call(NamedTuple):
    """What a reversible call needs beside tensors that may have gradients."""

    blocks: Blocks
    n: int  # γ in units of 2⁻¹⁶
    arguments: tuple  # the extra ones, with None where a tensor was
    places: tuple[int, ...]  # of those tensors
    parameters: tuple[nn.Parameter, ...]  # each once

    def fill(self, tensors: Sequence[Tensor]) -> tuple:
        filled = list(self.arguments)
        for place, tensor in zip(self.places, tensors, strict=True):
            filled[place] = tensor
        return tuple(filled)


class Reversible(torch.autograd.Function):
    """x and v after all blocks, from those before; gradients are those of the real-valued step."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        extra = rest[: len(call.places)]
        ctx.call, ctx.dtype, ctx.autocast = call, x.dtype, autocast_state(x.device.type)
        arguments, share = call.fill(extra), 1 - call.n / fixed_point.DENOMINATOR
        fine = fixed_point.representable(x) & fixed_point.representable(v)
        state = fixed_point.start(x, v)
        ctx.spilled, ctx.checksums, ctx.random = [], [], []
        for index, block in enumerate(call.blocks):
            state, full = fixed_point.renew(state, index, call.n)
            if full is not None:
                ctx.spilled.append(full)
            ctx.random.append(random_state(x.device, ctx.random))
            f = output(block, fixed_point.real(state.x, x.dtype), arguments)
            fine = fine & fixed_point.representable(f)
            push = fixed_point.quantise(f.double() * share)
            state = fixed_point.advance(state, push, call.n)
            fine = fine & fixed_point.fits(state)
            ctx.checksums.append(fixed_point.checksum(push))
        if not fine:
            refuse_values()
        ctx.state = state
        ctx.save_for_backward(*rest)  # for the check that nobody changed them in place
        return fixed_point.real(state.x, x.dtype), fixed_point.real(state.v, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gx: Tensor, gv: Tensor) -> tuple:
        call: Call = ctx.call
        rest = ctx.saved_tensors
        extra, gamma = rest[: len(call.places)], call.n / fixed_point.DENOMINATOR
        total: dict[int, Tensor] = {}
        state, spilled = ctx.state, list(ctx.spilled)
        for index in reversed(range(len(call.blocks))):
            block = call.blocks[index]
            x = fixed_point.real(fixed_point.position_before(state), ctx.dtype).requires_grad_()
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in extra]
            with recomputing(block, ctx.random[index], x.device, ctx.autocast):
                f = output(block, x, call.fill(leaves))
            push = fixed_point.quantise(f.detach().double() * (1 - gamma))
            if not torch.equal(fixed_point.checksum(push), ctx.checksums[index]):
                refuse_recomputation(index)
            state = fixed_point.retreat(state, push, call.n)
            if fixed_point.begins_remainder(index, call.n):
                state = state._replace(lost=spilled.pop())
            s = gx + gv
            gx = gx + pull_back(f, (1 - gamma) * s, x, [*leaves, *block.parameters()],
                                [*extra, *block.parameters()], total)  # fmt: skip
            gv = gamma * s
        return None, gx, gv, *(total.get(id(t)) for t in (*extra, *call.parameters))


def pull_back(
    f: Tensor, g: Tensor, x: Tensor, inside: list, outside: list, total: dict[int, Tensor]
) -> Tensor:
    """Jᵀ g for x; those for the tensors `inside` are added to `total` under the id of their twin `outside`."""
    if not f.requires_grad:
        return torch.zeros_like(x)
    pairs = [(i, o) for i, o in zip(inside, outside, strict=True) if i.requires_grad]
    gradients = torch.autograd.grad(
        f, [x, *(i for i, _ in pairs)], g.to(f.dtype), allow_unused=True
    )
    for (_, twin), gradient in zip(pairs, gradients[1:], strict=True):
        if gradient is not None:
            known = total.get(id(twin))
            total[id(twin)] = gradient if known is None else known + gradient
    return torch.zeros_like(x) if gradients[0] is None else gradients[0]


def output(block: Callable[..., Tensor], x: Tensor, arguments: tuple) -> Tensor:
    """f(x).

    Raises: ValueError for a block that changes the shape.
    """
    f = block(x, *arguments)
    if f.shape != x.shape:
        raise ValueError(
            f"MomentumStack needs blocks that keep the shape {tuple(x.shape)}, got {tuple(f.shape)}; "
            "put layers that resize between two stacks"
        )
    return f


def random_state(device: torch.device, known: list[tuple]) -> tuple:
    """The states of the generators that a block may draw from; the last known object if nothing has been drawn."""
    now = [torch.get_rng_state()]
    if device.type == "cuda":
        now.append(torch.cuda.get_rng_state(device))
    if known and all(torch.equal(a, b) for a, b in zip(known[-1], now, strict=True)):
        return known[-1]
    return tuple(now)


def autocast_state(device: str) -> list[tuple]:
    kinds = {device, "cpu"}
    return [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind)
    ]


@contextmanager
def recomputing(
    block: nn.Module, random: tuple, device: torch.device, autocast: list[tuple]
) -> Iterator[None]:
    """Gradients on, random numbers and autocast as they were, running statistics left as they are."""
    tracking = [
        m
        for m in block.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training and m.track_running_stats
    ]
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.enable_grad())
        for kind, enabled, dtype in autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        torch.set_rng_state(random[0])
        if cuda:
            torch.cuda.set_rng_state(random[1], device)
        try:
            for module in tracking:
                module.track_running_stats = False
            yield
        finally:
            for module in tracking:
                module.track_running_stats = True


def refuse_values() -> None:
    raise ValueError(
        "MomentumStack needs finite values below 2**29 in exact arithmetic, got larger ones or NaN; "
        "normalise inside the blocks or lower the learning rate"
    )


def refuse_recomputation(index: int) -> None:
    raise RuntimeError(
        f"MomentumStack needs block {index} to give the same bits twice, got others in backward; "
        'do not change it between forward and backward, or use mode="backprop"'
    )
