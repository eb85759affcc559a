"""advice, reports and the command line: what is printed is right, pages stand alone, bad input ends with a sentence."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lowrank_geo.analysis import qhm
from lowrank_geo.analysis.advice import METHODS, Problem, advise
from lowrank_geo.analysis.balance_report import balance_report
from lowrank_geo.analysis.conditions import PowerSchedule
from lowrank_geo.analysis.diagonal_report import diagonal_report
from lowrank_geo.analysis.flow_report import flow_report, rates_by_order
from lowrank_geo.analysis.frequency_report import frequency_report
from lowrank_geo.analysis.qhm_report import advice_report
from lowrank_geo.analysis.schedule_report import schedule_report
from lowrank_geo.cli.app import app
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import QHM

NOISY = Problem(0.1, 40.0, 0.3)


def descend(optimizer, x, curvature, noise, steps):
    """The mean loss over the last 20 steps."""
    losses = []
    for step in range(steps):
        if step >= steps - 20:
            losses.append(float((curvature * x.detach().square() / 2).sum(-1).mean()))
        x.grad = curvature * x.detach() + noise * torch.randn_like(x)
        optimizer.step()
    return float(np.mean(losses))


@pytest.mark.parametrize("optimizer", METHODS)
def test_the_advice_is_kept_by_the_real_optimizer(optimizer):
    """What is promised for the end of the run is measured, from the code that is printed."""
    found = advise(NOISY, optimizer)
    x = nn.Parameter(torch.zeros(2000, 2, dtype=torch.float64))
    made = eval(found.code(), {"RiemannianSGD": RiemannianSGD, "QHM": QHM, "params": [x]})
    curvature = torch.tensor([0.1, 40.0], dtype=torch.float64)
    loss = descend(made, x, curvature, 0.3, 3000)
    assert loss == pytest.approx(found.floor, rel=0.1)
    assert found.alpha < qhm.alpha_max(found.beta, found.nu, 40.0)


def test_more_freedom_is_never_worse():
    def total(optimizer):
        found = advise(NOISY, optimizer)
        return found.rate ** (2 * NOISY.steps) + found.floor

    assert total("qhm") <= min(total("heavy-ball"), total("sgd"))


def test_more_noise_means_shorter_steps_and_none_the_fastest():
    alphas = [advise(NOISY._replace(noise=s), "qhm").alpha for s in (0.0, 0.1, 1.0, 10.0)]
    assert alphas == sorted(alphas, reverse=True)
    quiet = advise(NOISY._replace(noise=0.0), "heavy-ball")
    assert quiet.rate < 0.912 and quiet.floor == 0.0


def test_the_error_of_the_decay_rate_by_order():
    found = rates_by_order(0.9, np.array([0.002, 0.0005]), 4)
    assert found[:, 0] == pytest.approx([0.25, 0.11, 0.06, 0.034], rel=0.035)
    assert found[:, 1] == pytest.approx([0.05, 0.005, 0.0006, 0.00008], rel=0.12)


REPORTS = {
    "flow": lambda: flow_report(0.5, 0.03, 1.0, 3, 40),
    "frequency": lambda: frequency_report("fsgdm", 100, "cosine", 1.0),
    "contracted": lambda: frequency_report("sgd", 100, "constant", 0.99),
    "advice": lambda: advice_report(NOISY, "qhm"),
    "balance": lambda: balance_report(0.5, 0.02, 1),
    "diagonal": lambda: diagonal_report(0.5, 0.08, 0.5, 0),
    "schedule": lambda: schedule_report(PowerSchedule(0.5, w=0.75, d=0.5, nu=0.7), 1.0, 600, 0),
}


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS)
def test_a_page_stands_alone(make, tmp_path):
    report = make()
    text = report.write(tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<svg ") == len(report.figures) > 0
    assert "<image" not in text and "<script" not in text and 'href="http' not in text
    for what, value, _ in report.numbers:
        assert what in text and value.split(" ")[0] in text
    for _, figure, _ in report.figures:
        assert all("(" in axes.get_ylabel() for axes in figure.axes), "units on every axis"


def test_the_reports_say_what_was_measured():
    numbers = {
        what: value for what, value, _ in frequency_report("fsgdm", 500, "cosine", 1).numbers
    }
    assert float(numbers["measured − formula"]) < 1e-4
    assert float(numbers["gain at ω = 0"]) == pytest.approx(1 + 1 / 0.033, rel=0.01)
    numbers = {what: value for what, value, _ in flow_report(0.9, 1e-3, 1.0, 2, 50).numbers}
    assert float(numbers["exact flow"]) < 1e-12
    assert float(numbers["validity bound on η·λ"]) == pytest.approx(
        (1 - math.sqrt(0.9)) ** 2, rel=1e-3
    )


def test_the_report_of_balance_says_what_the_theory_promises():
    numbers = {what: value for what, value, _ in balance_report(0.9, 0.04, 1).numbers}
    assert float(numbers["its fall per halving"]) == pytest.approx(2, abs=0.15)


def test_the_report_of_a_schedule_says_whether_a_theorem_covers_it():
    inside = schedule_report(PowerSchedule(0.5, w=0.75, d=0.5, nu=0.7), 1.0, 2000, 0)
    outside = schedule_report(PowerSchedule(0.1, nu=0.7), 1.0, 2000, 0)
    assert (inside.status, outside.status) == ("inside the theorems", "outside the theorems")
    ends = [{a: b for a, b, _ in x.numbers} for x in (inside, outside)]
    assert float(ends[0]["loss at the end"]) < 0.3 * float(ends[0]["of constant settings"])
    assert float(ends[1]["loss at the end"]) == pytest.approx(
        float(ends[1]["their stationary loss"]), rel=0.15
    )


COMMANDS = [
    ["balance", "--mu", "0", "--lam", "0.05"],
    ["schedule", "--steps", "50"],
    ["diagonal", "--lam", "0.08", "--start", "0.5"],
    ["flow", "--mu", "0.5", "--eta", "0.02", "--steps", "20", "--order", "2"],
    ["qhm", "--nu", "1"],
    ["frequency", "--optimizer", "lion", "--steps", "50"],
    [
        "advise",
        "--curvature-max",
        "40",
        "--curvature-min",
        "0.1",
        "--noise",
        "0.3",
        "--optimizer",
        "qhm",
    ],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_the_commands_print_and_write(command, tmp_path):
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["analyze", *command, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"report: {out}" in result.output
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


BAD = {
    "mu": (["flow", "--mu", "1"], "mu in [0, 1), got 1.0"),
    "order": (["flow", "--order", "9"], "order between 1 and 4, got 9"),
    "too long a step": (["flow", "--eta", "0.1"], "lr·λ < 0.00263, got 0.1; lower lr below"),
    "a curvature": (["flow", "--curvature", "-1"], "curvatures > 0, got [-1.0]"),
    "nu": (["qhm", "--nu", "3"], "nu in [0, 1], got 3.0"),
    "beta": (["qhm", "--beta", "1"], "beta in [0, 1), got 1.0"),
    "an optimizer": (["frequency", "--optimizer", "adamw"], "got 'adamw'; not one of torch"),
    "a schedule": (["frequency", "--schedule", "cos"], "constant, cosine, linear, got 'cos'"),
    "tau": (["frequency", "--contraction", "2"], "in [0, 1], got 2.0"),
    "no steps": (["frequency", "--optimizer", "sgd", "--steps", "0"], "got 0"),
    "exchanged": (["advise", "--curvature-max", "1", "--curvature-min", "2"], "got 2 and 1;"),
    "noise": (
        ["advise", "--curvature-max", "2", "--curvature-min", "1", "--noise", "-1"],
        "noise between 0 and 1e+100, got -1.0",
    ),
    "a method": (
        ["advise", "--curvature-max", "2", "--curvature-min", "1", "--optimizer", "adam"],
        "sgd, heavy-ball, nesterov, qhm, got 'adam'",
    ),
    "a start": (["diagonal", "--start", "0"], "start > 0, got 0.0"),
    "a run that diverges": (["diagonal", "--lam", "20"], "a run that converges, got"),
    "a balance that diverges": (["balance", "--lam", "9"], "got lam 9 with an error of"),
    "no momentum at all": (["balance", "--mu", "-1"], "mu in [0, 1), got -1.0"),
    "a power": (["schedule", "--w", "-1"], "w >= 0, got -1.0"),
    "two powers": (["schedule", "--c", "0.5", "--d", "0.5"], "c or d to be 0, got 0.5 and 0.5"),
    "few steps": (["schedule", "--steps", "3"], "steps >= 10, got 3"),
    "noise of qhm": (["qhm", "--noise", "-1"], "analyze qhm needs noise between 0 and"),
    "no number of noise": (["qhm", "--noise", "nan"], "1e+100, got nan; pass the standard"),
    "noise without a square": (
        ["advise", "--curvature-max", "2", "--curvature-min", "1", "--noise", "1e200"],
        "got 1e+200; pass the standard deviation",
    ),
    "exchanged curvatures": (
        ["qhm", "--curvature-max", "0.1", "--curvature-min", "10"],
        "analyze qhm needs curvature_min <= curvature_max, got 10 and 0.1",
    ),
    "curvatures without a ratio": (
        ["advise", "--curvature-max", "1e300", "--curvature-min", "1e-300"],
        "advise needs curvature_max <= 1e+12 curvature_min, got 1e-300 and 1e+300",
    ),
    "negative steps": (["flow", "--steps", "-3"], "analyze flow needs steps >= 2, got -3"),
    "no learning rate": (["flow", "--eta", "nan"], "analyze flow needs eta > 0, got nan"),
    "no power": (["schedule", "--w", "nan"], "w >= 0, got nan"),
    "a whole order": (["flow", "--order", "0"], "order between 1 and 4, got 0"),
    "no folder": (["qhm", "--out", "/nowhere/a.html"], "a folder that exists, got /nowhere"),
    "a folder": (["qhm", "--out", "/tmp"], "the name of a file, got the folder /tmp;"),
}


@pytest.mark.parametrize("command, told", BAD.values(), ids=BAD)
def test_bad_input_ends_with_a_sentence_and_code_2(command, told, tmp_path):
    out = tmp_path / "report.html"
    command = command if "--out" in command else [*command, "--out", str(out)]
    result = CliRunner().invoke(app, ["analyze", *command])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1 and result.output.startswith("error: ")
    assert told in result.output and not out.exists()


def test_importing_the_laboratory_loads_neither_scipy_nor_matplotlib():
    code = "import lowrank_geo.analysis, sys; print({'scipy', 'matplotlib', 'typer'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
