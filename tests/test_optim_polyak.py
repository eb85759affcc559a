"""Polyak steps: the formula, the anytime bound, the plain Polyak step at β = 0, refusals."""

import math

import pytest
import torch
from optimizer_list import Net
from oracles import dense, tangent_projection
from schedule_free_list import Regression, every_regression
from torch import nn

from lowrank_geo.geometry import Point
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import (
    Polyak,
    RiemannianAdam,
    RiemannianMuon,
    RiemannianSGD,
    ScheduleFree,
    param_groups,
)

CASES = {
    "exact": (Polyak(), (2.0, 0.5, 4.0, None), 2.5 / 4),
    "bound": (Polyak(lower_bound=1.0), (2.0, 0.5, 4.0, None), 1.5 / 4),
    "bound of the batch": (Polyak(lower_bound=1.0), (2.0, 0.5, 4.0, 1.5), 1.0 / 4),
    "below the bound": (Polyak(lower_bound=3.0), (2.0, 0.5, 4.0, None), 0.0),
    "floor": (Polyak(floor=0.5), (2.0, 0.0, 1e-3, None), 4.0),
    "no slope": (Polyak(), (2.0, 0.0, 0.0, None), 0.0),
    "cap": (Polyak(max_lr=0.1), (2.0, 0.5, 4.0, None), 0.1),
}


@pytest.mark.parametrize("rule, inputs, expected", CASES.values(), ids=CASES)
def test_step_size_is_the_formula(rule, inputs, expected):
    *scalars, bound = (None if v is None else torch.tensor(v) for v in inputs)
    assert rule(*scalars, bound).item() == pytest.approx(expected)


def regression(samples=60, size=12):
    """Mean absolute errors with minimum 0 at a known point: convex, Lipschitz, not smooth."""
    A, solution = torch.randn(samples, size), torch.randn(size)
    return A, solution


@every_regression
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("batch", [60, 6])
def test_average_is_within_its_bound_after_every_step(kind, beta, batch):
    """f(x_T) − f* ≤ GD/√T with G the largest gradient seen, c = 1/t, no cap, no momentum, and the loss of the minimiser
    on each batch as its bound; worst of 24 runs 0.71 for absolute errors, 0.77 for squares."""
    problem = Regression(kind)
    w = nn.Parameter(torch.zeros(12))
    inner = RiemannianSGD([w], lr=1.0, momentum=0)
    optimizer = ScheduleFree(inner, beta=beta, weights="uniform", step_size=Polyak())
    optimizer.train()
    D, G = problem.solution.norm(), 0.0
    for t in range(1, 501):
        rows = torch.randint(60, (batch,)) if batch < 60 else slice(None)
        optimizer.zero_grad()
        loss = problem(w, rows)
        loss.backward()
        G = max(G, w.grad.norm())
        optimizer.step(loss=loss, lower_bound=problem(problem.solution, rows))
        assert problem.gap(optimizer.state[w]["x"]) <= G * D / math.sqrt(t), t


def test_without_beta_it_is_the_polyak_step_of_gradient_descent():
    A, solution = regression()
    w, twin = (nn.Parameter(torch.zeros(12)) for _ in range(2))
    inner = RiemannianSGD([w], lr=1.0, momentum=0)
    optimizer = ScheduleFree(inner, beta=0.0, step_size=Polyak())
    optimizer.train()
    for _ in range(50):
        rows = A[torch.randint(60, (6,))]
        losses = [(rows @ (v - solution)).abs().mean() for v in (w, twin)]
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step(loss=losses[0])
        (grad,) = torch.autograd.grad(losses[1], twin)
        with torch.no_grad():
            twin -= losses[1] / grad.square().sum() * grad
        assert optimizer.last_step_size == pytest.approx(
            (losses[1] / grad.square().sum()).item(), rel=1e-4
        )
        assert (w - twin).abs().max() < 1e-5


def test_adaptive_denominator_is_that_of_the_direction():
    """γ = [f + β⟨g, z − x⟩]₊ / gᵀD⁻¹g with D = √v̂ + ε, over 30 steps written out in float64."""
    A, solution = (x.double() for x in regression())
    w = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    inner = RiemannianAdam([w], lr=1.0, betas=(0.0, 0.99))
    optimizer = ScheduleFree(inner, beta=0.9, weights="uniform", step_size=Polyak())
    optimizer.train()
    z = x = torch.zeros(12, dtype=torch.float64)
    v = torch.zeros(12, dtype=torch.float64)
    for t in range(1, 31):
        y = (0.1 * z + 0.9 * x).requires_grad_()
        f = (A @ (y - solution)).abs().mean()
        (g,) = torch.autograd.grad(f, y)
        v = 0.99 * v + 0.01 * g * g
        direction = g / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        gamma = ((f + 0.9 * g @ (z - x)).clamp(min=0) / (g @ direction)).item()
        optimizer.zero_grad()
        loss = (A @ (w - solution)).abs().mean()
        loss.backward()
        optimizer.step(loss=loss)
        assert optimizer.last_step_size.item() == pytest.approx(gamma, rel=1e-5, abs=1e-9)
        z = z - gamma * direction
        x = x + (z - x) / t
        z, x = z.detach(), x.detach()


