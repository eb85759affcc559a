"""The figures of a report: one pure function per figure, from plain numbers to a matplotlib `Figure`."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from lowrank_geo.canvas import (
    COLOURS,
    DASHES,
    FAINT,
    FULL,
    GREY,
    HALF,
    PALE,
    STEP,
    Axes,
    Figure,
    MaxNLocator,
    beside,
    canvas,
    legend,
    log_scale,
    mark,
    panels,
    scale,
    short,
    styled,
)
from lowrank_geo.recorded import History, Series, groups, quantiles, running_mean

POINTS = 600  # of one drawn curve; 7 inches show no more
NAMED = 40  # the most layers whose bars have room for their names
FLOOR = 1e-6  # of the largest value: where smaller ones are drawn on a log axis
FAN = (0, 0.1, 0.5, 0.9, 1)  # quantiles of the singular values of one kind of layer
DRIFT = 1e-5  # the bound on |UᵀU − I| after 10 000 float32 steps
SIGMA = "singular value σ (units of W)"


@styled
def loss(train: Series, held_out: Series, *, unit: str = "nats per token") -> Figure:
    """Training loss, raw and as a running mean, with the loss on held-out text."""
    figure, axes = canvas(FULL, STEP, f"loss ({unit})")
    raw = _finite(train)
    if len(raw.steps):
        reach = len(raw.steps) // 40
        if reach:
            axes.plot(*_thin(raw), color=PALE, linewidth=0.8, label="training, each record")
        mean = Series(raw.steps, running_mean(np.asarray(raw.values), reach))
        axes.plot(*_thin(mean), color=COLOURS[0], label="training" + ", running mean" * bool(reach))
    if len(held_out.steps):
        axes.plot(*_finite(held_out), "o--", color=COLOURS[1], markersize=4, label="held-out")
    legend(axes)
    return figure


@styled
def learning_rate(series: Series) -> Figure:
    """The learning rate of the low-rank layers."""
    figure, axes = canvas(HALF, STEP, "learning rate (per update)")
    axes.plot(*_thin(_finite(series)), color=COLOURS[0])
    axes.set_ylim(bottom=0)
    return figure


@styled
def gradient_norm(series: Series) -> Figure:
    """The norm of the whole gradient before clipping."""
    figure, axes = canvas(HALF, STEP, "gradient norm (loss per weight)")
    steps, values = _thin(_finite(series))
    axes.plot(steps, _above_floor(np.asarray(values)), color=COLOURS[0], linewidth=0.9)
    log_scale(axes)
    return figure


@styled
def ranks(names: Sequence[str], ranks: Sequence[int], full: Sequence[int]) -> Figure:
    """The rank of each layer, in the order of the model, before its full rank min(m, n) in grey."""
    count = len(names)
    if count > NAMED:
        return _ranks_by_kind(names, ranks, full)
    size = (FULL[0], 0.8 + 0.17 * max(count, 3))
    label = "rank r, before the full rank min(m, n) in grey (columns)"
    figure, axes = canvas(size, label, "layer (in the order of the model)")
    places = list(range(count))
    axes.barh(places, full, color=FAINT, height=0.72)
    axes.barh(places, ranks, color=COLOURS[0], height=0.72)
    for place, rank, most in zip(places, ranks, full, strict=True):
        beside(axes, most, place, f"{rank} of {most} ({rank / most:.0%})")
    axes.set_yticks(places, [short(name) for name in names])
    axes.set_xlim(0, 1.25 * max(full, default=1))
    axes.set_ylim(count - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    return figure


def _ranks_by_kind(names: Sequence[str], ranks: Sequence[int], full: Sequence[int]) -> Figure:
    kinds, place = groups(names), {name: at for at, name in enumerate(names)}
    label = "layer of its kind (number in the order of the model)"
    figure, grid = panels(len(kinds), label, "rank r; grey: min(m, n) (columns)")
    for axes, (kind, members), colour in zip(grid, kinds.items(), COLOURS, strict=False):
        numbers, at = range(1, len(members) + 1), [place[name] for name in members]
        axes.bar(numbers, [full[i] for i in at], width=1.0, color=FAINT)
        axes.bar(numbers, [ranks[i] for i in at], width=0.8, color=colour)
        axes.set_title(short(kind, 24))
        axes.grid(visible=False, axis="x")
    return figure


@styled
def spectra(history: History[Sequence[float]]) -> Figure:
    """How the singular values spread over training: a fan of quantiles for each kind of layer."""
    kinds = groups(list(dict.fromkeys(name for _, layers in history for name in layers)))
    figure, grid = panels(len(kinds), STEP, SIGMA)
    for axes, (kind, members), colour in zip(grid, kinds.items(), COLOURS, strict=False):
        mine = [(step, {n: layers[n] for n in members if n in layers}) for step, layers in history]
        steps, fan = quantiles(mine, FAN)
        _fan(axes, steps, _above_floor(fan), colour)
        axes.set_title(short(kind, 24))
    log_scale(grid[0])
    return figure


@styled
def final_spectra(layers: Mapping[str, Sequence[float]], count: int = 4) -> Figure:
    """The singular values of `count` layers, evenly chosen from the best to the worst conditioned."""
    figure, axes = canvas(HALF, "index of the singular value (from 1)", SIGMA)
    known = {
        name: values for name, values in layers.items() if np.isfinite(values).all() and len(values)
    }
    by_condition = sorted(known, key=lambda name: -min(known[name]) / (max(known[name]) or 1))
    chosen = np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round()).astype(int)
    for place, colour, dash in zip(chosen, COLOURS, DASHES, strict=False):
        values = _above_floor(np.asarray(known[by_condition[place]], dtype=float))
        label = short(by_condition[place], 20)
        axes.plot(range(1, len(values) + 1), values, dash, color=colour, label=label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    log_scale(axes)
    legend(axes, above=2)
    return figure


@styled
def orthonormality(history: History[float]) -> Figure:
    """The drift |UᵀU − I| of the frames: the worst layer, the median and the bound we promise."""
    figure, axes = canvas(HALF, STEP, "max |UᵀU − I|, |VᵀV − I| (no unit)")
    steps, (median, worst) = quantiles(history, (0.5, 1))
    axes.plot(steps, worst.clip(1e-9), mark(steps, "-"), color=COLOURS[1], label="worst layer")
    axes.plot(steps, median.clip(1e-9), mark(steps, "--"), color=COLOURS[0], label="median layer")
    axes.axhline(DRIFT, color=GREY, linestyle=":", label="bound 10⁻⁵")
    log_scale(axes)
    legend(axes)
    return figure


@styled
def contraction(history: History[float]) -> Figure:
    """How much of the momentum survives the move to the new tangent space: τ = |Tξ|/|ξ|."""
    figure, axes = canvas(HALF, STEP, "contraction τ = |Tξ| / |ξ| (no unit)")
    steps, (lowest, median) = quantiles(history, (0, 0.5))
    axes.plot(steps, median, mark(steps, "--"), color=COLOURS[0], label="median layer")
    axes.plot(steps, lowest, mark(steps, "-"), color=COLOURS[1], label="lowest layer")
    axes.axhline(1, color=GREY, linestyle=":", label="nothing lost")
    legend(axes, above=3)
    return figure


@styled
def parameters(dense: tuple[int, int], low_rank: tuple[int, int], *, bytes_each: int = 4) -> Figure:
    """The dense model against ours: (parameters of the layers we factor, all the others), also in bytes."""
    unit, word = scale(sum(dense), 1000, ("", "thousand", "million", "billion", "trillion"))
    figure, axes = canvas(HALF, f"parameters ({word or 'count'})", "model (weights)")
    places, totals = (0, 1), (sum(dense), sum(low_rank))
    factored = np.array([dense[0], low_rank[0]]) / unit
    rest = np.array([dense[1], low_rank[1]]) / unit
    axes.barh(places, factored, color=COLOURS[0], height=0.5, label="layers in the plan")
    axes.barh(places, rest, left=factored, color=COLOURS[5], height=0.5, label="all others")
    for place, total in zip(places, totals, strict=True):
        share = f"{total / unit:.3g} ({total / max(sum(dense), 1):.0%})"
        beside(axes, total / unit, place, share)
    axes.set_yticks(places, ["dense", "low-rank"])
    axes.set_xlim(0, 1.35 * max(*totals, 1) / unit)
    axes.set_ylim(1.6, -0.6)
    axes.grid(visible=False, axis="y")
    size, name = scale(sum(dense) * bytes_each, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))
    factor = unit * bytes_each / size
    top = axes.secondary_xaxis(
        "top", functions=(partial(np.multiply, factor), partial(np.multiply, 1 / factor))
    )
    top.set_xlabel(f"bytes at {bytes_each} a parameter ({name})")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2)
    return figure


def _fan(axes: Axes, steps: np.ndarray, fan: np.ndarray, colour: str) -> None:
    for low, high, alpha in ((0, 4, 0.18), (1, 3, 0.35)):
        axes.fill_between(steps, fan[low], fan[high], color=colour, alpha=alpha, linewidth=0)
    axes.plot(steps, fan[2], mark(steps, "-"), color=colour)


def _finite(series: Series) -> Series:
    steps, values = (np.asarray(column, dtype=float) for column in series)
    kept = np.isfinite(values)
    return Series(steps[kept], values[kept])


def _thin(series: Series) -> Series:
    steps, values = map(np.asarray, series)
    kept = np.unique(np.linspace(0, max(len(steps) - 1, 0), min(POINTS, len(steps))).astype(int))
    return Series(steps[kept], values[kept])


def _above_floor(values: np.ndarray) -> np.ndarray:
    return values.clip(max(FLOOR * np.max(values, initial=0), 1e-30))
