"""plots and canvas: every figure draws what it is given, says what its axes are, and becomes safe SVG."""

import functools
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest

from lowrank_geo import canvas, plots
from lowrank_geo.recorded import Series

HOSTILE = "blocks.0.<script>alert('$x$')</script>\"&"
STEPS = [1, 50, 100]
SERIES = Series(STEPS, [3.0, 2.0, 1.5])
LAYERS = ["blocks.0.q", "blocks.0.up", "blocks.1.q"]
SPECTRA = [(s, {n: [3.0 + s, 2.0, 0.5] for n in LAYERS}) for s in STEPS]
HISTORY = [(s, {n: 0.1 * s + i for i, n in enumerate(LAYERS)}) for s in STEPS]
FIGURES = {
    "loss": lambda: plots.loss(SERIES, Series([50, 100], [2.2, 1.8]), unit="nats per byte"),
    "learning_rate": lambda: plots.learning_rate(SERIES),
    "gradient_norm": lambda: plots.gradient_norm(SERIES),
    "ranks": lambda: plots.ranks(LAYERS, [4, 8, 2], [16, 16, 8]),
    "ranks_of_200": lambda: plots.ranks([f"b.{i}.q" for i in range(200)], [4] * 200, [9] * 200),
    "spectra": lambda: plots.spectra(SPECTRA),
    "final_spectra": lambda: plots.final_spectra(SPECTRA[-1][1]),
    "orthonormality": lambda: plots.orthonormality(HISTORY),
    "contraction": lambda: plots.contraction(HISTORY),
    "parameters": lambda: plots.parameters((900, 100), (300, 100)),
}
ODD = {
    "loss of nothing": lambda: plots.loss(Series([], []), Series([], [])),
    "learning_rate of nothing": lambda: plots.learning_rate(Series([], [])),
    "gradient_norm of nothing": lambda: plots.gradient_norm(Series([], [])),
    "ranks of nothing": lambda: plots.ranks([], [], []),
    "spectra of nothing": lambda: plots.spectra([]),
    "final_spectra of nothing": lambda: plots.final_spectra({}),
    "orthonormality of nothing": lambda: plots.orthonormality([]),
    "contraction of nothing": lambda: plots.contraction([(1, {})]),
    "parameters of nothing": lambda: plots.parameters((0, 0), (0, 0)),
    "loss of extremes": lambda: plots.loss(Series([1, 2], [np.nan, np.inf]), Series([2], [1e30])),
    "gradient_norm of extremes": lambda: plots.gradient_norm(Series([1, 2], [0.0, 0.0])),
    "spectra of extremes": lambda: plots.spectra(
        [(1, {"a": [0.0, 0.0]}), (2, {"a": [], "b": [np.nan]})]
    ),
    "final_spectra of extremes": lambda: plots.final_spectra({"a": [0.0], "b": [np.nan], "c": []}),
    "orthonormality of extremes": lambda: plots.orthonormality([(1, {"a": 0.0})]),
    "parameters of extremes": lambda: plots.parameters((10**12, 1), (10**11, 1)),
}


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_says_what_it_shows_and_in_which_unit(name):
    figure = FIGURES[name]()
    shared = figure.get_supxlabel(), figure.get_supylabel()
    labels = [shared] if all(shared) else [(a.get_xlabel(), a.get_ylabel()) for a in figure.axes]
    for x, y in labels:
        assert "(" in x and "(" in y


@functools.cache
def svg(name):
    return canvas.to_svg({**FIGURES, **ODD}[name](), 'a "title" <b>')


@pytest.mark.parametrize("name", [*FIGURES, *ODD])
def test_becomes_one_inline_element_that_loads_nothing(name):
    assert svg(name).startswith("<svg") and svg(name).endswith("</svg>")
    assert "http" not in svg(name) and "<?xml" not in svg(name) and "<!DOCTYPE" not in svg(name)
    assert 'aria-label="a &quot;title&quot; &lt;b&gt;"' in svg(name)


