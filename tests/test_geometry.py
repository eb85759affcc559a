"""geometry: defining properties, dense oracles, gauge invariance, refusals."""

import pytest
import torch
from oracles import dense, rotation, tangent_projection

from lowrank_geo import geometry
from lowrank_geo.geometry import Point, Tangent, embed, inner, norm, project, transport

# r = 1, in between, r = n, r = m, square and full.
SHAPES = [(7, 5, 1), (24, 18, 8), (33, 8, 8), (6, 40, 6), (5, 5, 5), (1, 1, 1)]
CORES = [None, 1e8, "singular", "zero"]
TOL = {torch.float64: 4e-15, torch.float32: 2e-6}  # 10 x the worst of 600 draws


def rotate(point: Point, O1: torch.Tensor, O2: torch.Tensor) -> Point:
    """The same matrix in other frames."""
    return Point(point.U @ O1, O1.mT @ point.S @ O2, point.V @ O2)


@pytest.fixture
def same_space(point):
    """Two tangents at one point, and the point."""

    def draw(m, n, r, dtype=torch.float64, **options):
        p = point(m, n, r, dtype, **options)
        batch = options.get("batch", ())
        return p, *(project(p, torch.randn(*batch, m, n, dtype=dtype)) for _ in range(2))

    return draw


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_to_dense_is_the_product(point, m, n, r, core):
    p = point(m, n, r, core=core)
    assert (geometry.to_dense(p) - dense(p)).norm() <= 1e-15 * r * p.S.norm()


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_projection_matches_the_dense_projector(point, m, n, r, core, dtype):
    p, Z = point(m, n, r, dtype, core=core), torch.randn(m, n, dtype=dtype)
    error = embed(p, project(p, Z)) - tangent_projection(p, Z)
    assert error.norm() < TOL[dtype] * Z.norm()


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_projection_matches_the_dense_projector_term_by_term(point, m, n, r):
    p, Z = point(m, n, r), torch.randn(m, n, dtype=torch.float64)
    P, Q = p.U @ p.U.mT, p.V @ p.V.mT
    xi = project(p, Z)
    assert (p.U @ xi.M @ p.V.mT - P @ Z @ Q).norm() < 4e-15 * Z.norm()
    assert (xi.Up @ p.V.mT - (Z @ Q - P @ Z @ Q)).norm() < 4e-15 * Z.norm()
    assert (p.U @ xi.Vp.mT - (P @ Z - P @ Z @ Q)).norm() < 4e-15 * Z.norm()


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_projection_is_the_nearest_tangent(same_space, m, n, r):
    p, xi, eta = same_space(m, n, r)
    Z = torch.randn(m, n, dtype=torch.float64)
    nearest = project(p, Z)
    residual = Z - embed(p, nearest)
    # Orthogonal to every tangent, so every other tangent is farther away.
    assert (residual * embed(p, eta)).sum().abs() < 1e-13 * Z.norm() * norm(eta)
    other = Tangent(*(a + 1e-3 * b for a, b in zip(nearest, xi, strict=True)))
    assert (Z - embed(p, other)).norm() > residual.norm()


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_projection_leaves_tangents_alone(same_space, m, n, r):
    p, xi, _ = same_space(m, n, r)
    again = project(p, embed(p, xi))
    assert all((a - b).norm() < 1e-14 * norm(xi) for a, b in zip(again, xi, strict=True))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_projection_is_in_the_gauge(same_space, dtype, bound):
    p, xi, _ = same_space(64, 48, 16, dtype)
    assert (p.U.mT @ xi.Up).abs().max() < bound and (p.V.mT @ xi.Vp).abs().max() < bound


def test_projection_from_factors_needs_only_ZV_and_ZtU(point):
    p, Z = point(9, 7, 3), torch.randn(9, 7, dtype=torch.float64)
    expected = project(p, Z)
    found = geometry.project_factors(p, Z @ p.V, Z.mT @ p.U)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gauge_is_the_projection_of_what_the_coordinates_embed_to(point):
    p = point(9, 7, 3)
    loose = Tangent(*(torch.randn_like(x) for x in p))
    xi = geometry.gauge(p, loose)
    kept = project(p, embed(p, Tangent(xi.Up, loose.M, xi.Vp)))
    assert all((a - b).norm() < 1e-13 for a, b in zip(xi, kept, strict=True))
    assert torch.equal(xi.M, loose.M)
    assert (p.U.mT @ xi.Up).abs().max() < 1e-14 and (p.V.mT @ xi.Vp).abs().max() < 1e-14


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_inner_and_norm_are_those_of_the_embedded_matrices(same_space, m, n, r):
    p, xi, eta = same_space(m, n, r)
    scale = norm(xi) * norm(eta)
    assert (inner(xi, eta) - (embed(p, xi) * embed(p, eta)).sum()).abs() < 1e-14 * scale
    assert (norm(xi) - embed(p, xi).norm()).abs() < 1e-14 * norm(xi)


