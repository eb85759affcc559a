"""Nested optimizer states as flat tensors and a JSON skeleton, so that no pickle is needed."""

from typing import Any

import torch
from torch import Tensor


def flatten(value: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """The skeleton of `value`, whose tensors move into `tensors` under names made of their place.

    Raises: TypeError for what neither JSON nor safetensors can hold.

    >>> tensors = {}
    >>> flatten({"lr": 0.1, 3: [torch.zeros(2)]}, tensors), list(tensors)
    ({'dict': [['lr', 0.1], [3, {'list': [{'tensor': 'state.3.0'}]}]]}, ['state.3.0'])
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError(f"flatten needs keys that are words or integers, got {list(value)}")
        return {"dict": [[key, flatten(x, tensors, f"{name}.{key}")] for key, x in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(x, tensors, f"{name}.{i}") for i, x in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"flatten needs tensors, numbers, text, lists and dicts, got {value!r}")


def unflatten(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """What `flatten` took apart.

    Raises: ValueError if it is none, or names a tensor that is not there.

    >>> unflatten({"tuple": [1, {"tensor": "a"}]}, {"a": torch.ones(1)})
    (1, tensor([1.]))
    """
    match skeleton:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"dict": [*pairs]}:
            return {key: unflatten(x, tensors) for key, x in pairs}
        case {"list": [*items]}:
            return [unflatten(x, tensors) for x in items]
        case {"tuple": [*items]}:
            return tuple(unflatten(x, tensors) for x in items)
        case dict() | list():
            raise ValueError(f"unflatten needs a skeleton that flatten made, got {skeleton!r}")
    return skeleton


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy in memory of its own: safetensors refuses views that share storage."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(
        tensor.detach()
    )
