"""How every figure looks: sizes, colours, axes, and the way to SVG.

No pyplot and no lasting change of `rcParams`, so that drawing is safe beside a user's own plots. The colours are
those of Okabe and Ito, told apart without colour vision; line styles tell them apart in print.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from io import StringIO
from typing import Any, ParamSpec

import numpy as np

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "the figures of lowrank_geo need matplotlib, which is not installed; pip install 'lowrank-geo[cli]'"
    ) from missing

P = ParamSpec("P")

FULL, HALF = (7.2, 2.8), (3.5, 2.5)  # inches: one or two figures to a line of A4
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
DASHES = ("-", "--", "-.", ":")
PALE, FAINT, GREY, INK = "#8DBBDD", "#DDE2E7", "#9AA3AD", "#22272E"
STEP = "training step (updates)"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, escaped by matplotlib
    "text.parse_math": False,  # a "$" in a layer's name is a dollar sign
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "figure.labelsize": 8.5,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8EBEE",
    "lines.linewidth": 1.5,
    "legend.edgecolor": "none",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "figure.constrained_layout.use": True,
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """`draw` in our style."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def to_svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element to put into a page: no prolog, no address, no ids that could collide.

    `title` is what a screen reader says, and is to differ between the figures of a page. The same figure gives the
    same text.
    """
    text = StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # The salt makes ids a function of the title and the content, not of the clock.
    style = STYLE | {"svg.hashsalt": f"lowrank_geo {title}"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The reader's browser picks the glyphs; our font only measures them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()
    head, body = svg[svg.index("<svg ") :].split(">", 1)
    head = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", head)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return f'{head} role="img" aria-label="{escape(title)}">{body}'.strip()


def canvas(size: tuple[float, float], x: str, y: str) -> tuple[Figure, Axes]:
    """A figure of the given size in inches with one pair of labelled axes."""
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def log_scale(axes: Axes) -> None:
    """A log y axis with a few labels, whether it spans many decades or a part of one."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = LogLocator(subs=(1,) if high > 1e3 * low else (1, 2, 5))
    axes.yaxis.set_major_locator(ticks if high > 4 * low else MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(readable))
    axes.yaxis.set_minor_locator(NullLocator())


def readable(value: float, _: Any = None) -> str:
    """A number as on paper, without math text.

    >>> readable(0.25), readable(1e-7), readable(5e-7), readable(-2e6)
    ('0.25', '10⁻⁷', '5·10⁻⁷', '-2·10⁶')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    digits = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPT)
    return power if digits == "1" else f"{digits}·{power}"


def legend(axes: Axes, *, above: int = 0) -> None:
    """A legend, if there is anything to tell apart: where it hides least, or `above` the axes in so many columns."""
    if not axes.get_legend_handles_labels()[0]:
        return
    if above:
        axes.legend(
            loc="lower center",
            bbox_to_anchor=(0.45, 1),
            ncols=above,
            columnspacing=0.8,
            handlelength=1.3,
        )
    else:
        axes.legend()


def beside(axes: Axes, x: float, y: float, text: str) -> None:
    """A remark to the right of the end of a bar."""
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5)


def panels(count: int, x: str, y: str) -> tuple[Figure, list[Axes]]:
    """A figure of `count` small axes, four to a row, that share both scales."""
    columns = min(4, max(1, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(FULL[0], 0.7 + 1.6 * rows))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.set_visible(False)
    for axes in grid[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(x)
    figure.supylabel(y)
    return figure, list(grid[: max(count, 1)])


def mark(steps: Sequence[float] | np.ndarray, line: str) -> str:
    """`line` as matplotlib's format, with dots where there are too few points to see a line."""
    return "o" + line if len(steps) < 3 else line


def scale(amount: float, step: int, words: Sequence[str]) -> tuple[int, str]:
    """The largest power of `step` below `amount`, with its word.

    >>> scale(1_890_000, 1000, ("", "thousand", "million"))
    (1000000, 'million')
    """
    exponent = 0
    while amount >= step ** (exponent + 1) and exponent + 1 < len(words):
        exponent += 1
    return step**exponent, words[exponent]


def short(name: str, length: int = 40) -> str:
    """A name cut in its middle to at most `length` characters.

    >>> short("blocks.0.attention.query", 14)
    'blocks…n.query'
    """
    kept = length // 2
    return name if len(name) <= length else f"{name[: kept - 1]}…{name[kept - length :]}"