@pytest.mark.parametrize("name", ["loss", "ranks"])
def test_the_same_numbers_give_the_same_bytes(name):
    assert canvas.to_svg(FIGURES[name](), 'a "title" <b>') == svg(name)


def test_figures_share_a_page_without_sharing_an_id():
    pages = [_ids(canvas.to_svg(FIGURES["loss"](), title)) for title in ("one", "two")]
    assert pages[0] and not set(pages[0]) & set(pages[1])
    for name in FIGURES:
        assert all(re.fullmatch("[mp][0-9a-f]{8,}", found) for found in _ids(svg(name)))


def _ids(svg):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.extend(v for k, v in attrs if k == "id")
    parser.handle_startendtag = parser.handle_starttag
    parser.feed(svg)
    return found


def test_drawing_leaves_the_users_settings_alone():
    before = dict(matplotlib.rcParams)
    canvas.to_svg(FIGURES["spectra"](), "x")
    assert dict(matplotlib.rcParams) == before


def test_a_hostile_layer_name_stays_text():
    name, other = HOSTILE, "blocks.0.數"
    figures = [
        plots.ranks([name, other], [1, 2], [4, 4]),
        plots.ranks([f"{name}.{i}" for i in range(50)], [1] * 50, [4] * 50),
        plots.spectra([(1, {name: [2.0, 1.0]})]),
        plots.final_spectra({name: [2.0, 1.0], other: [1.0]}),
    ]
    for figure in figures:
        drawn = canvas.to_svg(figure, name)
        assert "<script" not in drawn and "&lt;script&gt;" in drawn


def test_loss_draws_training_its_mean_and_held_out():
    [axes] = FIGURES["loss"]().axes
    drawn = lines(axes)
    assert drawn["training"].get_xydata().tolist() == [[1, 3], [50, 2], [100, 1.5]]
    assert drawn["held-out"].get_xydata().tolist() == [[50, 2.2], [100, 1.8]]
    assert axes.get_ylabel() == "loss (nats per byte)"
    [axes] = plots.loss(Series(range(80), range(80)), Series([], [])).axes
    assert list(lines(axes)) == ["training, each record", "training, running mean"]


def test_a_long_run_is_thinned_but_keeps_its_ends_and_its_level():
    steps = np.arange(10_000)
    noise = np.random.default_rng(0).normal(size=10_000)
    [axes] = plots.loss(Series(steps, 5 + noise), Series([], [])).axes
    raw, mean = (line.get_xydata() for line in axes.get_lines())
    assert len(raw) == len(mean) == plots.POINTS
    assert raw[0, 0] == 0 and raw[-1, 0] == 9_999
    assert np.abs(mean[20:-20, 1] - 5).max() < 0.5 < raw[:, 1].std()


def test_numbers_that_are_not_finite_leave_a_gap_in_the_loss():
    [axes] = plots.loss(Series([1, 2, 3], [2.0, np.nan, 1.0]), Series([], [])).axes
    assert lines(axes)["training"].get_xydata().tolist() == [[1, 2], [3, 1]]


def test_learning_rate_and_gradient_norm_draw_their_series():
    for draw in (plots.learning_rate, plots.gradient_norm):
        [axes] = draw(SERIES).axes
        assert axes.get_lines()[0].get_ydata().tolist() == [3, 2, 1.5]


