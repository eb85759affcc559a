"""flow, quadratic, regularization: orders of the error against the real optimizer, exact flows, refusals."""

import copy
import math

import pytest
import torch
from torch import nn

from lowrank_geo.analysis.differentials import gradient_of
from lowrank_geo.analysis.flow import (
    flow_validity_bound,
    heavy_ball_flow,
    largest_curvature,
    momentum_flow,
)
from lowrank_geo.analysis.quadratic import quadratic_flow, quadratic_momentum_flow
from lowrank_geo.analysis.regularization import (
    directional_smoothness,
    gradient_penalty,
    modified_loss,
    modified_loss_of,
)
from lowrank_geo.analysis.two_step import two_step, validity_bound
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import EMA, FSGDM, QHM, HeavyBall, Nesterov

START = torch.tensor([1.0, -0.5], dtype=torch.float64)


H0 = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
B0 = torch.tensor([[1.2, -0.4], [0.5, 0.9]], dtype=torch.float64)


def loss(x):
    """Not quadratic, with derivatives of all orders."""
    return x @ (H0 @ x) / 2 - (B0 @ x + 0.3).cos().sum()


def gradient(x):
    """∇loss by hand and in few operations, as each order nests them once more."""
    return H0 @ x + B0.mT @ (B0 @ x + 0.3).sin()


def test_the_gradient_is_that_of_the_loss():
    assert torch.allclose(gradient(START), torch.func.grad(loss)(START), rtol=1e-14)


def iterates(gradient, x, steps, lr, **settings):
    """The real optimizer from x: all its points, (steps + 1, d)."""
    p = nn.Parameter(x.clone())
    optimizer = RiemannianSGD([p], lr=lr, **settings)
    points = [x]
    for _ in range(steps):
        p.grad = gradient(p.detach())
        optimizer.step()
        points.append(p.detach().clone())
    return torch.stack(points)


def slopes(errors):
    return [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]