@pytest.mark.parametrize("core", CORES)
def test_projection_transport_and_inner_do_not_depend_on_the_frames(same_space, point, core):
    p, xi, eta = same_space(14, 11, 4, core=core)
    to, Z = point(14, 11, 4), torch.randn(14, 11, dtype=torch.float64)
    O1, O2 = rotation(4), rotation(4)
    q = rotate(p, O1, O2)
    turned = [Tangent(x.Up @ O2, O1.mT @ x.M @ O2, x.Vp @ O1) for x in (xi, eta)]
    assert (embed(q, turned[0]) - embed(p, xi)).norm() < 1e-13
    assert (inner(*turned) - inner(xi, eta)).abs() < 1e-13
    assert (embed(q, project(q, Z)) - embed(p, project(p, Z))).norm() < 1e-13
    moved, expected = transport(q, turned[0], to), transport(p, xi, to)
    assert all((a - b).norm() < 1e-13 for a, b in zip(moved, expected, strict=True))
    target = rotate(to, O2, O1)
    assert (embed(target, transport(p, xi, target)) - embed(to, expected)).norm() < 1e-13


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_transport_is_the_dense_projection(same_space, point, m, n, r, dtype):
    p, xi, _ = same_space(m, n, r, dtype)
    to = point(m, n, r, dtype)
    error = embed(to, transport(p, xi, to)) - tangent_projection(to, embed(p, xi))
    assert error.norm() < TOL[dtype] * norm(xi)


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_transport_contracts(same_space, point, m, n, r):
    p, xi, _ = same_space(m, n, r)
    moved = transport(p, xi, point(m, n, r))
    assert norm(moved) <= norm(xi) * (1 + 1e-14)
    if r < min(m, n):
        assert norm(moved) < 0.999 * norm(xi)


def test_transport_to_the_same_point_is_the_identity(same_space):
    p, xi, _ = same_space(9, 7, 3)
    still = transport(p, xi, p)
    assert all((a - b).norm() < 1e-14 * norm(xi) for a, b in zip(still, xi, strict=True))


def test_batch_dimensions_equal_a_loop(point):
    p, to = point(9, 7, 3, batch=(2, 3)), point(9, 7, 3, batch=(2, 3))
    Z = torch.randn(2, 3, 9, 7, dtype=torch.float64)
    xi = project(p, Z)
    moved, size, matrix = transport(p, xi, to), norm(xi), embed(p, xi)
    for i in [(0, 0), (0, 2), (1, 1)]:
        at, there = Point(*(x[i] for x in p)), Point(*(x[i] for x in to))
        one = project(at, Z[i])
        assert all((a[i] - b).norm() < 1e-14 for a, b in zip(xi, one, strict=True))
        expected = transport(at, one, there)
        assert all((a[i] - b).norm() < 1e-14 for a, b in zip(moved, expected, strict=True))
        assert (size[i] - norm(one)).abs() < 1e-14 and (matrix[i] - embed(at, one)).norm() < 1e-14
        assert (geometry.to_dense(p)[i] - dense(at)).norm() < 1e-14


def test_random_points_are_orthonormal_repeatable_and_of_both_orientations():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return geometry.random(3, 2, 2, batch=(64,), dtype=torch.float64, generator=generator)

    p, again, other = draw(1), draw(1), draw(2)
    identity = torch.eye(2, dtype=torch.float64)
    assert (p.U.mT @ p.U - identity).abs().max() < 1e-15 * 10
    assert all(torch.equal(a, b) for a, b in zip(p, again, strict=True))
    assert not torch.equal(p.U, other.U)
    # Haar: reflections and rotations alike; without the sign fix the first column leans to one side.
    assert 16 < (torch.linalg.det(p.V) > 0).sum() < 48 and p.U[:, 0, 0].mean().abs() < 0.25


def test_random_frames_are_contiguous():
    # safetensors refuses other strides, and the fake kernels promise the strides of the parameters.
    assert all(x.is_contiguous() for x in geometry.random(6, 5, 3, batch=(2,)))


@pytest.mark.parametrize("r", [0, -1, 6])
def test_random_refuses_an_impossible_rank(r):
    with pytest.raises(ValueError, match=rf"min\(m, n\) = 5 for a 7x5 matrix, got {r}; choose"):
        geometry.random(7, 5, r)


def test_project_refuses_a_transposed_matrix(point):
    with pytest.raises(ValueError, match=r"\(64, 48\), got \(48, 64\); transpose"):
        project(point(64, 48, 16), torch.zeros(48, 64, dtype=torch.float64))


def test_project_refuses_a_missing_batch(point):
    with pytest.raises(ValueError, match=r"\(2, 6, 5\), got \(6, 5\)"):
        project(point(6, 5, 2, batch=(2,)), torch.zeros(6, 5, dtype=torch.float64))
