"""Figures of a run on images: score by epoch, table of confusions, how good each image is."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_geo.canvas import (
    COLOURS,
    FULL,
    GREY,
    HALF,
    INK,
    Figure,
    MaxNLocator,
    canvas,
    legend,
    mark,
    short,
    styled,
)

NUMBERED = 12  # the most classes whose cells have room for numbers


@styled
def scores(
    epochs: Sequence[float],
    values: dict[str, Sequence[float]],
    band: tuple[Sequence[float], Sequence[float]],
    best: float | None,
) -> Figure:
    """Scores on the validation images by epoch; the first has a band, its interval."""
    figure, axes = canvas(
        FULL, "epoch (passes over the training images)", "validation score (0 to 1)"
    )
    axes.fill_between(epochs, *band, color=COLOURS[0], alpha=0.18, linewidth=0)
    for place, (name, series) in enumerate(values.items()):
        style: dict[str, Any] = {"linewidth": 1.8 if place == 0 else 1.0, "zorder": 3 - (place > 0)}
        axes.plot(epochs, series, mark(epochs, "-"), color=COLOURS[place], label=name, **style)
    if best is not None:
        axes.axvline(best, color=GREY, linestyle=":", label="best epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    legend(axes)
    return figure


@styled
def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """How much of each true class (row) was taken for each class (column); shares of the row.

    Shapes: counts (C, C).
    """
    size = len(names)
    side = min(FULL[0], 2.6 + 0.36 * size)
    figure, axes = canvas((side, 0.82 * side), "taken for", "true class")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [short(name, 16) for name in names]
    every = range(0, size, max(1, size // 40))
    turned = max(map(len, labels)) > 3
    how: dict[str, Any] = {"rotation": 45, "ha": "right"} if turned else {}
    axes.set_xticks(every, [labels[i] for i in every], **how)
    axes.set_yticks(every, [labels[i] for i in every])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if size <= NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.6 else INK
                middle: Any = {"ha": "center", "va": "center", "color": colour, "fontsize": 7.5}
                axes.text(column, row, percent(share), **middle)
    return figure


def percent(share: float) -> str:
    """A share as it fits a cell: never 100 or 0 unless it is.

    >>> percent(1.0), percent(0.9996), percent(0.25), percent(0.0004)
    ('100', '99.9', '25', '<0.1')
    """
    if share >= 1:
        return "100"
    if share < 0.001:
        return "<0.1"
    value = min(100 * share, 99.9)
    return f"{value:.1f}" if value > 99 or value < 10 else f"{value:.0f}"


@styled
def distribution(values: Sequence[float], what: str) -> Figure:
    """How many images have at most which value. Shapes: values (N), ascending."""
    figure, axes = canvas(HALF, what, "part of the test images (0 to 1)")
    steps = np.arange(1, len(values) + 1) / max(len(values), 1)
    axes.step([0, *values, 1], [0, *steps, 1], where="post", color=COLOURS[0])
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    return figure
