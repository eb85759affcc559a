"""retraction: order by slope, the dense oracle of `svd`, singular cores, gauge invariance, drift, refusals."""

import math

import pytest
import torch
from oracles import (
    best_approximation,
    dense,
    normal_projection,
    orthonormality,
    polar,
    rotation,
    tangent_projection,
)

from lowrank_geo import retraction
from lowrank_geo.geometry import Point, Tangent, embed, norm, project
from lowrank_geo.retraction import RETRACTIONS, carried, keep_if_zero, retract

METHODS = sorted(RETRACTIONS)
SHAPES = [(7, 5, 1), (24, 18, 8), (33, 8, 8), (6, 40, 6), (5, 5, 5), (1, 1, 1)]
CORES = [None, 1e8, "singular", "zero"]
# Tangent part, normal part of R(tξ) − W − tξ; the second-order methods need 3 and 2.
ORDERS = {"svd": (3, 2), "orthographic": (4, 2), "splitting": (3, 2)}


@pytest.fixture
def step(point):
    """A point and a tangent of norm 1 there."""

    def draw(m, n, r, dtype=torch.float64, **options):
        p = point(m, n, r, dtype, **options)
        xi = project(p, torch.randn(*options.get("batch", ()), m, n, dtype=dtype))
        return p, scaled(xi, 1 / norm(xi)[..., None, None])

    return draw


def scaled(xi, t):
    return Tangent(*(t * x for x in xi))


def zero(point):
    return Tangent(*(torch.zeros_like(x) for x in point))


def slope(error, large=1 / 16, small=1 / 128):
    """The exponent p of error(t) = c tᵖ between two step lengths."""
    return math.log(error(large) / error(small)) / math.log(large / small)


@pytest.mark.parametrize("m, n, r", [(7, 5, 1), (24, 18, 8), (20, 40, 3)])
@pytest.mark.parametrize("method", METHODS)
def test_is_second_order_in_the_tangent_and_the_normal_part(step, method, m, n, r):
    p, xi = step(m, n, r, core=2.0)

    def error(t, part):
        moved = dense(retract(p, scaled(xi, t), method=method))
        return part(p, moved - dense(p) - t * embed(p, xi)).norm().item()

    tangential, normal = ORDERS[method]
    assert slope(lambda t: error(t, tangent_projection)) > tangential - 0.1
    assert slope(lambda t: error(t, normal_projection)) == pytest.approx(normal, abs=0.1)


@pytest.mark.parametrize("m, n, r", [(33, 8, 8), (6, 40, 6), (5, 5, 5), (1, 1, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_is_exact_where_every_matrix_has_full_rank(step, method, m, n, r):
    # r = min(m, n): W + ξ is on the manifold.
    p, xi = step(m, n, r)
    moved = dense(retract(p, xi, method=method))
    assert (moved - dense(p) - embed(p, xi)).norm() < 1e-13 * (1 + p.S.norm())


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-5)], ids=str)
def test_of_the_zero_step_is_the_point(point, method, m, n, r, core, dtype, bound):
    p = point(m, n, r, dtype, core=core)
    q = retract(p, zero(p), method=method)
    assert (dense(q) - dense(p)).norm() <= bound * r * p.S.norm()
    assert max(orthonormality(q.U), orthonormality(q.V)) < bound * 10


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", SHAPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_is_finite_and_orthonormal_at_every_core(step, method, m, n, r, core, size, dtype, bound):
    p, xi = step(m, n, r, dtype, core=core)
    q = retract(p, scaled(xi, size), method=method)
    assert all(x.isfinite().all() for x in q)
    assert max(orthonormality(q.U), orthonormality(q.V)) < bound


