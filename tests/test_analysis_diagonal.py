"""diagonal and balance: exponents, limits and the balance law, on runs of the real optimizer."""

import math

import pytest
import torch
from torch import nn

from lowrank_geo.analysis.balance import balance_change, imbalance
from lowrank_geo.analysis.diagonal import implicit_bias, momentum_bias, shrinkage
from lowrank_geo.analysis.diagonal_report import diagonal_report, sparse_problem, train_diagonal
from lowrank_geo.analysis.two_step import two_step
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import HeavyBall

MU = 0.5


@pytest.fixture(scope="module")
def runs():
    """θ, Σ lr r² and u v of runs at lr/(1 − μ)² = 0.04, 0.02, 0.01 from u = v = 0.3."""
    X, y = sparse_problem(0)
    return {lam: train_diagonal(X, y, 0.3, lam * (1 - MU) ** 2, MU) for lam in (0.04, 0.02, 0.01)}


def test_the_exponent_is_within_two_percent_and_halves_its_error(runs):
    method, errors = two_step(HeavyBall(MU)), []
    for lam, (_, squares, product) in runs.items():
        measured = (product / 0.3**2).log()
        expected = shrinkage(method, lam * (1 - MU) ** 2, squares)
        errors.append(float((measured - expected).norm() / expected.norm()))
        closed = -4 * lam * (1 - MU) ** 2 * (1 + MU) / (1 - MU) ** 3 * squares
        assert torch.allclose(expected, closed, rtol=1e-10)
    assert errors[-1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.4)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.4)


def test_the_limit_is_second_order_and_that_of_gradient_flow_first(runs):
    X, y = sparse_problem(0)
    method, scale = two_step(HeavyBall(MU)), torch.full((50,), 0.3**2, dtype=torch.float64)
    plain = implicit_bias(X, y, scale)
    ours, theirs = [], []
    for lam, (theta, squares, _) in runs.items():
        found = momentum_bias(X, y, scale, method, lam * (1 - MU) ** 2, squares)
        ours.append(float((theta - found).norm() / theta.norm()))
        theirs.append(float((theta - plain).norm() / theta.norm()))
    assert [a / b for a, b in zip(ours, ours[1:], strict=False)] == pytest.approx([4, 4], abs=0.6)
    assert [a / b for a, b in zip(theirs, theirs[1:], strict=False)] == pytest.approx(
        [2, 2], abs=0.3
    )
    assert ours[-1] < theirs[-1] / 10


def test_the_report_says_what_the_theory_promises(runs, monkeypatch):
    """The report of the three runs above."""
    done = {lam * (1 - MU) ** 2: run for lam, run in runs.items()}
    monkeypatch.setattr(
        "lowrank_geo.analysis.diagonal_report.train_diagonal",
        lambda X, y, start, lr, mu: done[lr],
    )
    numbers = {what: value for what, value, _ in diagonal_report(MU, 0.04, 0.3, 0).numbers}
    assert float(numbers["error of ln(u v)"].rstrip("%")) < 2
    assert float(numbers["its fall per halving"]) == pytest.approx(4, abs=0.6)
    assert float(numbers["and without"]) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 10.0])
def test_the_bias_is_a_solution_that_no_other_undercuts(scale):
    X, y = sparse_problem(0)
    xi = torch.full((50,), scale, dtype=torch.float64)
    theta = implicit_bias(X, y, xi)
    assert (X @ theta - y).norm() < 1e-10 * y.norm()
    slope = torch.asinh(theta / (2 * xi)) / 4  # of Q, in the row space of X where Q is least
    beside = slope - X.mT @ torch.linalg.lstsq(X.mT, slope).solution
    assert beside.norm() < 1e-7 * slope.norm()


def test_small_scales_are_sparse_and_large_ones_have_the_least_norm():
    X, y = sparse_problem(0)
    small, large = (implicit_bias(X, y, torch.full((50,), s).double()) for s in (1e-12, 1e4))
    assert (small.abs() > 1e-3).sum() == 3
    assert torch.allclose(large, torch.linalg.pinv(X) @ y, atol=1e-6)


def factors_run(lr, mu, time=2.0):
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(8, 7, generator=generator, dtype=torch.float64)
    U, V = (
        nn.Parameter(0.6 * torch.randn(k, 3, generator=generator, dtype=torch.float64))
        for k in (8, 7)
    )
    optimizer = RiemannianSGD([U, V], lr=lr, momentum=mu)
    before, total = imbalance(U.detach(), V.detach()), torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(math.ceil(time * (1 - mu) / lr)):
        gap = U.detach() @ V.detach().mT - target
        U.grad, V.grad = gap @ V.detach(), gap.mT @ U.detach()
        total += lr * (U.grad.mT @ U.grad - V.grad.mT @ V.grad)
        optimizer.step()
    return imbalance(U.detach(), V.detach()) - before, total


@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_the_error_of_the_balance_law_is_linear_in_the_step(mu):
    errors = []
    for lam in (0.02, 0.01, 0.005):
        lr = lam * (1 - mu) ** 2
        change, total = factors_run(lr, mu)
        expected = balance_change(two_step(HeavyBall(mu)), lr, total)
        closed = lr * (1 + mu) / (1 - mu) ** 3 * total
        assert torch.allclose(expected, closed, rtol=1e-9)
        errors.append(float((change - expected).norm() / change.norm()))
    assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx(
        [2, 2], abs=0.15
    )
    assert errors[-1] < 0.05


def test_without_momentum_the_balance_law_is_exact():
    change, total = factors_run(0.02, 0.0)
    assert torch.allclose(change, balance_change(two_step(HeavyBall(0.0)), 0.02, total), rtol=1e-9)


X, Y = sparse_problem(0)
ONES = torch.ones(50, dtype=torch.float64)
BAD = {
    "no scale": (lambda: implicit_bias(X, Y, 0 * ONES), "positive scale .* from 0;"),
    "a short y": (lambda: implicit_bias(X, Y[1:], ONES), r"y \(20,\) .* got \(19,\)"),
    "a row twice": (
        lambda: implicit_bias(torch.cat([X, X[:1]]), torch.cat([Y, Y[:1]]), ONES),
        "independent rows of X, got rank 20 of 21",
    ),
    "two ranks": (lambda: imbalance(X, Y[:, None]), r"one rank, got \(20, 50\) and \(20, 1\)"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
