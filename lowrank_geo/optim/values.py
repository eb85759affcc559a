"""Numbers that users pass, and names they mistype."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_number(what: str, value: Any, example: float) -> None:
    """Raise TypeError, naming `what`, unless the value is a number.

    >>> check_number("eps", "1e-8", 1e-8)
    Traceback (most recent call last):
    ...
    TypeError: eps needs to be a number, got '1e-8'; pass e.g. 1e-08
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} needs to be a number, got {value!r}; pass e.g. {example}")


def check_rate(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a learning rate or weight decay is finite and not negative.

    A tensor on an accelerator is trusted: reading it would wait for the device.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    check_scalar(name, value)
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} needs to be a finite number >= 0, got {number}; pass e.g. 1e-3")


def check_scalar(name: str, value: float | Tensor) -> None:
    """Raise ValueError or TypeError unless this is one number, or a tensor of one."""
    if not isinstance(value, Tensor):
        check_number(name, value, 1e-3)
    elif value.numel() != 1:
        raise ValueError(
            f"{name} needs to be one number, got a tensor of shape {tuple(value.shape)}; pass a 0-d tensor"
        )


def check_count(what: str, value: Any, example: int) -> None:
    """Raise TypeError, naming `what`, unless the value is a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{what} needs to be a whole number, got {value!r}; pass e.g. {example}")


def check_pair(what: str, value: Any, example: tuple[float, float]) -> None:
    """Raise TypeError, naming `what`, unless the value is two numbers."""
    numbers = value if isinstance(value, tuple | list) else ()
    if len(numbers) != 2 or not all(isinstance(x, Real) for x in numbers):
        raise TypeError(f"{what} need to be two numbers, got {value!r}; pass e.g. {example}")


def check_keys(given: Iterable[str], known: Iterable[str], elsewhere: Iterable[str] = ()) -> None:
    """Raise ValueError for a key of a parameter group that is almost one of those it has, or that belongs `elsewhere`;
    others are the user's own.

    >>> check_keys({"lr", "weight_decya", "name"}, {"lr", "weight_decay"})
    Traceback (most recent call last):
    ...
    ValueError: a parameter group needs keys that its optimizer has, got 'weight_decya'; did you mean 'weight_decay'?
    """
    known, elsewhere = set(known), set(elsewhere)
    for key in sorted(set(given) - known):
        if key in elsewhere:
            raise ValueError(
                f"a parameter group needs keys that its optimizer has, got {key!r}, which holds for all groups; "
                f"pass {key}=… to the optimizer"
            )
        if near := difflib.get_close_matches(key, known, 1, cutoff=0.85):
            raise ValueError(
                f"a parameter group needs keys that its optimizer has, got {key!r}; did you mean {near[0]!r}?"
            )