@pytest.mark.parametrize("method", METHODS)
def test_is_orthonormal_at_a_nilpotent_core(point, method):
    p = point(12, 9, 4)
    p = p._replace(S=torch.diag(torch.ones(3, dtype=torch.float64), 1))
    for xi in (zero(p), Tangent(zero(p).Up, 1e-9 * torch.randn_like(p.S), zero(p).Vp)):
        q = retract(p, xi, method=method)
        assert max(orthonormality(q.U), orthonormality(q.V)) < 1e-13
        assert (dense(q) - dense(p) - embed(p, xi)).norm() < 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_at_a_zero_core_the_step_is_not_lost(step, method):
    # At W = 0 every method returns a matrix that agrees with ξ in some direction: <R, ξ> > 0.
    p, xi = step(14, 11, 4, core="zero")
    moved = dense(retract(p, scaled(xi, 1e-3), method=method))
    assert (moved * embed(p, xi)).sum() > 1e-4


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_svd_is_the_best_approximation(step, m, n, r, core):
    p, xi = step(m, n, r, core=core)
    q = retraction.svd(p, xi).point
    expected = best_approximation(dense(p) + embed(p, xi), r)
    assert (dense(q) - expected).norm() < 1e-12 * (1 + p.S.norm())
    diagonal = torch.diagonal(q.S)
    assert torch.equal(q.S, torch.diag(diagonal)) and torch.equal(
        diagonal, diagonal.sort(descending=True)[0]
    )


@pytest.mark.parametrize("core", [None, 1e4])
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_orthographic_projects_to_both_ranges(step, m, n, r, core):
    p, xi = step(m, n, r, core=core)
    Z = dense(p) + embed(p, xi)
    P, Q = (polar(x) @ polar(x).mT for x in (Z @ p.V, Z.mT @ p.U))
    assert (dense(retraction.orthographic(p, xi).point) - P @ Z @ Q).norm() < 1e-9 * (
        1 + p.S.norm()
    )


@pytest.mark.parametrize("core", [None, 1e4])
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_splitting_is_K_then_S_back_then_L(step, m, n, r, core):
    p, xi = step(m, n, r, core=core)
    U0, S0, V0, D = p.U, p.S, p.V, embed(p, xi)
    U1, S_hat = torch.linalg.qr(U0 @ S0 + D @ V0)  # the substeps of Lubich & Oseledets
    S_tilde = S_hat - U1.mT @ D @ V0
    L = V0 @ S_tilde.mT + D.mT @ U1
    assert (dense(retraction.splitting(p, xi).point) - U1 @ L.mT).norm() < 1e-9 * (1 + p.S.norm())


@pytest.mark.parametrize("core", [None, 10.0, "singular"])
@pytest.mark.parametrize("method", METHODS)
def test_does_not_depend_on_the_frames(step, method, core):
    p, xi = step(14, 11, 4, core=core)
    O1, O2 = rotation(4), rotation(4)
    q = Point(p.U @ O1, O1.mT @ p.S @ O2, p.V @ O2)
    eta = Tangent(xi.Up @ O2, O1.mT @ xi.M @ O2, xi.Vp @ O1)
    same = dense(retract(q, eta, method=method)) - dense(retract(p, xi, method=method))
    assert same.norm() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_batch_dimensions_equal_a_loop(step, method):
    p, xi = step(9, 7, 3, batch=(2, 2))
    q = retract(p, xi, method=method)
    for i in [(0, 0), (1, 1)]:
        one = retract(Point(*(x[i] for x in p)), Tangent(*(x[i] for x in xi)), method=method)
        assert (dense(Point(*(x[i] for x in q))) - dense(one)).norm() < 1e-13


def product_step(p, size):
    """A horizontal step (ΔU, ΔS, ΔV), UᵀΔU = 0 = VᵀΔV, whose three parts have the Frobenius norm `size`."""
    U, S, V = p
    D, E = torch.randn_like(U), torch.randn_like(V)
    parts = (D - U @ (U.mT @ D), torch.randn_like(S), E - V @ (V.mT @ E))
    norms = [torch.linalg.matrix_norm(x)[..., None, None] for x in parts]
    return Tangent(*(x * (size / s) for x, s in zip(parts, norms, strict=True)))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", [(7, 5, 1), (24, 18, 8), (300, 260, 64)])
def test_polar_moves_each_factor_to_its_polar_factor(point, m, n, r, core):
    p = point(m, n, r, core=core)
    step = product_step(p, 0.5)
    q = retraction.polar(p, step)
    assert (q.U - polar(p.U + step.Up)).abs().max() < 1e-13
    assert (q.V - polar(p.V + step.Vp)).abs().max() < 1e-13
    assert torch.equal(q.S, p.S + step.M)


def test_polar_agrees_with_its_step_to_first_order(point):
    p = point(24, 18, 5)
    step = product_step(p, 1.0)

    def error(t):
        q = retraction.polar(p, scaled(step, t))
        return max((q.U - p.U - t * step.Up).norm(), (q.V - p.V - t * step.Vp).norm()).item()

    assert slope(error) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 2e-6)], ids=str)
