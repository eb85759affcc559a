"""What copies and pickles of an optimizer carry: `torch.optim.Optimizer` keeps its state, groups and defaults alone."""

from typing import Any

from torch.optim import Optimizer

from lowrank_geo import guard

# What torch makes anew, what a scheduler hangs on an optimizer, and compiled functions, which cannot be pickled.
REMADE = ("step", "_propose_step", "_take_step", "_propose_core", "_take_core")
MARKED = "marked parameters"  # not an attribute: which parameters hold tangent gradients


def attributes(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer without hooks and compiled functions, for `__getstate__`."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in REMADE and not name.startswith("_optimizer_")
    }


def with_marks(optimizer: Optimizer) -> dict[str, Any]:
    """`attributes`, and which parameters hold tangent gradients."""
    every = (p for group in optimizer.param_groups for p in group["params"])
    return {**attributes(optimizer), MARKED: [p for p in every if guard.is_marked(p)]}


def mark(state: dict[str, Any]) -> dict[str, Any]:
    """Mark the parameters of `with_marks`; returns the attributes."""
    guard.mark(state.get(MARKED, ()))
    return {name: value for name, value in state.items() if name != MARKED}
