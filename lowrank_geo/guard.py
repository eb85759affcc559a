"""Parameters whose `.grad` holds tangent coordinates, and the refusal of optimizers that would
misread it.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_tangent: WeakIdKeyDictionary = WeakIdKeyDictionary()
_places: WeakIdKeyDictionary = WeakIdKeyDictionary()  # factor -> a token of its layer, its name
_hook: list[Any] = []  # the handle of the one global hook, installed with the first mark


def mark(parameters: Iterable[Tensor]) -> None:
    """From now on a step on these by an optimizer that does not read tangent gradients raises."""
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_refuse_foreign_optimizer))
    for parameter in parameters:
        _tangent[parameter] = True


def unmark(parameters: Iterable[Tensor]) -> None:
    """These hold ordinary gradients again."""
    for parameter in parameters:
        _tangent.pop(parameter, None)


def place(U: Tensor, S: Tensor, V: Tensor) -> None:
    """Remember that these are the factors of one layer, whatever its gradients mean."""
    layer = object()
    for name, parameter in zip("USV", (U, S, V), strict=True):
        _places[parameter] = layer, name


def is_factor(parameter: Tensor) -> bool:
    """Whether this is U, S or V of a layer."""
    return parameter in _places


def in_place(U: Tensor, S: Tensor, V: Tensor) -> bool:
    """Whether these are U, S, V of one layer, in this order, as far as anyone has said."""
    places = [_places[p] for p in (U, S, V) if p in _places]
    layers, names = {layer for layer, _ in places}, [name for _, name in places]
    return not places or (len(layers) == 1 and names == list("USV"))


def is_marked(parameter: Tensor) -> bool:
    """Whether `.grad` of this parameter holds tangent coordinates."""
    return parameter in _tangent


def _refuse_foreign_optimizer(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if getattr(optimizer, "reads_tangent_gradients", False):
        return
    # A closure makes the gradients only after this hook; `args` may begin with the optimizer itself.
    given = [x for x in (*args, *kwargs.values()) if x is not optimizer]
    closure = any(callable(x) for x in given)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (closure or parameter.grad is not None) and is_marked(parameter):
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step needs ordinary gradients, got tangent gradients of a "
                    f"low-rank layer (a factor of shape {tuple(parameter.shape)}); use an optimizer of "
                    "lowrank_geo.optim, or set layer.gradient = 'factors' on the low-rank layers"
                )


def refuse_derivative(call: str, which: str) -> NoReturn:
    """Raise RuntimeError: tangent gradients have no second or forward derivatives, and zero would be silently wrong."""
    raise RuntimeError(
        f"{call} needs gradient='factors' for {which} derivatives, got 'tangent'; "
        "set layer.gradient = 'factors' before the forward pass"
    )