def test_ranks_are_bars_in_the_order_of_the_model_with_their_ratio():
    [axes] = FIGURES["ranks"]().axes
    full, ranks = ([bar.get_width() for bar in group] for group in axes.containers)
    assert full == [16, 16, 8] and ranks == [4, 8, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == LAYERS
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first layer is on top
    assert axes.texts[0].get_text() == "4 of 16 (25%)"


def test_ranks_of_many_layers_have_one_panel_for_each_kind():
    names = [f"blocks.{i}.{kind}" for i in range(30) for kind in ("q", "up")]
    figure = plots.ranks(names, list(range(1, 61)), [64] * 60)
    assert [axes.get_title() for axes in figure.axes] == ["blocks.q", "blocks.up"]
    heights = [bar.get_height() for bar in figure.axes[1].containers[1]]
    assert heights == list(range(2, 61, 2))
    assert figure.get_figheight() < 5


def test_spectra_have_a_fan_for_each_kind_with_its_median():
    figure = FIGURES["spectra"]()
    assert [axes.get_title() for axes in figure.axes] == ["blocks.q", "blocks.up"]
    for axes in figure.axes:
        assert axes.get_lines()[0].get_xydata().tolist() == [[1, 2], [50, 2], [100, 2]]
        light = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (light.min(), light.max()) == (0.5, 103)
        assert axes.get_yscale() == "log"


def test_vanished_singular_values_are_drawn_at_the_floor():
    figure = plots.spectra([(1, {"a": [2.0, 0.0]}), (2, {"a": [2.0, 0.0]})])
    assert figure.axes[0].collections[0].get_paths()[0].vertices[:, 1].min() == 2 * plots.FLOOR


def test_final_spectra_show_the_best_and_the_worst_conditioned_layer():
    layers = {f"l{i}": [1.0, 10.0**-i] for i in range(9)}
    [axes] = plots.final_spectra(layers, count=3).axes
    drawn = lines(axes)
    assert list(drawn) == ["l0", "l4", "l8"]
    assert drawn["l4"].get_xydata().tolist() == [[1, 1], [2, 1e-4]]


def test_orthonormality_shows_worst_median_and_bound():
    [axes] = FIGURES["orthonormality"]().axes
    drawn = lines(axes)
    assert drawn["worst layer"].get_ydata() == pytest.approx([2.1, 7, 12])
    assert drawn["median layer"].get_ydata() == pytest.approx([1.1, 6, 11])
    assert drawn["bound 10⁻⁵"].get_ydata() == [1e-5, 1e-5]
    assert axes.get_yscale() == "log"


def test_contraction_shows_median_and_lowest():
    [axes] = FIGURES["contraction"]().axes
    drawn = lines(axes)
    assert drawn["lowest layer"].get_ydata() == pytest.approx([0.1, 5, 10])
    assert drawn["median layer"].get_ydata() == pytest.approx([1.1, 6, 11])


def test_a_contraction_close_to_1_is_labelled_in_full():
    figure = plots.contraction([(1, {"a": 0.99991}), (2, {"a": 0.99999})])
    assert (
        "0.99996" in canvas.to_svg(figure, "x")
        and not figure.axes[0].yaxis.get_offset_text().get_text()
    )


def test_parameters_stack_to_the_totals_and_bytes_follow():
    figure = plots.parameters((1_500_000, 500_000), (700_000, 500_000))
    [axes] = figure.axes
    planned, others = ([bar.get_width() for bar in group] for group in axes.containers)
    assert planned == [1.5, 0.7] and others == [0.5, 0.5]
    assert [text.get_text() for text in axes.texts] == ["2 (100%)", "1.2 (60%)"]
    canvas.to_svg(figure, "x")
    [top] = axes.child_axes
    assert top.get_xlim()[1] / axes.get_xlim()[1] == pytest.approx(4e6 / 2**20)
    assert "MiB" in top.get_xlabel()


@pytest.mark.parametrize("low, high", [(1.0, 1.8), (0.3, 3.0), (1e-7, 1e-5), (1e-6, 10.0)])
def test_a_log_axis_has_labels_whatever_it_spans(low, high):
    figure, axes = canvas.canvas(canvas.HALF, "x", "y")
    axes.plot([0, 1], [low, high])
    canvas.log_scale(axes)
    bottom, top = axes.get_ylim()
    ticks = [t for t in axes.yaxis.get_majorticklocs() if bottom <= t <= top]
    assert 2 <= len(ticks) <= 9
    assert "mathdefault" not in canvas.to_svg(figure, "x")
