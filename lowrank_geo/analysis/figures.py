"""The figures of the laboratory: one function per figure, from plain numbers to a matplotlib `Figure`."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from lowrank_geo.canvas import (
    COLOURS,
    DASHES,
    FULL,
    GREY,
    HALF,
    INK,
    Axes,
    Figure,
    FuncFormatter,
    LogLocator,
    NullLocator,
    canvas,
    legend,
    log_scale,
    readable,
    styled,
)

Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]
OMEGA = "frequency ω (radians per update)"
ALPHA = "effective learning rate α (weight per gradient)"


def log_x(axes: Axes) -> None:
    """A log x axis with labels at powers of ten, and between them where it spans less than three."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 1e3 * low else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(readable))
    axes.xaxis.set_minor_locator(NullLocator())


@styled
def curves(
    lines: Mapping[str, Curve],
    x: str,
    y: str,
    *,
    dots: Mapping[str, Curve] | None = None,
    edges: Mapping[str, float] | None = None,
    logs: str = "",
    half: bool = True,
    columns: int = 0,
) -> Figure:
    """Lines over one axis, with dots for what was measured and vertical edges where something ends.

    Args: logs: "x", "y", "xy" or "" for the axes that are logarithmic. columns: of a legend above the axes.
    """
    figure, axes = canvas(HALF if half else FULL, x, y)
    for place, (name, (at, values)) in enumerate(lines.items()):
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
        axes.plot(at, values, dash, color=colour, label=name)
    for place, (name, (at, values)) in enumerate((dots or {}).items()):
        colour, marker = COLOURS[place % len(COLOURS)], "os^Dv"[place % 5]
        axes.plot(at, values, marker, color=colour, markersize=4, label=name)
    for place, (name, edge) in enumerate((edges or {}).items()):
        axes.axvline(
            edge, color=(GREY, INK)[place % 2], linestyle=":-"[place % 2], linewidth=1, label=name
        )
    if "x" in logs:
        log_x(axes)
    if "y" in logs:
        log_scale(axes)
    legend(axes, above=columns)
    return figure


@styled
def bode(
    omega: np.ndarray,
    responses: Mapping[str, np.ndarray],
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> Figure:
    """Gain |H| and phase arg H over frequency; dots are measured on an optimizer's state.

    Shapes: omega (k), each response (k) complex; each measurement (frequencies, responses).
    """
    figure = Figure(figsize=(FULL[0], 3.0))
    gain, phase = cast(list[Axes], list(figure.subplots(1, 2)))
    for place, (name, response) in enumerate(responses.items()):
        style: dict[str, Any] = dict(
            color=COLOURS[place % len(COLOURS)], linestyle=DASHES[place % len(DASHES)]
        )
        gain.plot(omega, abs(response), label=name, **style)
        phase.plot(omega, np.degrees(np.angle(response)), **style)
        if name in measured:
            at, found = measured[name]
            dots: dict[str, Any] = dict(
                color=style["color"], linestyle="", marker="o", markersize=4
            )
            gain.plot(at, abs(found), label="measured", **dots)
            phase.plot(at, np.degrees(np.angle(found)), **dots)
    for axes, label in ((gain, "gain |H| (output per gradient)"), (phase, "phase arg H (degrees)")):
        log_x(axes)
        axes.set_xlabel(OMEGA)
        axes.set_ylabel(label)
    log_scale(gain)
    legend(gain)
    return figure


@styled
def heat(
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
    labels: tuple[str, str, str],
    *,
    edge: Curve,
    here: tuple[float, float],
) -> Figure:
    """Values over two axes as filled contours, with a curve and a point drawn in.

    Shapes: x (k), y (n), values (n, k); NaN is left white.
    """
    figure, axes = canvas((FULL[0], 3.2), *labels[:2])
    # Not pcolormesh: its image would be embedded as data, which the page's policy forbids.
    filled = axes.contourf(x, y, values, levels=14, cmap="viridis")
    axes.plot(*edge, color=COLOURS[1], label="bound of stability")
    axes.plot(*here, "o", color=COLOURS[1], markeredgecolor="white", label="here", clip_on=False)
    axes.set_xlim(0, x.max())
    axes.set_ylim(y.min(), y.max())
    axes.grid(visible=False)
    figure.colorbar(filled, ax=axes, label=labels[2])
    axes.legend(loc="lower right")
    return figure
