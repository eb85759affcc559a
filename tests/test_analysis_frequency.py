"""frequency and measured: the formula against the state of the real optimizers, gains, refusals."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_geo.analysis.frequency import (
    dynamic_response,
    effective_gain,
    frequency_response,
    gain,
    gradient_weights,
    matched_lr,
)
from lowrank_geo.analysis.measured import frequency_response_of
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    RiemannianAdam,
    RiemannianLion,
    RiemannianMuon,
    RiemannianSGD,
    param_groups,
)
from lowrank_geo.optim.filters import EMA, FSGDM, QHM, HeavyBall, Nesterov, NesterovEMA

OMEGA = [0.0, 0.1, 1.0, math.pi]
FILTERS = [
    HeavyBall(0.9),
    HeavyBall(0.0),
    Nesterov(0.8),
    EMA(0.9),
    EMA(0.9, unbiased=True),
    NesterovEMA(0.7),
    QHM(0.7, 0.95),
    FSGDM(1000),
]


def test_the_numbers_of_the_paper():
    heavy, average = (abs(frequency_response(f, OMEGA)) for f in (HeavyBall(0.9), EMA(0.9)))
    assert heavy == pytest.approx([10, 7.2562, 1.0927, 0.5263], abs=1e-4)
    assert average[[0, 3]] == pytest.approx([1, 0.0526], abs=1e-4)
    end = abs(frequency_response(FSGDM(1000), [0, math.pi], step=1000))
    assert end == pytest.approx([1 + 1 / 0.033, 0.508], rel=1e-3)


@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_gain_and_phase_have_their_textbook_forms(beta):
    omega = np.linspace(0, math.pi, 50)
    found = frequency_response(HeavyBall(beta), omega)
    gain = 1 / np.sqrt(1 - 2 * beta * np.cos(omega) + beta**2)
    phase = -np.arctan2(beta * np.sin(omega), 1 - beta * np.cos(omega))
    assert np.allclose(abs(found), gain) and np.allclose(np.angle(found), phase)


@pytest.mark.parametrize("of", ["output", "momentum"])
@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_the_state_of_the_real_optimizer_follows_the_formula(filter, of):
    optimizer = RiemannianSGD([nn.Parameter(torch.randn(3))], filter=filter)
    found = frequency_response_of(optimizer, OMEGA, step=300, of=of)
    expected = frequency_response(filter, OMEGA, step=300, of=of)
    assert np.all(abs(found - expected) < 1e-4 * abs(expected))


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_the_output_is_what_moves_the_weights(filter):
    """The optimizer itself, of learning rate 1, driven at ω = 1."""
    parts, omega, steps = [], 1.0, 400
    for wave in (math.cos, math.sin):
        x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = RiemannianSGD([x], lr=1.0, filter=filter)
        for n in range(steps):
            before = x.detach().clone()
            x.grad = torch.full_like(x, wave(omega * n))
            optimizer.step()
        parts.append(float(before - x.detach()))
    found = complex(*parts) / np.exp(1j * omega * (steps - 1))
    assert abs(found - frequency_response(filter, omega, step=steps)) < 0.01 * abs(found)


OPTIMIZERS = {
    "sgd": lambda groups: RiemannianSGD(groups, momentum=0.8),
    "sgd, product metric": lambda groups: RiemannianSGD(groups, momentum=0.8, metric="product"),
    "adam": lambda groups: RiemannianAdam(groups),
    "lion": lambda groups: RiemannianLion(groups, betas=(0.9, 0.95)),
    "muon": lambda groups: RiemannianMuon(groups),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_state_on_the_manifold_follows_the_formula_too(make):
    model = nn.Sequential(LowRankLinear(6, 5, 3), nn.Linear(5, 2))
    optimizer = make(param_groups(model))
    before = [p.detach().clone() for p in model.parameters()]
    for at, group in enumerate(optimizer.param_groups):
        filter = optimizer.rule(group).filter
        found = frequency_response_of(optimizer, [0.0, 0.5, 3.0], group=at, step=7)
        expected = frequency_response(filter, [0.0, 0.5, 3.0], step=7)
        assert np.all(abs(found - expected) < 1e-4 * abs(expected)), group["geometry"]
    assert all(map(torch.equal, before, model.parameters()))
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_the_response_of_fsgdm_grows_along_the_run():
    found = abs(dynamic_response(FSGDM(1000), OMEGA, [1, 100, 250, 500, 1000]))
    assert found.shape == (5, 4)
    assert np.all(np.diff(found[:, 0]) > 0) and np.all(np.diff(found[:, 3]) < 0)
    u = 1 - 1 / found[:, 0]
    assert u[1:] == pytest.approx([0.752, 0.883, 0.938, 0.968], abs=1e-3)


def test_the_gain_of_fsgdm_by_integration():
    fine = FSGDM(6000, stages=6000)
    cosine, flat = effective_gain(fine, 6000, "cosine"), effective_gain(fine, 6000)
    assert cosine == pytest.approx(0.5 + (0.25 - 1 / math.pi**2) / 0.033, rel=1e-3)
    assert cosine == pytest.approx(5.005, rel=1e-3)
    assert flat == pytest.approx(1 + 1 / (2 * 0.033), rel=1e-3)
    matched = FSGDM(6000, c=1 / 18, stages=6000)
    assert effective_gain(matched, 6000) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("filter", FILTERS, ids=str)
def test_the_weights_of_the_gradients_are_those_of_the_real_optimizer(filter):
    rates = [0.1, 0.3, 0.2, 0.05, 0.4]
    found = gradient_weights(filter, rates)
    for place in range(5):
        x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = RiemannianSGD([x], filter=filter)
        for step, lr in enumerate(rates):
            optimizer.param_groups[0]["lr"] = lr
            x.grad = torch.full_like(x, float(step == place))
            optimizer.step()
        assert -x.item() == pytest.approx(found[place], rel=1e-6)


def test_a_matched_rate_moves_as_far():
    steps, of, to = 3000, HeavyBall(0.9), FSGDM(3000)
    lr = matched_lr(0.1, of, to, steps, "cosine")
    shape = 0.5 + 0.5 * np.cos(np.pi * np.arange(steps) / steps)
    ways = [gradient_weights(f, r * shape).sum() for f, r in ((of, 0.1), (to, lr))]
    assert ways[0] == pytest.approx(ways[1], rel=0.01)
    assert lr == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("tau, expected", [(0.9992, 30.5), (0.99, 24), (0.95, 12.4)])
def test_transport_that_contracts_lowers_the_gain(tau, expected):
    assert gain(HeavyBall(0.968), contraction=tau) == pytest.approx(expected, rel=5e-3)


def test_transport_is_in_the_gain_of_a_run_and_in_the_rate_that_matches():
    heavy, average = HeavyBall(0.9), EMA(0.95)
    whole = effective_gain(heavy, 100, "cosine", contraction=0.99)
    assert whole == pytest.approx(0.5 / (1 - 0.9 * 0.99), rel=1e-6)
    found = matched_lr(0.1, heavy, average, 100, contraction=0.99)
    assert found == pytest.approx(0.1 * (1 / (1 - 0.9 * 0.99)) / (0.05 / (1 - 0.95 * 0.99)))


BAD = {
    "a filter that moves": (lambda: frequency_response(FSGDM(9), 0.0), "got FSGDM"),
    "a transport that grows": (lambda: gain(EMA(0.9), contraction=1.1), r"in \[0, 1\], got 1\.1"),
    "no steps": (lambda: effective_gain(EMA(0.9), 0), "total_steps >= 1, got 0"),
    "an unknown schedule": (lambda: effective_gain(EMA(0.9), 9, "cos"), "got 'cos'"),
    "step 0": (
        lambda: frequency_response_of(RiemannianSGD([nn.Parameter(torch.ones(1))]), 0.0, step=0),
        "step >= 1, got 0",
    ),
    "too long a memory": (
        lambda: frequency_response_of(
            RiemannianSGD([nn.Parameter(torch.ones(1))], momentum=0.99999), 0.0
        ),
        r"a pole below 0\.99992, got 0\.99999",
    ),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_refuses_an_optimizer_of_another_package():
    with pytest.raises(TypeError, match="needs an optimizer of lowrank_geo.optim, got SGD"):
        frequency_response_of(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), 0.0)
