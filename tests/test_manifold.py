"""manifold.FixedRank: geoopt's checks, the definitions, its optimizers against the truncated SVD."""

import copy

import geoopt
import pytest
import torch
from torch import Tensor

from lowrank_geo import geometry
from lowrank_geo.functional import lowrank_linear
from lowrank_geo.manifold import METRICS, FixedRank

SHAPES = [(7, 5, 1), (12, 9, 3), (6, 6, 6)]
metrics = pytest.mark.parametrize("metric", METRICS)
shapes = pytest.mark.parametrize("m, n, r", SHAPES)


def packed(manifold: FixedRank, *batch: int) -> Tensor:
    shape = (*batch, manifold.m + manifold.n + manifold.r, manifold.r)
    return manifold.random(*shape, dtype=torch.float64).detach().as_subclass(Tensor)


def tangent(manifold: FixedRank, x: Tensor) -> Tensor:
    return manifold.proju(x, torch.randn_like(x))


@shapes
@metrics
def test_passes_the_checks_of_geoopt(metric, m, n, r):
    manifold = FixedRank(m, n, r, metric)
    shape = (4, m + n + r, r)
    for x in (manifold.random(*shape), manifold.origin(*shape), manifold.projx(torch.randn(shape))):
        manifold.assert_check_point_on_manifold(x)
        u = manifold.proju(x, torch.randn(shape))
        manifold.assert_check_vector_on_tangent(x, u)
        y, v = manifold.retr_transp(x, u, manifold.proju(x, torch.randn(shape)))
        manifold.assert_check_point_on_manifold(y)
        manifold.assert_check_vector_on_tangent(y, v)


@metrics
def test_a_batch_is_its_members_one_by_one(metric):
    manifold = FixedRank(12, 9, 3, metric)
    x = packed(manifold, 4)
    u, v = tangent(manifold, x), tangent(manifold, x)
    y, w = manifold.retr_transp(x, u, v)
    for k in range(4):
        y_k, w_k = manifold.retr_transp(x[k], u[k], v[k])
        torch.testing.assert_close(y[k], y_k, rtol=0, atol=1e-13)
        torch.testing.assert_close(w[k], w_k, rtol=0, atol=1e-13)
        torch.testing.assert_close(manifold.inner(x, u, v)[k], manifold.inner(x[k], u[k], v[k]))


def test_unpack_gives_back_what_pack_took():
    manifold = FixedRank(7, 5, 2)
    point = geometry.random(7, 5, 2, batch=(3,))
    x = manifold.pack(point)
    assert x.shape == (3, 14, 2)
    assert all(torch.equal(a, b) for a, b in zip(manifold.unpack(x), point, strict=True))
    assert torch.equal(manifold.pack_point(*point), x)
    assert all(torch.equal(a, b) for a, b in zip(manifold.unpack_tensor(x), point, strict=True))


@shapes
def test_projx_is_the_nearest_packed_point(m, n, r):
    manifold = FixedRank(m, n, r)
    outside = packed(manifold) + 0.3 * torch.randn(m + n + r, r, dtype=torch.float64)
    nearest = manifold.projx(outside)
    distance = (nearest - outside).norm()
    for _ in range(20):
        other = manifold.retr(nearest, 0.1 * tangent(manifold, nearest))
        assert (other - outside).norm() >= distance
    torch.testing.assert_close(manifold.projx(nearest), nearest, rtol=0, atol=1e-13)


@shapes
def test_proju_is_the_orthogonal_projection(m, n, r):
    manifold = FixedRank(m, n, r)
    x = packed(manifold)
    u, v = torch.randn_like(x), tangent(manifold, x)
    torch.testing.assert_close(manifold.proju(x, v), v, rtol=0, atol=1e-13)
    assert abs(manifold.inner(x, u - manifold.proju(x, u), v)) < 1e-12


