"""Changes of rank: the same matrix in wider frames, the nearest one in narrower frames, and cores that follow."""

import pytest
import torch
from oracles import best_approximation, dense, orthonormality, tangent_projection

from lowrank_geo.geometry import Point, project
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.optim import compact, reserve
from lowrank_geo.optim.augmentation import (
    augment,
    augmented_gradient,
    carried,
    mixed,
    truncate,
    used_rank,
)

SHAPES = [(12, 9, 8, 3), (9, 12, 8, 4), (8, 8, 8, 5), (7, 6, 3, 3), (20, 5, 4, 1)]  # m, n, R, a
shapes = pytest.mark.parametrize("m, n, width, rank", SHAPES)
# Worst of 200 draws of each shape: 6e-7 and 1e-15.
TOL = {torch.float32: 1e-6, torch.float64: 1e-14}


def masked(point, rank):
    S = point.S.clone()
    S[..., rank:, :] = 0
    S[..., :, rank:] = 0
    return Point(point.U, S, point.V)


@pytest.fixture
def case(point):
    """case(m, n, R, a, dtype): two matrices of rank a in width R, dense gradients, tangent gradients, ranks."""

    def make(m, n, width, rank, dtype=torch.float64):
        p = masked(point(m, n, width, dtype, batch=(2,)), rank)
        G = torch.randn(2, m, n, dtype=dtype)
        return p, G, project(p, G), torch.full((2,), rank)

    return make


@pytest.mark.parametrize("dtype", TOL, ids=str)
@shapes
def test_augmentation_keeps_the_matrix(case, m, n, width, rank, dtype):
    p, _, gradient, ranks = case(m, n, width, rank, dtype)
    change = augment(p, gradient, ranks)
    assert (dense(change.point) - dense(p)).norm() < TOL[dtype] * dense(p).norm()
    assert max(orthonormality(change.point.U), orthonormality(change.point.V)) < TOL[dtype]
    assert change.rank.tolist() == [min(2 * rank, width)] * 2
    outside = change.point.S.clone()
    outside[:, : change.rank[0], : change.rank[0]] = 0
    assert not outside.any()


@shapes
def test_augmented_frames_hold_the_old_frame_and_the_gradient(case, m, n, width, rank):
    p, G, gradient, ranks = case(m, n, width, rank)
    (U, _, V), wider, _, _ = augment(p, gradient, ranks)
    added = wider[0] - rank
    for new, old, Z in ((U, p.U, G @ p.V), (V, p.V, G.mT @ p.U)):
        used = new[..., : wider[0]]
        wanted = torch.cat([old[..., :rank], Z[..., :added]], -1)
        assert (wanted - used @ (used.mT @ wanted)).abs().max() < 1e-13


def test_a_zero_gradient_augments_by_any_direction(case):
    p, _, gradient, ranks = case(12, 9, 8, 3)
    still = type(gradient)(*(torch.zeros_like(x) for x in gradient))
    change = augment(p, still, ranks)
    assert (dense(change.point) - dense(p)).abs().max() < 1e-14
    assert orthonormality(change.point.U) < 1e-14


@shapes
def test_the_augmented_gradient_is_that_of_the_tangent_space(case, m, n, width, rank):
    """ÛᵀP_T(G)V̂ with the tangent space of the matrix at its rank, not at the width of its factors."""
    p, G, gradient, ranks = case(m, n, width, rank)
    change = augment(p, gradient, ranks)
    narrow = Point(p.U[..., :rank], p.S[..., :rank, :rank], p.V[..., :rank])
    U, _, V = change.point
    expected = U.mT @ tangent_projection(narrow, G) @ V
    expected[:, change.rank[0] :], expected[:, :, change.rank[0] :] = 0, 0
    found = augmented_gradient(p, gradient, ranks, change)
    assert (found - expected).abs().max() < 1e-13


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 0.1, 0.5, 0.99])
@shapes
def test_truncation_is_the_best_approximation_within_the_tolerance(
    case, m, n, width, rank, tolerance
):
    p, _, _, ranks = case(m, n, width, rank)
    change = truncate(p, ranks, tolerance=tolerance)
    for W, new, kept in zip(dense(p), dense(change.point), change.rank.tolist(), strict=True):
        assert (new - best_approximation(W, kept)).abs().max() < 1e-13
        assert (new - W).norm() <= tolerance * W.norm() + 1e-13
        if kept > 1:  # one less would be too few
            assert (best_approximation(W, kept - 1) - W).norm() >= tolerance * W.norm()
    assert orthonormality(change.point.U) < 1e-13


