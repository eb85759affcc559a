"""To call a block a second time as it was the first: random numbers, autocast, buffers and arguments."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Inputs = tuple[tuple, dict[str, Any]]  # what a block gets besides x


class Template(NamedTuple):
    """Extra arguments with their tensors taken out, at any depth of tuples, lists and dicts."""

    leaves: list  # with None where a tensor was
    places: list[int]  # of those tensors
    spec: TreeSpec

    def fill(self, tensors: Sequence[Tensor]) -> Inputs:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self.spec)


def take_apart(inputs: Inputs) -> tuple[Template, list[Tensor]]:
    """The tensors among extra arguments, and what puts them back."""
    leaves, spec = tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return Template(rest, places, spec), [leaves[i] for i in places]


def output(block: Callable[..., Tensor], x: Tensor, inputs: Inputs) -> Tensor:
    """f(x).

    Raises: ValueError for a block that changes the shape.
    """
    arguments, keywords = inputs
    f = block(x, *arguments, **keywords)
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


def block_dtype(x: Tensor) -> torch.dtype:
    """What blocks compute in, which get x: autocast's dtype within it, if that is coarser."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.dtype
    return max(x.dtype, torch.get_autocast_dtype(kind), key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def recomputing(
    block: nn.Module, random: tuple, device: torch.device, autocast: list[tuple]
) -> Iterator[None]:
    """Gradients on, random numbers and autocast as they were; what the block writes to its buffers is dropped."""
    cuda = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(torch.enable_grad())
        for kind, enabled, dtype in autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        torch.set_rng_state(random[0])
        if cuda:
            torch.cuda.set_rng_state(random[1], device)
        stack.enter_context(buffers_dropped(block))
        yield


@contextmanager
def buffers_dropped(block: nn.Module) -> Iterator[None]:
    """Modules in training get copies of their buffers to write to, such as running statistics."""
    own = [(m, dict(m._buffers)) for m in block.modules() if m.training and m._buffers]
    try:
        for module, buffers in own:
            module._buffers.update(
                {name: None if b is None else b.clone() for name, b in buffers.items()}
            )
        yield
    finally:
        for module, buffers in own:
            module._buffers.update(buffers)


def refuse_foreign(f: Tensor, known: set[int]) -> None:
    """Refuse an output that depends on a tensor with gradients which is no parameter of the block and no argument.

    Raises: RuntimeError: reversible mode would leave out its gradient.
    """
    seen, waiting = set(), [f.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                "MomentumStack needs every tensor with gradients that a block reads to be its parameter or an "
                f"argument, got another one of shape {tuple(leaf.shape)}; pass it to the call of the stack"
            )
        waiting += [parent for parent, _ in node.next_functions]
