"""ScheduleFree: the reference library, bounds, modes, state, and what it must leave alone."""

import copy

import pytest
import schedulefree
import torch
from optimizer_list import Net, snapshot
from schedule_free_list import (
    INNER,
    Regression,
    build,
    error,
    every_form,
    every_regression,
    same,
    train,
)
from torch import nn

from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.optim import RiemannianAdam, RiemannianSGD, ScheduleFree, param_groups
from lowrank_geo.optim.schedules import warmup_stable_decay


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def data():
    x = torch.randn(64, 8)
    return x, torch.tanh(x @ torch.randn(8, 4))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 4e-15)])
@pytest.mark.parametrize("warmup", [0, 20])
def test_off_the_manifold_it_is_the_schedulefree_library(dtype, tolerance, warmup):
    """AdamWScheduleFree(betas=(0.9, 0.99)), y after every step, x at the end; worst of 10 draws 1.8e-7 and 3.4e-16."""
    linear = nn.Linear(6, 4).to(dtype)
    twin = copy.deepcopy(linear)
    inner = RiemannianAdam(linear.parameters(), lr=0.01, betas=(0.0, 0.99), euclidean_lr=0.01)
    ours = ScheduleFree(inner)
    theirs = schedulefree.AdamWScheduleFree(
        twin.parameters(), lr=0.01, betas=(0.9, 0.99), warmup_steps=warmup
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda t: min(1, (t + 1) / (warmup or 1)))
    ours.train(), theirs.train()
    for _ in range(100):
        x = torch.randn(16, 6, dtype=dtype)
        for net, optimizer in ((linear, ours), (twin, theirs)):
            optimizer.zero_grad()
            (net(x).square().mean() + net(x).sin().mean()).backward()
            optimizer.step()
        schedule.step()
        pairs = zip(linear.parameters(), twin.parameters(), strict=True)
        assert all((a - b).abs().max() < tolerance for a, b in pairs)
    ours.eval(), theirs.eval()
    pairs = zip(linear.parameters(), twin.parameters(), strict=True)
    assert all((a - b).abs().max() < tolerance for a, b in pairs)


@pytest.mark.parametrize("average", ["truncate", "orthographic"])
@pytest.mark.parametrize("gradient_at", ["collapsed", "branches"])
def test_at_full_rank_it_is_the_recursion_on_the_dense_weight(average, gradient_at):
    """y = (1 − β)z + βx, z ← (1 − lr·wd) z − lr g(y), x ← (1 − c)x + cz, written out; worst of 40 draws 1.6e-15."""
    layer = LowRankLinear(6, 6, 6, bias=False, dtype=torch.float64)
    inner = RiemannianSGD(param_groups(layer, lr=0.05, weight_decay=0.2), momentum=0)
    optimizer = ScheduleFree(
        inner, beta=0.7, weights="uniform", average=average, gradient_at=gradient_at, model=layer
    )
    optimizer.train()
    z = x = layer.weight.detach().clone()
    for t in range(1, 31):
        inputs = torch.randn(16, 6, dtype=torch.float64)
        y = (0.3 * z + 0.7 * x).requires_grad_()
        (inputs @ y.mT).sin().square().sum().backward()
        optimizer.zero_grad()
        layer(inputs).sin().square().sum().backward()
        optimizer.step()
        z = (1 - 0.05 * 0.2) * z - 0.05 * y.grad
        x = x + (z - x) / t
        assert (layer.weight - (0.3 * z + 0.7 * x)).abs().max() < 2e-14
    optimizer.eval()
    assert (layer.weight - x).abs().max() < 2e-14


@every_regression
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("peak", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("steps", [30, 1000])
def test_any_schedule_stays_below_its_bound_at_every_step(kind, steps, peak, beta):
    """f(x_T) − f* ≤ (D² + Σγ²|g|²)/(2Σγ) for weights γ and every T, with warmup, plateau and decay; the largest gap
    over bound of 60 runs is 0.98 for absolute errors and 0.37 for squares."""
    problem = Regression(kind, 40, 10)
    w = nn.Parameter(torch.zeros(10))
    inner = RiemannianSGD([w], lr=peak, momentum=0)
    optimizer = ScheduleFree(inner, beta=beta, weights="schedulet")
    schedule = warmup_stable_decay(optimizer, steps, warmup=0.1, decay=0.2)
    optimizer.train()
    rates, squares = 0.0, 0.0
    for _ in range(steps):
        optimizer.zero_grad()
        problem(w).backward()
        lr = optimizer.param_groups[0]["lr"]
        rates, squares = rates + lr, squares + lr**2 * w.grad.square().sum().item()
        optimizer.step()
        schedule.step()
        gap = problem.gap(optimizer.state[w]["x"]).item()
        assert gap < (problem.solution.square().sum().item() + squares) / (2 * rates)


@every_form
@pytest.mark.parametrize("inner", INNER)
def test_the_average_descends_and_stays_on_the_manifold(net, data, form, inner):
    before = error(net, data)
    optimizer = build(net, form, inner, lr=0.1 if inner == "sgd" else 0.01, weight_decay=0.0)
    train(net, optimizer, data, 150)
    optimizer.eval()
    assert error(net, data) < 0.6 * before
    for _, layer in lowrank_layers(net):
        for frame in (layer.U, layer.V):
            assert (frame.mT @ frame - torch.eye(layer.rank)).abs().max() < 1e-5


@every_form
def test_a_thousand_swaps_are_bit_identical(net, data, form):
    optimizer = build(net, form)
    optimizer.eval()
    optimizer.train()
    fresh = snapshot(net)
    assert same(fresh, snapshot(net))  # before any step x and y are the parameters
    train(net, optimizer, data, 3)
    y, out = snapshot(net), net(data[0])
    optimizer.eval()
    x = snapshot(net)
    for _ in range(1000):
        optimizer.train()
        optimizer.eval()
        optimizer.eval()
    assert same(x, snapshot(net))
    optimizer.train()
    assert same(y, snapshot(net)) and torch.equal(net(data[0]), out)


REFUSED = {
    "beta": (dict(beta=1.5), r"beta in \[0, 1\], got 1\.5"),
    "average": (dict(average="mean"), "got 'mean'"),
    "weights": (dict(weights="square"), "got 'square'"),
    "gradient_at": (dict(gradient_at="x"), "'collapsed' or 'branches', got 'x'"),
    "model": (dict(gradient_at="branches"), "needs the model, got None"),
    "other model": (
        dict(gradient_at="branches", model=nn.Linear(2, 2)),
        "got one without the layer",
    ),
}


@pytest.mark.parametrize("settings, sentence", REFUSED.values(), ids=REFUSED)
def test_refuses(settings, sentence, net):
    with pytest.raises(ValueError, match=sentence):
        ScheduleFree(INNER["sgd"](param_groups(net)), **settings)


def test_refuses_optimizers_of_others(net):
    with pytest.raises(TypeError, match=r"lowrank_geo\.optim, got AdamW"):
        ScheduleFree(torch.optim.AdamW(net.lm_head.parameters()))
    with pytest.raises(TypeError, match="unexpected keyword"):
        ScheduleFree(INNER["sgd"](param_groups(net)), warmup=3)
