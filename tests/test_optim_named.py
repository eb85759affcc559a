"""Optimizers by name: each trains a net at its own learning rates, and says what it needs."""

import pytest
import torch
from optimizer_list import Net, backward, run
from torch import nn

from lowrank_geo import convert, diagnostics, lowrank_layers, optim
from lowrank_geo.optim import OPTIMIZERS, ScheduleFree
from lowrank_geo.optim.directions import Identity
from lowrank_geo.optim.filters import EMA, FSGDM, QHM, HeavyBall, Nesterov
from lowrank_geo.optim.weights import NAMED
from lowrank_geo.train.step import averaged, descend


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_descends_at_its_own_rates(name):
    net, x = Net(), torch.randn(64, 8)
    optimizer = optim.build(name, net, weight_decay=0.1, total_steps=60)
    if isinstance(optimizer, ScheduleFree):
        optimizer.train()
    # A tenth of the rates of a language model: this net is small and its gradients are large.
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    data = x, torch.tanh(x @ torch.randn(8, 4))
    before = backward(net, data)
    for _ in range(60):
        loss = backward(net, data)
        descend(optimizer, loss)
    with averaged(optimizer):
        assert backward(net, data) < before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_trains_convolutions(name):
    torch.manual_seed(0)
    images, wanted = torch.randn(16, 2, 6, 6), torch.randn(16, 3, 6, 6)
    plain = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))
    net = convert(plain, rank=2)
    assert len(list(lowrank_layers(net))) == 2
    optimizer = optim.build(name, net, total_steps=30)
    if isinstance(optimizer, ScheduleFree):
        optimizer.train()
    for group in optimizer.param_groups:
        group["lr"] *= 0.1
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(images) - wanted).square().mean()
        loss.backward()
        losses.append(loss.item())
        descend(optimizer, loss.item())
    assert losses[-1] < losses[0]


def test_the_method_that_follows_the_run_needs_its_length():
    with pytest.raises(ValueError, match="'fsgdm' needs total_steps, got None"):
        optim.build("fsgdm", Net())


def test_every_filter_and_every_weight_of_an_average_has_a_name():
    made = [optim.build(name, nn.Linear(2, 2), total_steps=9) for name in OPTIMIZERS]
    rules = [o.rule(o.param_groups[0]) for o in made if isinstance(o, optim.RiemannianSGD)]
    plain = {type(rule.filter) for rule in rules if isinstance(rule.direction, Identity)}
    assert plain == {HeavyBall, EMA, Nesterov, QHM, FSGDM}
    averages = [o for o in made if isinstance(o, ScheduleFree)]
    assert {o._weights for o in averages} == {NAMED["squared"], NAMED["schedulet"]}


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of adam, .*, signum, got 'adan'; use one of them"):
        optim.build("adan", Net())


@pytest.mark.parametrize("name, known", [("adam", True), ("qhadam", True), ("muon", False)])
def test_diagnostics_hold_the_signal_to_noise_of_those_that_estimate_it(name, known):
    net, x = Net(), torch.randn(64, 8)
    optimizer = optim.build(name, net)
    run(net, optimizer, (x, torch.zeros(64, 4)), 3)
    found = diagnostics.snapshot(net, optimizer).get("signal_to_noise")
    assert (found is not None) == known
    if name == "adam":
        assert found > 0
    if name == "qhadam":
        assert found == 0  # its betas are not tied