def test_polar_of_the_zero_step_is_the_point(point, core, dtype, bound):
    p = point(24, 18, 8, dtype, core=core)
    q = retraction.polar(p, zero(p))
    assert max((a - b).abs().max() for a, b in zip(q, p, strict=True)) < bound


@pytest.mark.parametrize("size", [0.3, 3.0])
def test_polar_does_not_depend_on_the_frames(point, size):
    p = point(14, 11, 4)
    step, O1, O2 = product_step(p, size), rotation(4), rotation(4)
    q = Point(p.U @ O1, O1.mT @ p.S @ O2, p.V @ O2)
    turned = Tangent(step.Up @ O1, O1.mT @ step.M @ O2, step.Vp @ O2)
    assert (dense(retraction.polar(q, turned)) - dense(retraction.polar(p, step))).norm() < 1e-12


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_momentum_is_carried_to_the_new_point_whatever_the_core(point, method, m, n, r, core):
    p = point(m, n, r, core=core, batch=(2,))
    step, xi = (project(p, torch.randn(2, m, n, dtype=torch.float64)) for _ in range(2))
    step = Tangent(*(torch.stack([x[0], 0 * x[1]]) for x in step))  # the second one stays
    new, moved = carried(p, step, xi, method=method)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(p, new, strict=True))
    alone = retract(p, step, method=method)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, new, strict=True))
    error = embed(new, moved) - tangent_projection(new, embed(p, xi))
    assert error.norm() < 1e-12 * embed(p, xi).norm()


def test_keep_if_zero_is_bit_identical_for_still_matrices_only(point):
    p = point(9, 7, 3, torch.float32, batch=(5,))
    xi = zero(p)
    xi.Up[1, 4, 2], xi.M[2, 0, 0], xi.Vp[3, 6, 1] = 1e-30, -1e-30, float("nan")
    xi.Up[4], xi.M[4] = -0.0, -0.0
    new = Point(*(torch.randn_like(x) for x in p))
    kept = keep_if_zero(p, xi, new)
    for old, fresh, out in zip(p, new, kept, strict=True):
        assert torch.equal(out[[0, 4]], old[[0, 4]])
        assert torch.equal(out[[1, 2, 3]], fresh[[1, 2, 3]])


def test_retract_refuses_an_unknown_method(step):
    with pytest.raises(ValueError, match="orthographic, splitting, svd, got 'qr'; use one"):
        retract(*step(4, 3, 1), method="qr")


def drift(p, advance, *, steps=10_000):
    """The largest |UᵀU − I| or |VᵀV − I| on the way."""
    worst = 0.0
    for i in range(steps):
        p = advance(p)
        if i % 500 == 499:
            worst = max(worst, orthonormality(p.U), orthonormality(p.V))
    assert all(x.isfinite().all() for x in p)
    return worst


@pytest.mark.slow
def test_polar_does_not_drift_in_10_000_float32_steps(point):
    # Small, about 45 degrees, and cut short; projected once, in float32, as in an optimizer.
    sizes = torch.tensor([0.01, 2.0, 100.0])[:, None, None]

    def advance(p):
        q = retraction.polar(p, product_step(p, sizes))
        return q._replace(S=q.S * 0.5)

    assert drift(point(24, 17, 8, torch.float32, batch=(3,)), advance) <= 1e-5


@pytest.mark.slow
def test_orthographic_does_not_drift_in_10_000_float32_steps(point):
    sizes = torch.tensor([0.01, 3.0, 100.0])

    def advance(p):
        xi = project(p, torch.randn(3, 24, 17))
        q = retract(p, scaled(xi, (sizes / norm(xi))[:, None, None]))
        return q._replace(S=q.S * 0.9)

    assert drift(point(24, 17, 8, torch.float32, batch=(3,)), advance) <= 1e-5


def test_polar_does_not_drift_at_a_large_rank(point):
    def advance(p):
        return retraction.polar(p, product_step(p, 12.0)._replace(M=torch.zeros_like(p.S)))

    p = point(400, 300, 256, torch.float32)
    for _ in range(10):
        p = advance(p)
    assert max(orthonormality(p.U), orthonormality(p.V)) <= 1e-5
