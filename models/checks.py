"""The refusals that all models share."""

import dataclasses
import math
from typing import Any

from torch import Tensor


def check_sizes(call: str, **sizes: Any) -> None:
    """Refuse sizes that are not positive integers.

    Raises: TypeError for a value that is no integer (a bool is none), ValueError for one below 1.

    >>> check_sizes("MLP", width=0)
    Traceback (most recent call last):
    ValueError: MLP needs width >= 1, got 0; choose a positive size
    """
    for name, value in sizes.items():
        if type(value) is not int:
            raise TypeError(
                f"{call} needs an integer {name}, got {value!r}; pass it as a plain int"
            )
        if value < 1:
            raise ValueError(f"{call} needs {name} >= 1, got {value}; choose a positive size")


def check_fields(config: Any) -> None:
    """Refuse a config whose fields do not have the values their types ask for, also one read from JSON.

    Fields typed int are sizes, floats are finite and not negative, bools are bools.

    Raises: TypeError for a wrong type, ValueError for a wrong value.
    """
    call = type(config).__name__
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if field.type is int:
            check_sizes(call, **{name: value})
        elif field.type is bool and type(value) is not bool:
            raise TypeError(f"{call} needs {name} to be True or False, got {value!r}; pass a bool")
        elif field.type is float:
            if type(value) not in (int, float):
                raise TypeError(f"{call} needs a number as {name}, got {value!r}; pass a float")
            if not (0.0 <= value < math.inf):
                raise ValueError(
                    f"{call} needs a finite {name} >= 0, got {value}; choose such a number"
                )


def check_heads(call: str, width: int, heads: int) -> None:
    """Refuse a width that the heads cannot share evenly.

    Raises: ValueError.
    """
    if width % heads:
        raise ValueError(
            f"{call} needs a width divisible by heads, got width {width} and {heads} heads; "
            "change one of them"
        )


def check_images(
    call: str, images: Tensor, channels: int, *, smallest: int = 1, exactly: int | None = None
) -> None:
    """Refuse a batch of images that the model cannot read.

    Shapes: images (B, channels, H, W), H and W at least `smallest`, or equal to `exactly`.
    Raises: ValueError.
    """
    if exactly is None:
        rule, size = f"(B, {channels}, H, W) with H, W >= {smallest}", f"at least {smallest}"
    else:
        rule, size = f"(B, {channels}, {exactly}, {exactly})", str(exactly)
    fits = images.dim() == 4 and images.shape[1] == channels
    if fits:
        sides = images.shape[2:]
        fits = min(sides) >= smallest if exactly is None else sides == (exactly, exactly)
    if not fits:
        raise ValueError(
            f"{call} needs images of shape {rule}, got {tuple(images.shape)}; "
            f"resize them to {size} or configure the model for them"
        )
