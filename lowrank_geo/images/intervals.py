"""How sure a mean is: bootstrap over patients, since the images of one are not independent."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate and its 95 % interval, which is empty if there is only one group."""

    mean: float
    low: float
    high: float


def mean_interval(values: np.ndarray, groups: Sequence[str]) -> Interval:
    """The mean of `values` and its 95 % percentile interval over resampled groups.

    Shapes: values (N), with the group of each.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13.

    >>> mean_interval(np.array([1.0, 1.0, 1.0]), ["a", "b", "c"])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    return interval(np.stack([values, np.ones(len(values))], 1), groups, lambda s: s[0] / s[1])


def interval(
    rows: np.ndarray, groups: Sequence[str], statistic: Callable[[np.ndarray], float]
) -> Interval:
    """A statistic of the sum of `rows` over all images, and its interval over resampled groups.

    The draws are seeded: the same values have the same interval.
    Shapes: rows (N, ...); statistic: (...) -> a number.
    """
    names = sorted(set(groups))
    index = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(names), *rows.shape[1:]))
    np.add.at(sums, [index[g] for g in groups], rows)
    draws = np.random.default_rng(0).integers(0, len(names), (RESAMPLES, len(names)))
    times = np.stack([np.bincount(d, minlength=len(names)) for d in draws])  # (RESAMPLES, G)
    found = [statistic(total) for total in np.tensordot(times.astype(float), sums, 1)]
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(found, (tail, 100 - tail))
    return Interval(float(statistic(sums.sum(0))), float(low), float(high))
