"""Numbers that users pass, and names they mistype."""

import difflib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_number(what: str, value: Any, example: float) -> None:
    """Raise TypeError, naming `what`, unless the value is a number.

    >>> check_number("eps", "1e-8", 1e-8)
    Traceback (most recent call last):
    ...
    TypeError: eps needs to be a number, got '1e-8'; pass e.g. 1e-08
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} needs to be a number, got {value!r}; pass e.g. {example}")


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