@pytest.mark.parametrize("gradient_at", ["collapsed", "branches"])
def test_step_sizes_on_the_manifold_are_those_of_dense_gradients(gradient_at, point):
    """⟨g, z − y⟩ and the slope |P_{T_z} g|² against dense matrices; collapsed knows P_{T_y} g; worst of 40 draws 4e-8:
    slopes are summed in float32."""
    layer = LowRankLinear(9, 7, 3, bias=False, dtype=torch.float64)
    inner = RiemannianSGD(param_groups(layer), momentum=0)
    optimizer = ScheduleFree(inner, step_size=Polyak(), gradient_at=gradient_at, model=layer)
    optimizer.train()
    inputs = torch.randn(50, 9, dtype=torch.float64)
    targets = inputs @ dense(point(7, 9, 3)).mT
    for _ in range(8):
        z = Point(*(optimizer.state[p]["z"].clone() for p in layer.point))
        y = Point(*(p.detach().clone() for p in layer.point))
        W = layer.matrix().detach().requires_grad_()
        (G,) = torch.autograd.grad((inputs @ W.mT - targets).square().mean(), W)
        known = G if gradient_at == "branches" else tangent_projection(y, G)
        away = dense(z) - (W.detach() if gradient_at == "branches" else dense(y))
        slope = tangent_projection(z, known).square().sum()
        optimizer.zero_grad()
        loss = (layer(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        expected = ((loss + (known * away).sum()).clamp(min=0) / slope).item()
        assert optimizer.last_step_size.item() == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize("gradient_at", ["collapsed", "branches"])
@pytest.mark.parametrize("make", [RiemannianMuon, RiemannianAdam])
def test_a_step_along_nothing_has_no_length(make, gradient_at):
    net = Net()
    optimizer = ScheduleFree(
        make(param_groups(net, weight_decay=0.1)),
        step_size=Polyak(),
        gradient_at=gradient_at,
        model=net,
    )
    optimizer.train()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(loss=1.0)
    assert optimizer.last_step_size == 0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_schedules_drive_the_cap():
    w = nn.Parameter(torch.ones(3))
    optimizer = ScheduleFree(RiemannianSGD([w], lr=0.5, momentum=0), step_size=Polyak(max_lr="lr"))
    optimizer.train()
    for lr in (0.5, 0.125):
        optimizer.param_groups[0]["lr"] = lr
        z = optimizer.state[w]["z"].clone()
        optimizer.zero_grad()
        loss = w.sum() + 100
        loss.backward()
        optimizer.step(loss=loss)
        assert torch.allclose(z - lr, optimizer.state[w]["z"])


def test_refuses_a_step_without_a_loss():
    w = nn.Parameter(torch.ones(2))
    optimizer = ScheduleFree(RiemannianSGD([w]), step_size=Polyak())
    w.sum().backward()
    with pytest.raises(ValueError, match=r"needs the loss of the batch .* got None"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"needs step_size=Polyak\(\) for a lower bound, got 1.0"):
        ScheduleFree(RiemannianSGD([nn.Parameter(torch.ones(2))])).step(lower_bound=1.0)


def test_a_loss_is_one_number():
    A, solution = regression()
    w = nn.Parameter(torch.zeros(12))
    optimizer = ScheduleFree(RiemannianSGD([w], momentum=0), step_size=Polyak())
    optimizer.train()
    loss = (A @ (w - solution)).abs().mean()
    loss.backward()
    before = w.detach().clone()
    with pytest.raises(
        ValueError, match=r"loss needs to be one number, got a tensor of shape \(3,"
    ):
        optimizer.step(loss=loss.expand(3))
    with pytest.raises(TypeError, match="loss needs to be a number, got '1.0'"):
        optimizer.step(loss="1.0")
    with pytest.raises(ValueError, match=r"lower_bound needs .* shape \(2,\)"):
        optimizer.step(loss=loss, lower_bound=torch.zeros(2))
    assert torch.equal(w, before)
    optimizer.step(loss=loss[None])  # as a gathered loss has it
    assert optimizer.last_step_size == pytest.approx((loss / w.grad.square().sum()).item())


REFUSED = {
    "bound": (lambda: Polyak(lower_bound=math.inf), "finite lower_bound, got inf"),
    "floor": (lambda: Polyak(floor=0.0), r"floor > 0, got 0\.0"),
    "floor in quotes": (lambda: Polyak(floor="x"), "floor needs to be a number, got 'x'"),
    "cap in a list": (lambda: Polyak(max_lr=[1.0]), r"max_lr > 0, 'lr' or None, got \[1\.0\]"),
    "cap": (lambda: Polyak(max_lr=-1.0), r"max_lr > 0, 'lr' or None, got -1\.0"),
    "cap by name": (lambda: Polyak(max_lr="rate"), "got 'rate'"),
}


@pytest.mark.parametrize("make, sentence", REFUSED.values(), ids=REFUSED)
def test_refuses(make, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        make()


def test_refuses_what_has_no_bound_from_below():
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="Polyak needs maximize=False"):
        ScheduleFree(RiemannianSGD([w], maximize=True), step_size=Polyak())
    with pytest.raises(TypeError, match="Polyak or None, got 'polyak'"):
        ScheduleFree(RiemannianSGD([w]), step_size="polyak")