def errors(order, etas, time, mu=0.5, **how):
    """|flow − iterates| at the steps up to `time`, for each η; (steps + 1) each."""
    for eta in etas:
        steps = round(time / eta)
        flow = heavy_ball_flow(gradient, mu, eta, order, **how)
        gap = flow.trajectory(START, steps) - iterates(gradient, START, steps, eta, momentum=mu)
        yield gap.norm(dim=1)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_error_is_of_the_order_that_was_asked_for(order):
    found = [float(e.max()) for e in errors(order, (0.001, 0.0005), time=0.02, mu=0.2)]
    assert slopes(found)[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("order", [2, 3])
def test_steady_coefficients_stay_at_first_order(order):
    found = [
        float(e.max())
        for e in errors(order, (0.002, 0.001), time=0.03, piecewise=False, shift=False)
    ]
    assert slopes(found)[-1] < 1.3


@pytest.mark.parametrize("order", [2, 3])
def test_a_shifted_start_makes_steady_coefficients_second_order(order):
    """At the end: at the start the flow is away from the iterates by the shift."""
    found = [float(e[-1]) for e in errors(order, (0.002, 0.001), time=0.06, piecewise=False)]
    assert slopes(found)[-1] == pytest.approx(2, abs=0.15)


FLOWS = [(f, 2) for f in (QHM(0.3, 0.6), QHM(0.6, 0.6), EMA(0.6), Nesterov(0.5))]


@pytest.mark.parametrize("filter, order", [*FLOWS, (QHM(0.6, 0.3), 3)], ids=str)
def test_every_filter_of_the_family_has_its_flow(filter, order):
    found = []
    for lr in (0.001, 0.0005):
        steps = round(0.04 / lr)
        flow = momentum_flow(gradient, filter, lr, order)
        gap = flow.trajectory(START, steps) - iterates(gradient, START, steps, lr, filter=filter)
        found.append(float(gap.norm(dim=1).max()))
    assert slopes(found)[-1] == pytest.approx(order, abs=0.15)


def test_the_integrators_agree():
    flow = heavy_ball_flow(gradient, 0.5, 0.005, 3)
    one, other = (flow.trajectory(START, 5, integrator=name) for name in ("rk4", "dop853"))
    assert (one - other).abs().max() < 1e-8
    finer = flow.trajectory(START, 5, substeps=8)
    assert (finer - other).abs().max() < 1e-11


def random_hessian(largest, d=6):
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return Q @ torch.diag(torch.linspace(0.01, 1, d, dtype=torch.float64) * largest) @ Q.mT


@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_the_quadratic_flow_is_exact(mu):
    eta, steps = 0.01, 400
    H = random_hessian(0.9 * flow_validity_bound(mu) / eta)
    x = torch.randn(6, dtype=torch.float64)
    times = eta * torch.arange(steps + 1, dtype=torch.float64)
    found = quadratic_flow(H, x, mu, eta, steps).at(times)
    assert (found - iterates(lambda y: H @ y, x, steps, eta, momentum=mu)).abs().max() < 1e-12


def test_the_quadratic_flow_is_exact_for_other_filters():
    for filter in (QHM(0.7, 0.9), Nesterov(0.8)):
        method, eta = two_step(filter), 0.01
        H, x = random_hessian(0.9 * validity_bound(method) / eta), torch.randn(6).double()
        found = quadratic_momentum_flow(H, x, method, eta, 100).at(eta * torch.arange(101).double())
        assert (
            found - iterates(lambda y, H=H: H @ y, x, 100, eta, filter=filter)
        ).abs().max() < 1e-12


def test_between_two_steps_the_quadratic_flow_moves_at_its_rate():
    H, x, eta = random_hessian(1.0), torch.randn(6, dtype=torch.float64), 0.01
    flow = quadratic_flow(H, x, 0.5, eta, 10)
    now, soon = flow.at(torch.tensor([0.043, 0.043 + 1e-6], dtype=torch.float64))
    A = flow.vectors @ torch.diag(flow.rates()[4]) @ flow.vectors.mT
    assert torch.allclose((soon - now) / 1e-6, A @ now, rtol=1e-4)


@pytest.mark.parametrize("factor, lives", [(0.98, True), (1.5, False)])
def test_the_bound_is_where_the_quadratic_flow_ends(factor, lives):
    r, mu = 1.0, 0.9
    s = factor * flow_validity_bound(mu)
    alive = True
    for _ in range(3000):
        r = 1 + mu * (1 - 1 / r) - s
        alive = alive and r > 0
    assert alive is lives


def test_the_series_is_the_quadratic_flow_order_by_order():
    H, mu, eta = torch.tensor([[1.0]], dtype=torch.float64), 0.5, 0.004
    exact = quadratic_flow(H, H[0], mu, eta, 50).at(torch.tensor([50 * eta], dtype=torch.float64))
    found = [
        heavy_ball_flow(lambda x: H @ x, mu, eta, n).trajectory(H[0], 50)[-1] for n in range(1, 5)
    ]
    gaps = [float((x - exact).abs()) for x in found]
    assert all(b < a / 10 for a, b in zip(gaps, gaps[1:], strict=False))


def test_a_low_rank_layer_has_a_flow_in_factors_mode():
    model = nn.Sequential(LowRankLinear(4, 3, 2, bias=False).double())
    x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    slope, start = gradient_of(model, lambda net: (net(x) - y).square().mean())
    assert start.shape == (3 * 2 + 2 * 2 + 4 * 2,)
    twin = copy.deepcopy(model)
    (twin(x) - y).square().mean().backward()
    assert torch.allclose(slope(start), torch.cat([p.grad.flatten() for p in twin.parameters()]))
    flow = heavy_ball_flow(slope, 0.3, 0.01, 3)
    gap = flow.trajectory(start, 20) - iterates(slope, start, 20, 0.01, momentum=0.3)
    assert gap.norm(dim=1).max() < 1e-5
    model[0].gradient = "tangent"
    with pytest.raises(ValueError, match="gradient='factors', got 'tangent' in '0'"):
        gradient_of(model, lambda net: net(x).sum())


@pytest.mark.parametrize("d", [6, 80])
def test_the_largest_curvature(d):
    H = random_hessian(3.0, d)
    found = largest_curvature(lambda x: H @ x, torch.randn(d, dtype=torch.float64))
    assert found == pytest.approx(3.0, rel=1e-9 if d == 6 else 0.05)


def test_the_penalty_flattens_by_lr_times_1_plus_mu():
    """L = (uv − 1)²/2: the drop of u² + v² below that of the gradient flow, per λ(1 + μ), is one number for all μ."""

    def slope(x):
        return (x[0] * x[1] - 1) * x.flip(0)

    start = torch.tensor([2.8, 0.05], dtype=torch.float64)
    drops = []
    for mu in (0.0, 0.5, 0.9):
        lam = 2e-3
        eta = lam * (1 - mu) ** 2
        p = start.clone()
        before = p.clone()
        for _ in range(round(6 / (eta / (1 - mu)))):
            p, before = p + mu * (p - before) - eta * slope(p), p
        drops.append((8.08866 - float(p.square().sum())) / (lam * (1 + mu)))
    assert max(drops) - min(drops) < 0.01 * max(drops)
    assert drops[0] == pytest.approx(0.356, abs=0.01)


def test_the_modified_loss_is_descended_to_second_order():
    mu = 0.5
    for eta in (0.01, 0.001):
        c = 1 / (1 - mu)
        flow = heavy_ball_flow(gradient, mu, eta, 2, piecewise=False)
        expected = -c * torch.func.grad(modified_loss(loss, mu, eta))(START)
        assert torch.allclose(flow.field(0)(START), expected, rtol=1e-10)
    assert torch.equal(
        modified_loss(loss, 0.5, 0.1)(START), modified_loss_of(loss, HeavyBall(0.5), 0.1)(START)
    )


def test_the_penalties_have_their_closed_forms():
    nu, beta, a = 0.4, 0.8, 0.1
    assert gradient_penalty(two_step(QHM(nu, beta)), a) == pytest.approx(
        a / 4 * (1 + 2 * nu * beta / (1 - beta))
    )
    found = gradient_penalty(two_step(QHM(beta, beta)), a)
    assert found == pytest.approx(a / 4 * (1 - beta + 2 * beta**2) / (1 - beta))


def test_directional_smoothness_is_the_rayleigh_quotient_of_the_steps():
    H = random_hessian(2.0)
    points = iterates(lambda y: H @ y, torch.randn(6).double(), 10, 0.1, momentum=0.5)
    found = directional_smoothness(points, points @ H)
    d = points.diff(dim=0)
    assert torch.allclose(found, ((d @ H) * d).sum(1) / d.square().sum(1))
    assert found.max() <= 2.0 + 1e-9


H2 = torch.eye(2, dtype=torch.float64)
BAD = {
    "mu of 1": (lambda: heavy_ball_flow(gradient, 1.0, 0.1, 1), r"mu in \[0, 1\), got 1\.0"),
    "order 0": (lambda: heavy_ball_flow(gradient, 0.5, 0.1, 0), "order between 1 and 8, got 0"),
    "order 9": (lambda: heavy_ball_flow(gradient, 0.5, 0.1, 9), "order between 1 and 8, got 9"),
    "no step": (lambda: heavy_ball_flow(gradient, 0.5, 0.0, 1), "positive step, got 0.0"),
    "a step too long": (
        lambda: heavy_ball_flow(gradient, 0.9, 0.1, 1).trajectory(START, 1),
        r"lr·λ < 0\.00263, got 0\.305",
    ),
    "a skew Hessian": (
        lambda: quadratic_flow(H2 + torch.tensor([[0, 1], [0, 0]]), START, 0.5, 0.01, 1),
        r"symmetric Hessian, got \|H − Hᵀ\| up to 1;",
    ),
    "a Hessian of NaN": (
        lambda: quadratic_flow(H2 * math.nan, START, 0.5, 0.01, 1),
        r"symmetric Hessian, got \|H − Hᵀ\| up to nan;",
    ),
    "a field that is no gradient": (
        lambda: heavy_ball_flow(lambda x: x + x.flip(0) * H2[0], 0.5, 0.01, 1).trajectory(START, 1),
        r"a flow needs a symmetric Hessian, got \|H − Hᵀ\| up to 1;",
    ),
    "a large field that is no gradient": (
        lambda: heavy_ball_flow(lambda x: x.roll(1), 0.5, 0.01, 1).trajectory(torch.ones(65), 1),
        "a flow needs a symmetric Hessian, got ⟨w, Hv⟩ − ⟨v, Hw⟩ = ",
    ),
    "a step of NaN": (
        lambda: quadratic_flow(H2, START, 0.5, math.nan, 1),
        "quadratic_flow needs lr > 0, got nan",
    ),
    "no steps": (
        lambda: heavy_ball_flow(gradient, 0.5, 0.01, 1).trajectory(START, 0),
        "a flow needs steps >= 1, got 0",
    ),
    "an unknown integrator": (
        lambda: heavy_ball_flow(gradient, 0.5, 0.01, 1).trajectory(START, 1, integrator="euler"),
        "an integrator out of rk4, dop853, got 'euler'",
    ),
    "a flat Hessian": (lambda: quadratic_flow(H2[:1], START, 0.5, 0.01, 1), r"got shape \(1, 2\)"),
    "a quadratic too steep": (
        lambda: quadratic_flow(H2, START, 0.5, 0.1, 1),
        r"lr·λ < 0\.0858, got 0\.1; lower lr below 0\.0858",
    ),
    "a time too late": (
        lambda: quadratic_flow(H2, START, 0.5, 0.01, 1).at(torch.tensor([1.0])),
        r"times between 0 and 0\.01, got \[1\.0\]",
    ),
    "one point": (lambda: directional_smoothness(H2[:1], H2[:1]), r"k >= 2, got \(1, 2\)"),
    "a filter that moves": (lambda: momentum_flow(gradient, FSGDM(9), 0.1, 1), "got FSGDM"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD)
def test_refuses(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_a_warning_may_take_the_place_of_the_refusal():
    flow = heavy_ball_flow(gradient, 0.9, 0.1, 1)
    with pytest.warns(UserWarning, match=r"lr·λ < 0\.00263"):
        flow.trajectory(START, 1, outside="warn")
    flow.trajectory(START, 1, outside="ignore")
