"""Where an adapter starts. None of these changes the model: ΔW = 0, or what is added is subtracted again.

zero: random frames, S = 0. gradient: the principal directions of the first gradients, S = 0. pissa: the principal part
of the weight, kept fixed as a copy that is subtracted, so that W stays what it is and can be unmerged. random: a
change that is not zero, to try things.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.geometry import Point, random
from lowrank_geo.init import factorize
from lowrank_geo.peft.deltas import kind_of, to_matrix

INITS = ("zero", "gradient", "pissa", "random")
GRADIENT = "_lowrank_geo_gradient"  # where `collect_gradients` leaves them


def zero(block: Tensor, rank: int) -> Point:
    """Random frames and S = 0.

    Shapes: block (m, n), of which only the shape matters -> `Point`.
    """
    m, n = block.shape
    drawn = random(m, n, rank, dtype=torch.promote_types(block.dtype, torch.float32))
    return Point(drawn.U, torch.zeros_like(drawn.S), drawn.V)


def arbitrary(block: Tensor, rank: int) -> Point:
    """Random frames and a Gaussian core of about the size of the rounding of a network's activations, 0.1/√r.

    Shapes: block (m, n), of which only the shape matters -> `Point`.
    """
    m, n = block.shape
    drawn = random(m, n, rank, dtype=torch.promote_types(block.dtype, torch.float32))
    return Point(drawn.U, drawn.S * (0.1 / rank**0.5), drawn.V)


def principal(block: Tensor, rank: int) -> Point:
    """The nearest matrix of rank r.

    Shapes: (m, n) -> `Point`.
    """
    return factorize(block, rank, "svd")


def directions(gradient: Tensor, rank: int) -> Point:
    """The frames of the nearest matrix of rank r, with S = 0: the steepest descent of a matrix of rank r from W.

    Shapes: (m, n) -> `Point`.
    Source: as LoRA-GA (arXiv 2407.05000), but at ΔW = 0, so that no weight is changed.
    """
    U, S, V = principal(gradient, rank)
    return Point(U, torch.zeros_like(S), V)


STARTS: dict[str, Callable[[Tensor, int], Point]] = {
    "zero": zero,
    "gradient": directions,
    "pissa": principal,
    "random": arbitrary,
}


def collect_gradients(model: nn.Module, config: Any, backward: Callable[[nn.Module], Any]) -> None:
    """Run `backward` once on the plain model and leave each target's gradient for `init="gradient"`.

    `backward(model)` calls backward on the loss of one or more batches; gradients add up. The model is left as it was,
    with the gradients beside its layers until `get_peft_model` takes them.

    Args: config: the `FixedRankConfig` that the model will be wrapped with.
    Raises: ValueError if no target is found or none got a gradient.
    """
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    wanted = _maybe_include_all_linear_layers(copy.copy(config), model)  # which writes to it
    targets = [
        module
        for name, module in model.named_modules()
        if check_target_module_exists(wanted, name) and hasattr(module, "weight")
    ]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    weights = {id(module.weight) for module in targets}
    for parameter, _, _ in flags:
        parameter.requires_grad_(id(parameter) in weights and parameter.is_floating_point())
        parameter.grad = None
    try:
        backward(model)
        found = [(module, module.weight.grad) for module in targets]
        if not found or all(gradient is None for _, gradient in found):
            raise ValueError(
                f"Target modules {config.target_modules} got no gradient from `backward`. Please check the target "
                "modules and that `backward` calls `loss.backward()`."
            )
        for module, gradient in found:
            if gradient is not None:
                setattr(module, GRADIENT, to_matrix(gradient, module).detach())
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def take_gradient(base: nn.Module, name: str) -> Tensor:
    """The gradient that was left beside a layer, which forgets it.

    Raises: ValueError if there is none.
    """
    gradient = getattr(base, GRADIENT, None)
    if gradient is None:
        raise ValueError(
            f"`init='gradient'` needs the gradient of {name!r} ({kind_of(base)}), got none. Please call "
            "`lowrank_geo.peft.collect_gradients(model, config, backward)` before `get_peft_model`."
        )
    delattr(base, GRADIENT)
    return gradient
