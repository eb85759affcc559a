"""init: what each starting point keeps of the weight, precision, meta, refusals."""

import pytest
import torch
from oracles import best_approximation, dense, orthonormality

from lowrank_geo.init import INITS, factorize

SHAPES = [(7, 5, 1), (24, 18, 8), (33, 8, 8), (6, 40, 6), (1, 1, 1)]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("m, n, r", SHAPES)
def test_point_is_orthonormal_contiguous_and_of_the_right_shape(init, m, n, r):
    W = torch.randn(m, n, dtype=torch.float64)
    point = factorize(W, r, init)
    assert [tuple(x.shape) for x in point] == [(m, r), (r, r), (n, r)]
    assert max(orthonormality(point.U), orthonormality(point.V)) < 1e-14
    assert all(x.is_contiguous() for x in point)


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_svd_is_the_best_approximation_with_a_descending_core(m, n, r):
    W = torch.randn(m, n, dtype=torch.float64)
    point = factorize(W, r, "svd")
    sigma = torch.diagonal(point.S)
    assert (dense(point) - best_approximation(W, r)).norm() < 1e-13 * W.norm()
    assert torch.equal(point.S, torch.diag(sigma.sort(descending=True)[0]))
    assert r < min(m, n) or (dense(point) - W).norm() < 1e-14 * W.norm() * r


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_spectral_is_the_svd_rescaled_to_the_norm_of_the_weight(m, n, r):
    W = torch.randn(m, n, dtype=torch.float64)
    best, found = best_approximation(W, r), dense(factorize(W, r, "spectral"))
    assert (found - best * (W.norm() / best.norm())).norm() < 1e-13 * W.norm()


@pytest.mark.parametrize("m, n, r", SHAPES)
def test_orthogonal_has_a_flat_spectrum_of_the_norm_of_the_weight(m, n, r):
    W = torch.randn(m, n, dtype=torch.float64)
    sigma = torch.linalg.svdvals(dense(factorize(W, r, "orthogonal")))[:r]
    assert (sigma - W.norm() / r**0.5).abs().max() < 1e-14 * W.norm()


@pytest.mark.parametrize("init", INITS)
def test_zero_weight_gives_a_zero_core_and_sound_frames(init):
    point = factorize(torch.zeros(6, 5), 3, init)
    assert not point.S.any() and max(orthonormality(point.U), orthonormality(point.V)) < 1e-6


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "given, kept",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_factors_are_float32_or_better(init, given, kept):
    W = torch.randn(6, 5).to(given)
    for device in ("cpu", "meta"):
        point = factorize(W.to(device), 3, init)
        assert all(x.dtype == kept and x.device.type == device for x in point)
        assert [tuple(x.shape) for x in point] == [(6, 3), (3, 3), (5, 3)]


@pytest.mark.parametrize("init", INITS)
def test_point_has_no_history_and_no_memory_of_the_weight(init):
    W = torch.nn.Parameter(torch.randn(6, 5))
    before = W.detach().clone()
    point = factorize(W, 5, init)
    for x in point:
        assert not x.requires_grad
        x.zero_()
    assert torch.equal(W, before)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rank", [0, -1, 6])
@pytest.mark.parametrize("init", INITS)
def test_refuses_an_impossible_rank(init, rank, device):
    with pytest.raises(ValueError, match=rf"min\(m, n\) = 5 for a 6x5 matrix, got {rank}; choose"):
        factorize(torch.zeros(6, 5, device=device), rank, init)


def test_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="svd, spectral, orthogonal, got 'pca'; use one"):
        factorize(torch.zeros(6, 5), 2, "pca")
