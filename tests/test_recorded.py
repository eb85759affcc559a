"""recorded: what is read from metrics.jsonl, and how it is condensed."""

import json

import numpy as np
import pytest

from lowrank_geo.recorded import groups, number, printable, quantiles, read_metrics, running_mean


def write(path, *lines):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (path / "metrics.jsonl").write_text("\n".join(text), encoding="utf-8")


def test_lines_become_series_by_quantity(tmp_path):
    write(
        tmp_path,
        {"kind": "train", "step": 1, "loss": 3.0, "lr": 0.1},
        {"kind": "train", "step": 2, "loss": 2.0},
        {"kind": "eval", "step": 2, "loss": 2.5},
        {"kind": "diagnostics", "step": 2, "ranks": {"a": 4}, "spectra": {"a": [2, 1]}},
    )
    metrics = read_metrics(tmp_path)
    assert metrics.train["loss"] == ([1, 2], [3, 2]) and metrics.train["lr"] == ([1], [0.1])
    assert metrics.held_out == ([2], [2.5])
    assert metrics.layers["ranks"] == [(2, {"a": 4})]
    assert metrics.layers["spectra"] == [(2, {"a": [2, 1]})]
    assert metrics.layers["transport"] == [(2, {})]


def test_a_half_written_line_and_foreign_lines_are_skipped(tmp_path):
    good = {"kind": "train", "step": 1, "loss": 3.0}
    foreign = ["[1, 2]", "null", '{"kind": "train"}', '{"step": 3}', "[" * 100_000, ""]
    write(
        tmp_path, *foreign, {"kind": "other", "step": 1}, good, '{"kind": "train", "step": 2, "lo'
    )
    assert read_metrics(tmp_path).train == {"loss": ([1], [3])}


def test_bytes_that_are_no_text_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n{"kind": "eval", "step": 1, "loss": 3}\n\x00'
    )
    assert read_metrics(tmp_path).held_out == ([1], [3])


def test_a_run_without_metrics_has_empty_series(tmp_path):
    metrics = read_metrics(tmp_path)
    assert metrics.train == {} and not metrics.held_out.steps and not metrics.layers["ranks"]


def test_steps_are_sorted_and_the_last_of_two_records_of_one_counts(tmp_path):
    steps = [(2, 4.0), (3, 9.0), (1, 5.0), (2, 4.5), (3, 3.0)]
    write(tmp_path, *({"kind": "train", "step": s, "loss": x} for s, x in steps))
    assert read_metrics(tmp_path).train["loss"] == ([1, 2, 3], [5, 4.5, 3])


def test_values_that_are_no_finite_numbers_are_left_out(tmp_path):
    spectra = {"a": [2, None, "x", float("nan")], "b": "wide", "c": None}
    write(
        tmp_path,
        {"kind": "train", "step": 1, "loss": float("nan")},
        {"kind": "train", "step": 2, "loss": "low"},
        {"kind": "train", "step": 3, "loss": True},
        '{"kind": "train", "step": 4, "loss": 1' + "0" * 400 + "}",
        {"kind": "diagnostics", "step": 1, "spectra": spectra, "ranks": [1]},
    )
    metrics = read_metrics(tmp_path)
    assert metrics.train["loss"] == ([], [])
    assert metrics.layers["spectra"] == [(1, {"a": [2]})] and metrics.layers["ranks"] == [(1, {})]


def test_names_lose_control_characters(tmp_path):
    write(tmp_path, {"kind": "diagnostics", "step": 1, "ranks": {"a\x1b[2J\ud800": 3}})
    assert read_metrics(tmp_path).layers["ranks"] == [(1, {"a\ufffd[2J\ufffd": 3})]
    assert printable("blöcke.0 q") == "blöcke.0 q"


@pytest.mark.parametrize("value", [None, "1", True, float("inf"), -float("inf"), [1], 10**400])
def test_number_refuses(value):
    assert number(value) is None


def test_quantiles_are_those_of_all_layers_of_a_step():
    history = [(1, {"a": [1.0, 2.0], "b": [3.0]}), (2, {"a": []}), (3, {"b": [np.nan, 7.0]})]
    steps, (low, median, high) = quantiles(history, (0, 0.5, 1))
    assert steps.tolist() == [1, 3]
    assert (low.tolist(), median.tolist(), high.tolist()) == ([1, 7], [2, 7], [3, 7])


def test_quantiles_of_nothing_are_empty():
    steps, columns = quantiles([], (0, 0.5, 1))
    assert steps.shape == (0,) and columns.shape == (3, 0)


def test_kinds_beyond_the_most_are_pooled_and_none_is_lost():
    names = [f"part{i}.{j}" for i in range(10) for j in range(3)]
    kinds = groups(names, most=7)
    assert len(kinds) == 7 and len(kinds["other layers"]) == 12
    assert sorted(sum(kinds.values(), [])) == sorted(names)


def test_layers_without_words_are_one_kind():
    assert groups(["0", "2", "4.1"]) == {"layers": ["0", "2", "4.1"]}


def test_running_mean_keeps_a_straight_line_and_the_ends():
    line = np.arange(20.0)
    assert running_mean(line, 5) == pytest.approx(line)
    noisy = np.random.default_rng(0).normal(size=50)
    smooth = running_mean(noisy, 3)
    assert (smooth[0], smooth[-1]) == pytest.approx((noisy[0], noisy[-1]))
    assert smooth[10] == pytest.approx(noisy[7:14].mean())