def test_the_embedded_norm_is_that_of_the_matrix():
    manifold = FixedRank(12, 9, 3, "embedded")
    x = packed(manifold)
    u = tangent(manifold, x)
    matrix = geometry.embed(manifold.unpack(x), manifold.unpack_tangent(u))
    torch.testing.assert_close(manifold.norm(x, u), matrix.norm())


def test_the_embedded_gradient_is_the_projected_dense_gradient():
    manifold = FixedRank(12, 9, 3, "embedded")
    x, A = packed(manifold).requires_grad_(), torch.randn(12, 9, dtype=torch.float64)
    distance(manifold, x, A).backward()
    point = manifold.unpack(x.detach())
    expected = geometry.project(point, geometry.to_dense(point) - A)
    actual = manifold.egrad2rgrad(x.detach(), x.grad)
    torch.testing.assert_close(actual, manifold.pack(expected), rtol=0, atol=1e-13)


@metrics
def test_the_gradient_is_the_slope_along_the_retraction(metric):
    manifold = FixedRank(12, 9, 3, metric)
    x, A = packed(manifold).requires_grad_(), torch.randn(12, 9, dtype=torch.float64)
    distance(manifold, x, A).backward()
    x, gradient = x.detach(), manifold.egrad2rgrad(x.detach(), x.grad)
    u, t = tangent(manifold, x), 1e-5
    up, down = (distance(manifold, manifold.retr(x, s * u), A) for s in (t, -t))
    torch.testing.assert_close(
        (up - down) / (2 * t), manifold.inner(x, gradient, u), rtol=1e-7, atol=0
    )


def test_transport_is_the_projection_of_the_matrix_or_of_the_factors():
    for metric in METRICS:
        manifold = FixedRank(12, 9, 3, metric)
        x = packed(manifold)
        u = tangent(manifold, x)
        y, v = manifold.retr_transp(x, tangent(manifold, x), u)
        if metric == "embedded":
            matrix = geometry.embed(manifold.unpack(x), manifold.unpack_tangent(u))
            expected = manifold.pack(geometry.project(manifold.unpack(y), matrix))
        else:
            expected = manifold.proju(y, u)
        torch.testing.assert_close(v, expected, rtol=0, atol=1e-12)


@metrics
def test_a_zero_step_changes_no_bit(metric):
    manifold = FixedRank(12, 9, 3, metric)
    x = packed(manifold)
    assert torch.equal(manifold.retr(x, torch.zeros_like(x)), x)
    assert torch.equal(manifold.expmap(x, torch.zeros_like(x)), x)


def test_the_scaled_manifold_of_geoopt_takes_shorter_steps():
    manifold = FixedRank(7, 5, 2)
    x = packed(manifold)
    u = tangent(manifold, x)
    scaled = geoopt.Scaled(manifold, 2.0).double()
    torch.testing.assert_close(scaled.retr(x, u), manifold.retr(x, u / 2))


def distance(manifold: FixedRank, x: Tensor, A: Tensor) -> Tensor:
    """½|W − A|², with the gradients that the metric expects."""
    gradient = "tangent" if manifold.metric == "embedded" else "factors"
    identity = torch.eye(manifold.n, dtype=x.dtype)
    W = lowrank_linear(identity, *manifold.unpack(x), gradient=gradient).mT
    return (W - A).square().sum() / 2


def with_gap(m: int, n: int, spectrum: list[float]) -> Tensor:
    U, _, V = geometry.random(m, n, len(spectrum), dtype=torch.float64)
    return U @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ V.mT


OPTIMIZERS = {
    "adam": lambda x: geoopt.optim.RiemannianAdam([x], lr=0.2, betas=(0.9, 0.99)),
    "sgd": lambda x: geoopt.optim.RiemannianSGD([x], lr=0.1),
    "momentum": lambda x: geoopt.optim.RiemannianSGD([x], lr=0.1, momentum=0.8, stabilize=50),
}


