"""The same rules for parameters that are not factors: functions on lists of tensors, in place.

Every rule leaves a parameter, its state and its counter bit for bit unchanged when lr = 0, the
gradient is zero and the state is fresh.
"""

import torch
from torch import Tensor

from lowrank_geo.optim.directions import Direction, FlatSignal, State
from lowrank_geo.optim.filters import Filter


def directions(
    filter: Filter, direction: Direction, grads: list[Tensor], states: list[State]
) -> list[Tensor]:
    """filter -> direction of unit learning rate; advances the states in place."""
    momenta = [s["momentum"] for s in states]
    steps = [s["step"].clamp(min=1) for s in states]
    noise = list(torch._foreach_sub(grads, momenta)) if direction.watches_noise else []
    u, v, a, b = filter.coefficients(torch.stack(steps))
    multiply_(momenta, u)
    torch._foreach_add_(momenta, multiplied(grads, v))
    outputs = multiplied(momenta, b)
    if isinstance(a, Tensor) or a != 0:
        outputs = list(torch._foreach_add(outputs, multiplied(grads, a)))
    return direction.flat(FlatSignal(outputs, grads, momenta, noise, steps), states)


def multiplied(tensors: list[Tensor], by: float | Tensor) -> list[Tensor]:
    """Each times a number, or times its own; the tensors themselves for 1.

    Shapes: L tensors, by a number or (L,).
    """
    if isinstance(by, Tensor):
        return [x * c for x, c in zip(tensors, factors(tensors, by), strict=True)]
    return tensors if by == 1 else list(torch._foreach_mul(tensors, by))


def multiply_(tensors: list[Tensor], by: float | Tensor) -> None:
    """`multiplied` in place."""
    if isinstance(by, Tensor):
        for x, c in zip(tensors, factors(tensors, by), strict=True):
            x.mul_(c)
    else:
        torch._foreach_mul_(tensors, by)


def factors(tensors: list[Tensor], by: Tensor) -> list[Tensor]:
    """One 0-d tensor for each, in its dtype.

    Shapes: L tensors, by (L,) -> L times ().
    """
    return [c.to(x.dtype) for x, c in zip(tensors, by.unbind(), strict=True)]


def slope(grads: list[Tensor], directions: list[Tensor]) -> Tensor:
    """Σ⟨gradient, direction⟩.

    Shapes: -> ().
    """
    pairs = zip(grads, directions, strict=True)
    return torch.stack([(g * d).sum().float() for g, d in pairs]).sum()


def squares(grads: list[Tensor], directions: list[Tensor]) -> Tensor:
    """Σ|gradient|² and Σ|direction|².

    Shapes: -> (2).
    """
    return torch.stack([slope(grads, grads), slope(directions, directions)])


def descend(
    params: list[Tensor], directions: list[Tensor], lr: float | Tensor, weight_decay: float
) -> None:
    """p ← (1 − lr·wd) p − lr·d in float32 or better; bfloat16 parameters are rounded stochastically.

    Rounding to nearest would lose every step below 2⁻⁹ of the parameter.
    """
    exact = [p if p.dtype.itemsize >= 4 else p.float() for p in params]
    if weight_decay:
        torch._foreach_mul_(exact, 1 - lr * weight_decay)
    torch._foreach_sub_(exact, torch._foreach_mul(directions, lr))
    for p, x in zip(params, exact, strict=True):
        if p is not x:
            p.copy_(rounded(x) if p.dtype == torch.bfloat16 else x)


def rounded(x: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with the probabilities that make the mean right.

    Shapes: (...) -> (...).
    """
    bits = x.view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    kept = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), kept, x).bfloat16()
