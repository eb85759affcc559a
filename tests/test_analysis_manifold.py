"""manifold: Hessian against finite differences, flow and noise floor against the real optimizer."""

import math

import pytest
import torch
from torch import nn

from lowrank_geo import geometry
from lowrank_geo.analysis import qhm
from lowrank_geo.analysis.manifold import (
    largest_riemannian_curvature,
    nearest,
    noise_floor,
    riemannian_flow,
    riemannian_hessian,
)
from lowrank_geo.analysis.two_step import two_step
from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import RiemannianSGD, param_groups
from lowrank_geo.optim.filters import QHM, HeavyBall


def completion(m=6, n=5, rank=2, seed=0):
    """∇L of a weighted, non-quadratic fit, and a point of the rank."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    weights, target = torch.rand(m, n, **kind) + 0.2, torch.randn(m, n, **kind)
    start = nearest(torch.randn(m, n, **kind) + 2 * torch.eye(m, n, dtype=torch.float64), rank)

    def gradient(W):
        return weights * (W - target) + 0.1 * (W - target) ** 3

    return gradient, start


def layers_at(points, **settings):
    """Real layers at some points with a RiemannianSGD on them."""
    m, n = points[0].U.shape[0], points[0].V.shape[0]
    rank = points[0].S.shape[-1]
    model = nn.ModuleList(LowRankLinear(n, m, rank, bias=False) for _ in points).double()
    for layer, point in zip(model, points, strict=True):
        for parameter, value in zip(layer.point, point, strict=True):
            parameter.data.copy_(value)
    return model, RiemannianSGD(param_groups(model), **settings)


def descend(layer, G):
    """Give a layer the gradient of a loss whose gradient in W is G."""
    point = Point(*(p.detach() for p in layer.point))
    xi = geometry.project(point, G)
    layer.U.grad, layer.S.grad, layer.V.grad = xi.Up, xi.M, xi.Vp


def dense(layer):
    return geometry.to_dense(Point(*(p.detach() for p in layer.point)))


def test_the_hessian_is_the_derivative_of_the_gradient():
    gradient, _ = completion()
    point = geometry.random(6, 5, 2, dtype=torch.float64)
    xi = geometry.project(point, torch.randn(6, 5, dtype=torch.float64))
    found = riemannian_hessian(gradient, point, xi)
    assert (point.U.mT @ found.Up).abs().max() < 1e-12

    def grad(t):
        at = nearest(geometry.to_dense(point) + t * geometry.embed(point, xi), 2)
        return geometry.embed(at, geometry.project(at, gradient(geometry.to_dense(at))))

    h = 1e-5
    slope = geometry.project(point, (grad(h) - grad(-h)) / (2 * h))
    for ours, theirs in zip(found, slope, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6 * float(geometry.norm(slope)))


def test_the_hessian_is_symmetric():
    gradient, point = completion()
    xi, eta = (geometry.project(point, torch.randn(6, 5, dtype=torch.float64)) for _ in range(2))
    one = geometry.inner(riemannian_hessian(gradient, point, xi), eta)
    other = geometry.inner(riemannian_hessian(gradient, point, eta), xi)
    assert float(one) == pytest.approx(float(other), rel=1e-10)


@pytest.mark.parametrize("mu", [0.5, 0.8])
def test_the_flow_follows_the_real_optimizer_to_its_order(mu):
    gradient, start = completion()
    method, scale = two_step(HeavyBall(mu)), 0.05 * (1 - math.sqrt(mu)) ** 2
    errors = {(order, how): [] for order in (1, 2) for how in ("svd", "orthographic")}
    for lr in (scale, scale / 2):
        steps = round(0.2 * (1 - mu) / lr)
        flows = {n: list(riemannian_flow(gradient, start, method, lr, n, steps)) for n in (1, 2)}
        for how in ("svd", "orthographic"):
            model, optimizer = layers_at([start], lr=lr, momentum=mu, retraction=how)
            points = []
            for _ in range(steps + 1):
                points.append(dense(model[0]))
                descend(model[0], gradient(points[-1]))
                optimizer.step()
            for order, flow in flows.items():
                gaps = [float((a - b).norm()) for a, b in zip(flow, points, strict=True)]
                errors[order, how].append(max(gaps))
    for (order, how), (coarse, fine) in errors.items():
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), how


def test_the_noise_floor_of_low_rank_training():
    """50 matrices 12 × 10 of rank 2 and as many dense ones, under one noise: .333 of the excess loss, within .01."""
    lr, beta, nu, steps, count = 0.05, 0.9, 0.7, 700, 50
    point = geometry.random(12, 10, 2, dtype=torch.float64)
    # Far from singular, so that the curvature of the manifold does not show.
    point = Point(point.U, 30 * torch.eye(2, dtype=torch.float64), point.V)
    model, optimizer = layers_at([point] * count, lr=lr, filter=QHM(nu, beta))
    full = nn.Parameter(geometry.to_dense(point).repeat(count, 1, 1))
    reference = RiemannianSGD([full], lr=lr, filter=QHM(nu, beta))
    target, excess = geometry.to_dense(point), torch.zeros(2, dtype=torch.float64)
    for step in range(steps):
        batch = Point(
            *map(torch.stack, zip(*([p.detach() for p in x.point] for x in model), strict=True))
        )
        W, noise = geometry.to_dense(batch), torch.randn_like(full)
        xi = project_batch(batch, W - target + noise)
        for layer, Up, M, Vp in zip(model, *xi, strict=True):
            layer.U.grad, layer.S.grad, layer.V.grad = Up, M, Vp
        full.grad = full.detach() - target + noise
        if step >= steps // 4:
            excess += torch.stack([(x - target).square().sum() for x in (W, full.detach())])
        optimizer.step()
        reference.step()
    ratio = float(excess[0] / excess[1])
    assert noise_floor(12, 10, 2) == pytest.approx(0.333, abs=5e-4)
    assert ratio == pytest.approx(noise_floor(12, 10, 2), abs=0.01)
    each = float(excess[1]) / (count * (steps - steps // 4) * 120)
    assert each == pytest.approx(qhm.stationary_variance(lr, beta, nu, 1.0), rel=0.03)


def project_batch(point, G):
    GV, GtU = G @ point.V, G.mT @ point.U
    M = point.U.mT @ GV
    return Tangent(GV - point.U @ M, M, GtU - point.V @ M.mT)


def minimum_of_rank(gradient, start, steps=500):
    """Where the real optimizer ends on a deterministic loss; the gradient there is normal to the manifold, not 0."""
    model, optimizer = layers_at([start], lr=0.4, momentum=0.7)
    for _ in range(steps):
        descend(model[0], gradient(dense(model[0])))
        optimizer.step()
    return nearest(dense(model[0]), start.S.shape[-1])


def test_the_stability_bound_is_that_of_the_riemannian_hessian():
    """At a minimum of rank 2 of a loss that it does not fit, QHM leaves at 1.02 and stays at 0.98 of the bound."""
    gradient, start = completion()
    point = minimum_of_rank(gradient, start)
    G = gradient(geometry.to_dense(point))
    assert geometry.norm(geometry.project(point, G)) < 1e-10 < 0.1 < G.norm()
    curvature = largest_riemannian_curvature(gradient, point)
    for beta, nu in ((0.9, 0.7), (0.5, 1.0), (0.0, 0.0), (0.8, 0.3)):
        away = nearest(geometry.to_dense(point) + 1e-9 * start_direction(), 2)
        edge, sizes = qhm.alpha_max(beta, nu, curvature), []
        model, optimizer = layers_at([away] * 2, lr=edge, filter=QHM(nu, beta))
        for _ in range(150):
            for layer, factor in zip(model, (0.98, 1.02), strict=True):  # of the loss, as of lr
                descend(layer, factor * gradient(dense(layer)))
            optimizer.step()
            sizes.append([float((dense(x) - geometry.to_dense(point)).norm()) for x in model])
        early, late = (torch.tensor(part).amax(0) for part in (sizes[60:80], sizes[130:]))
        assert (late > early).tolist() == [False, True], (beta, nu)


def start_direction():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_the_noise_floor_of_full_rank_is_one():
    assert noise_floor(7, 5, 5) == 1.0
    assert noise_floor(1000, 1000, 1) == pytest.approx(0.002, rel=1e-3)


def test_refuses():
    gradient, point = completion()
    with pytest.raises(ValueError, match="order 1 or 2, got 3; .* second-order accurate"):
        riemannian_flow(gradient, point, two_step(HeavyBall(0.5)), 0.01, 3, 1)
    with pytest.raises(ValueError, match=r"needs lr·λ < 0\.0858, got .* at the start; lower lr"):
        riemannian_flow(gradient, point, two_step(HeavyBall(0.5)), 1.0, 2, 1)
    with pytest.raises(ValueError, match="riemannian_flow needs lr > 0, got nan"):
        riemannian_flow(gradient, point, two_step(HeavyBall(0.5)), math.nan, 2, 1)
    with pytest.raises(ValueError, match="noise_floor"):
        noise_floor(4, 3, 5)
    singular = Point(point.U, torch.zeros(2, 2, dtype=torch.float64), point.V)
    xi = geometry.project(point, gradient(geometry.to_dense(point)))
    with pytest.raises(ValueError, match="core S of full rank, got its smallest singular value 0;"):
        riemannian_hessian(gradient, singular, xi)
