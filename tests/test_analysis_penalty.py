"""penalty and the gauge of balance: what momentum descends on the manifold and in factors, on the real optimizer."""

import math

import pytest
import torch
from torch import nn

from lowrank_geo import geometry
from lowrank_geo.analysis import linear
from lowrank_geo.analysis.balance import horizontal, imbalance
from lowrank_geo.analysis.coefficients import steady
from lowrank_geo.analysis.manifold import nearest, riemannian_hessian
from lowrank_geo.analysis.penalty import (
    factor_modified_loss,
    factor_penalty,
    manifold_modified_loss,
    manifold_penalty,
)
from lowrank_geo.analysis.regularization import gradient_penalty
from lowrank_geo.analysis.two_step import quasi_hyperbolic, two_step
from lowrank_geo.optim import RiemannianSGD
from lowrank_geo.optim.filters import QHM, HeavyBall


def problem(m=6, n=5, rank=2):
    generator = torch.Generator().manual_seed(3)
    kind = {"generator": generator, "dtype": torch.float64}
    weights, target = torch.rand(m, n, **kind) + 0.2, torch.randn(m, n, **kind)
    point = nearest(torch.randn(m, n, **kind) + 2 * torch.eye(m, n, dtype=torch.float64), rank)
    return lambda W: (weights * (W - target) ** 2 / 2 + (W - target) ** 4 / 40).sum(), point


def turned(point):
    r = point.S.shape[0]
    P, Q = (torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0] for _ in range(2))
    return geometry.Point(point.U @ P, P.mT @ point.S @ Q, point.V @ Q)


@pytest.mark.parametrize("filter", [HeavyBall(0.8), QHM(0.7, 0.9), HeavyBall(0.0)], ids=str)
def test_the_gradient_of_the_modified_loss_is_the_first_counter_term(filter):
    """−c grad(L + w|grad L|²) is c_∞, γ_∞ times gradient and Hessian: by finite differences along the manifold."""
    loss, point = problem()
    lr, slope = 0.03, torch.func.grad(loss)
    modified = manifold_modified_loss(loss, filter, lr)
    c, minus_gamma = steady(two_step(filter), 2)
    xi = geometry.project(point, slope(geometry.to_dense(point)))
    hess = riemannian_hessian(slope, point, xi)
    flow = geometry.Tangent(*(-c * x + lr * minus_gamma * h for x, h in zip(xi, hess, strict=True)))
    for seed in range(3):
        eta = geometry.project(
            point, torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).double()
        )
        W, along, h = geometry.to_dense(point), geometry.embed(point, eta), 1e-5
        up, down = (modified(nearest(W + t * along, 2)) for t in (h, -h))
        measured = float(-c * (up - down) / (2 * h))
        assert measured == pytest.approx(float(geometry.inner(flow, eta)), rel=1e-6)


def test_the_penalties_by_their_formulas():
    loss, point = problem()
    U, S, V = point
    G = torch.func.grad(loss)(geometry.to_dense(point))
    dense = U @ U.mT @ G + G @ V @ V.mT - U @ U.mT @ G @ V @ V.mT
    assert float(manifold_penalty(loss, point)) == pytest.approx(float(dense.square().sum()))
    L, R = (x.detach().clone().requires_grad_() for x in (U @ S, V))
    loss(L @ R.mT).backward()
    assert float(factor_penalty(loss, L.detach(), R.detach())) == pytest.approx(
        float(L.grad.square().sum() + R.grad.square().sum())
    )
    weight = gradient_penalty(two_step(QHM(0.4, 0.8)), 0.1)
    assert weight == pytest.approx(0.1 / 4 * (1 + 2 * 0.4 * 0.8 / 0.2))
    found = factor_modified_loss(loss, QHM(0.4, 0.8), 0.1)(L.detach(), R.detach())
    expected = loss(geometry.to_dense(point)) + weight * factor_penalty(
        loss, L.detach(), R.detach()
    )
    assert torch.equal(found, expected)


def test_the_one_is_a_property_of_the_matrix_and_the_other_of_how_it_is_split():
    loss, point = problem()
    value = float(manifold_penalty(loss, point))
    assert float(manifold_penalty(loss, turned(point))) == pytest.approx(value, rel=1e-12)
    U, S, V = point
    half = S.diagonal().sqrt()
    splits = [factor_penalty(loss, U * half * t, V * half / t) for t in (0.5, 1.0, 2.0)]
    assert max(splits) > 1.5 * min(splits)
    # Of one matrix, balanced: |G V √σ|² + |Gᵀ U √σ|², and no −|UᵀGV|².
    G = torch.func.grad(loss)(geometry.to_dense(point))
    expected = (G @ V * half).square().sum() + (G.mT @ U * half).square().sum()
    assert float(splits[1]) == pytest.approx(float(expected))


