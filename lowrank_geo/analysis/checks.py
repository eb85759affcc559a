"""What the laboratory refuses, each rule once."""

import math

import numpy as np
from numpy.typing import ArrayLike

LARGEST_NOISE = 1e100  # its square is still a number
LARGEST_RATIO = (
    1e12  # of curvatures: beyond it 1 − rate has less than four digits in double precision
)


def check_positive(call: str, name: str, value: float) -> None:
    """Raise ValueError, naming `call`, unless `value` is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{call} needs {name} > 0, got {value}; pass e.g. 0.1")


def check_count(call: str, name: str, value: int, least: int) -> None:
    """Raise ValueError, naming `call`, for a number of steps or the like below the least."""
    if value < least:
        raise ValueError(f"{call} needs {name} >= {least}, got {value}; raise it")


def check_noise(call: str, value: float) -> None:
    """Raise ValueError, naming `call`, for a standard deviation that is none."""
    if not 0 <= value <= LARGEST_NOISE:
        raise ValueError(
            f"{call} needs noise between 0 and {LARGEST_NOISE:g}, got {value}; "
            "pass the standard deviation of a gradient"
        )


def check_curvatures(call: str, curvatures: ArrayLike) -> None:
    """Raise ValueError, naming `call`, unless there are curvatures and all are positive and finite."""
    values = np.asarray(curvatures, dtype=float)
    if values.size == 0 or not (np.isfinite(values).all() and values.min() > 0):
        raise ValueError(
            f"{call} needs curvatures > 0, got {values.tolist()}; leave out flat directions"
        )


def check_spectrum(call: str, curvature_min: float, curvature_max: float) -> None:
    """Raise ValueError, naming `call`, unless 0 < min <= max, and max is at most 1e12 min."""
    check_curvatures(call, [curvature_min, curvature_max])
    if curvature_min > curvature_max:
        raise ValueError(
            f"{call} needs curvature_min <= curvature_max, got {curvature_min:g} and {curvature_max:g}; exchange them"
        )
    if curvature_max / curvature_min > LARGEST_RATIO:
        raise ValueError(
            f"{call} needs curvature_max <= {LARGEST_RATIO:g} curvature_min, got {curvature_min:g} and "
            f"{curvature_max:g}; leave out flat directions"
        )