@metrics
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizers_of_geoopt_find_the_truncated_svd(metric, optimizer):
    A = with_gap(12, 9, [3, 2.5, 2, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05])
    P, sigma, Qt = torch.linalg.svd(A, full_matrices=False)
    manifold, steps = FixedRank(12, 9, 3, metric), 400
    x = geoopt.ManifoldParameter(manifold.random(dtype=torch.float64))
    descent = OPTIMIZERS[optimizer](x)
    schedule = torch.optim.lr_scheduler.LambdaLR(descent, lambda k: 1 - k / steps)
    for _ in range(steps):
        descent.zero_grad()
        distance(manifold, x, A).backward()
        descent.step()
        schedule.step()
    manifold.assert_check_point_on_manifold(x, atol=1e-13)
    found = geometry.to_dense(manifold.unpack(x.detach()))
    # The slowest of 30 draws, Adam on the product metric, ends at 2e-5.
    assert (found - (P[:, :3] * sigma[:3]) @ Qt[:3]).norm() < 2e-4
    optimum = sigma[3:].square().sum() / 2
    assert optimum - 1e-12 <= distance(manifold, x, A) < optimum * (1 + 1e-7)


@metrics
def test_the_weight_decay_of_geoopt_shrinks_S_alone(metric):
    manifold = FixedRank(7, 5, 2, metric)
    x = geoopt.ManifoldParameter(manifold.random(dtype=torch.float64))
    before = geometry.to_dense(manifold.unpack(x.detach().clone()))
    x.grad = torch.zeros_like(x)
    geoopt.optim.RiemannianSGD([x], lr=0.1, weight_decay=0.5).step()
    after = geometry.to_dense(manifold.unpack(x.detach()))
    torch.testing.assert_close(after, (1 - 0.1 * 0.5) * before)


def test_momentum_seeded_with_a_raw_gradient_stays_on_the_manifold():
    manifold = FixedRank(7, 5, 2, "product")
    x = geoopt.ManifoldParameter(manifold.random(dtype=torch.float64))
    x.grad = x.detach().clone()  # normal to the manifold in U and V
    geoopt.optim.RiemannianSGD([x], lr=1.0, momentum=0.9).step()
    manifold.assert_check_point_on_manifold(x, atol=1e-12)


def test_a_copied_parameter_keeps_its_manifold():
    x = geoopt.ManifoldParameter(FixedRank(7, 5, 2, "product").random())
    twin = copy.deepcopy(x)
    assert twin.manifold.metric == "product" and torch.equal(twin, x)


@pytest.mark.parametrize("r", [0, 6])
def test_refuses_a_rank_out_of_range(r):
    with pytest.raises(ValueError, match=rf"min\(m, n\) = 5 for a 7x5 matrix, got {r}"):
        FixedRank(7, 5, r)


def test_refuses_an_unknown_metric_or_a_wrong_shape():
    with pytest.raises(ValueError, match="metric 'embedded' or 'product', got 'flat'"):
        FixedRank(7, 5, 2, "flat")
    with pytest.raises(ValueError, match=r"should end in shape \(14, 2\), got \(3, 13, 2\)"):
        FixedRank(7, 5, 2).random(3, 13, 2)


def test_sees_what_is_off_the_manifold():
    manifold = FixedRank(7, 5, 2)
    x = packed(manifold)
    u = tangent(manifold, x)
    U, S, V = manifold.unpack(x)
    for wrong, word in (
        (geometry.Point(2 * U, S, V), "UᵀU"),
        (geometry.Point(U, S, 2 * V), "VᵀV"),
        (geometry.Point(U, S * float("nan"), V), "finite"),
    ):
        ok, reason = manifold.check_point_on_manifold(manifold.pack(wrong), explain=True)
        assert not ok and word in reason
    for part in (geometry.Tangent(U, S, 0 * V), geometry.Tangent(0 * U, S, V)):
        assert not manifold.check_vector_on_tangent(x, u + manifold.pack(part))