def test_momentum_on_factors_descends_the_modified_loss():
    """The real optimizer against gradient flows of L and of the modified loss: the second is an order nearer."""
    loss, point = problem()
    mu, errors = 0.5, {"plain": [], "modified": []}
    start = torch.cat([point.U @ point.S, point.V])
    for lr in (0.002, 0.001):
        both = nn.Parameter(start.clone())
        optimizer, slope = RiemannianSGD([both], lr=lr, momentum=mu), torch.func.grad(_split(loss))
        weight = gradient_penalty(two_step(HeavyBall(mu)), lr)
        # The start from rest loses lr·warmup gradients.
        begin = start + lr * two_step(HeavyBall(mu)).warmup * slope(start)
        modified = _split(factor_modified_loss(loss, HeavyBall(mu), lr), product=False)
        flows = {"plain": (slope, begin), "modified": (torch.func.grad(modified), begin)}
        steps = round(0.6 / lr)
        for _ in range(steps):
            both.grad = slope(both.detach())
            optimizer.step()
        for name, (field, x) in flows.items():
            for _ in range(steps):
                k1 = field(x)
                x = x - lr / (1 - mu) * field(x - lr / (1 - mu) / 2 * k1)
            errors[name].append(float((x - both.detach()).norm()))
    assert weight > 0
    slopes = {name: math.log2(a / b) for name, (a, b) in errors.items()}
    assert slopes["plain"] == pytest.approx(1, abs=0.2)
    assert slopes["modified"] > 1.8
    assert errors["modified"][1] < errors["plain"][1] / 8


def _split(loss, product=True):
    def of_both(x):
        U, V = x[:6], x[6:]
        return loss(U @ V.mT) if product else loss(U, V)

    return of_both


def test_a_flat_direction_has_the_roots_1_and_beta():
    method = quasi_hyperbolic(0.9, 0.7)
    first, second = linear.companion(method, 0.3, 0.0)
    assert sorted(np_roots(first, second)) == pytest.approx([0.9, 1.0])


def np_roots(first, second):
    root = math.sqrt(first**2 - 4 * second)
    return (first - root) / 2, (first + root) / 2


def test_the_horizontal_part_leaves_no_gauge_and_keeps_the_change_of_the_matrix():
    U, V = torch.randn(6, 3).double(), torch.randn(5, 3).double()
    gU, gV = torch.randn(6, 3).double(), torch.randn(5, 3).double()
    hU, hV = horizontal(U, V, gU, gV)
    A = torch.randn(3, 3).double()
    assert abs(float((hU * (U @ A)).sum() - (hV * (V @ A.mT)).sum())) < 1e-12
    change = [a @ V.mT + U @ b.mT for a, b in ((gU, gV), (hU, hV))]
    assert torch.allclose(*change)
    again = horizontal(U, V, hU, hV)
    assert torch.allclose(again[0], hU) and torch.allclose(again[1], hV)
    with pytest.raises(ValueError, match="factors of full rank, got eigenvalues"):
        horizontal(torch.zeros(4, 2), torch.zeros(3, 2), torch.ones(4, 2), torch.ones(3, 2))


@pytest.mark.parametrize("projected", [False, True])
def test_noise_walks_along_the_gauge_unless_it_is_projected(projected):
    """QHM at the minimum of |U Vᵀ − W|²/2 with noise in both factors; 40 copies, the same seeds for both."""
    lr, copies, steps = 0.02, 40, (250, 1000)
    generator = torch.Generator().manual_seed(0)
    kind = {"generator": generator, "dtype": torch.float64}
    orthonormal = (torch.linalg.qr(torch.randn(k, 2, **kind))[0] for k in (6, 5))
    begin = [2.0 * x.expand(copies, -1, -1).clone() for x in orthonormal]
    U, V = map(nn.Parameter, begin)
    target, start = begin[0] @ begin[1].mT, imbalance(*begin)
    optimizer, drifts = RiemannianSGD([U, V], lr=lr, filter=QHM(0.7, 0.9)), []
    for step in range(1, steps[1] + 1):
        u, v = U.detach(), V.detach()
        gap = u @ v.mT - target
        gU, gV = gap @ v, gap.mT @ u
        noise = [0.3 * torch.randn(x.shape, **kind) for x in (u, v)]
        noise = horizontal(u, v, *noise) if projected else noise
        U.grad, V.grad = gU + noise[0], gV + noise[1]
        optimizer.step()
        if step in steps:
            moved = imbalance(U.detach(), V.detach()) - start
            drifts.append(float(moved.square().sum((-1, -2)).mean()))
    # A random walk's variance grows with time: each gauge direction moves by lr·gain·noise a step.
    if projected:
        assert drifts[1] < 0.01
    else:
        assert drifts[1] / drifts[0] == pytest.approx(4, rel=0.3) and drifts[1] > 0.5