def test_truncation_keeps_the_rank_within_its_bounds(case):
    p, _, _, ranks = case(12, 9, 8, 6)
    assert truncate(p, ranks, tolerance=0.0, max_rank=4).rank.tolist() == [4, 4]
    assert truncate(p, ranks, tolerance=0.999, min_rank=3).rank.tolist() == [3, 3]
    assert truncate(p, torch.tensor([6, 2]), tolerance=0.0, min_rank=3).rank.tolist() == [6, 2]


def test_a_matrix_that_is_not_finite_does_not_stop_the_others(case):
    p, _, _, ranks = case(12, 9, 8, 6)
    expected = truncate(p, ranks, tolerance=0.3)
    p.S[1, 0, 0] = torch.nan
    found = truncate(p, ranks, tolerance=0.3)
    assert torch.equal(found.point.S[0], expected.point.S[0]) and found.rank[1] == 6
    assert found.point.S[1].isnan().any()


def test_a_momentum_is_carried_as_the_matrix_it_is(case):
    """ÛᵀUmVᵀV̂ in wider frames is U m Vᵀ itself; in narrower ones, its part in them."""
    p, _, gradient, ranks = case(12, 9, 8, 3)
    m = masked(Point(p.U, torch.randn(2, 8, 8, dtype=torch.float64), p.V), 3)
    wider = augment(p, gradient, ranks)
    found = Point(wider.point.U, carried(m.S, wider), wider.point.V)
    assert (dense(found) - dense(m)).abs().max() < 1e-13
    narrow = truncate(p, ranks, tolerance=0.0, max_rank=2)
    U, V = narrow.point.U[..., :2], narrow.point.V[..., :2]
    expected = U @ U.mT @ dense(m) @ V @ V.mT
    found = Point(narrow.point.U, carried(m.S, narrow), narrow.point.V)
    assert (dense(found) - expected).abs().max() < 1e-13


def test_mixing_is_exact_for_uncorrelated_entries(case):
    """The diagonal of the covariance of PᵀgQ, with Cov(g) = diag(v), by the Kronecker product."""
    p, _, _, ranks = case(12, 9, 6, 6)
    change = truncate(p, ranks, tolerance=0.0)
    v = torch.rand(2, 6, 6, dtype=torch.float64)
    for i in range(2):
        K = torch.kron(
            change.P[i].mT.contiguous(), change.Q[i].mT.contiguous()
        )  # of row-major entries
        expected = (K @ v[i].flatten().diag() @ K.mT).diagonal().reshape(6, 6)
        assert (mixed(v, change)[i] - expected).abs().max() < 1e-14


@pytest.mark.parametrize("make", [lambda: LowRankLinear(9, 7, 3), lambda: LowRankLinear(4, 9, 3)])
def test_reserving_and_compacting_keep_weights_and_parameters(make):
    layer = make()
    before, parameters = layer.weight.detach().clone(), list(layer.parameters())
    reserve(layer)
    assert layer.rank == min(6, layer.in_features, layer.out_features)
    assert torch.equal(layer.weight, before) or (layer.weight - before).abs().max() < 1e-6
    assert max(orthonormality(layer.U), orthonormality(layer.V)) < 2e-6
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    layer(torch.randn(2, layer.in_features)).sum().backward()
    compact(layer)
    assert layer.rank == 3 and (layer.weight - before).abs().max() < 1e-6


def test_frozen_layers_are_not_widened_and_bad_factors_refused():
    layer = LowRankLinear(9, 7, 3).requires_grad_(False)
    assert reserve(layer, 2.0).rank == 3
    with pytest.raises(ValueError, match=r"reserve needs a factor >= 1, got 0\.5"):
        reserve(layer, 0.5)


def test_the_rank_in_use_is_the_leading_block():
    S = torch.zeros(3, 4, 4)
    S[0, 2, 0], S[1, 0, 1] = 1, 1
    assert used_rank(S).tolist() == [3, 2, 4]
