"""msign, polar_express, damped_factor: dense SVD oracles over condition numbers, shapes, dtypes and scales."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped_sign, graded, rotation

from lowrank_geo.msign import damped_factor, msign, polar_express
from lowrank_geo.reference import apply

DTYPES = [torch.float32, torch.float64]
# In the spectral norm, up to condition 100; six polynomials leave 1.2e-3 in float32. Below that, float32 resolves the
# Gram of a singular value near ε|X| to a few per cent.
SIGN_TOL = {torch.float32: 2e-3, torch.float64: 5e-12}
TALL_AND_WIDE = [(5, 1), (1, 7), (8, 8), (40, 16), (16, 40), (300, 256)]


def spectrum(m, n, condition, dtype):
    X = graded(max(m, n), min(m, n), condition, dtype)
    return X if m >= n else X.mT


def sign_error(X, Y, damping=1e-3):
    return torch.linalg.matrix_norm(Y.double() - damped_sign(X, damping), 2).max()


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("m, n", TALL_AND_WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_msign_matches_the_formula(m, n, condition, dtype):
    X = spectrum(m, n, condition, dtype)
    assert sign_error(X, msign(X)) <= SIGN_TOL[dtype]


@pytest.mark.parametrize("condition", [1e3, 1e4, 1e6, 1e12])
@pytest.mark.parametrize("m, n", TALL_AND_WIDE)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 9e-2), (torch.float64, 2e-10)], ids=str)
def test_msign_matches_the_formula_for_singular_values_below_the_damping(
    m, n, condition, dtype, bound
):
    X = spectrum(m, n, condition, dtype)
    assert sign_error(X, msign(X)) <= bound


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("m, n", TALL_AND_WIDE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_polar_express_is_the_polar_factor(m, n, condition, dtype):
    X = spectrum(m, n, condition, dtype)
    P, _, Q = torch.linalg.svd(X.double(), full_matrices=False)
    assert torch.linalg.matrix_norm(polar_express(X) - P @ Q, 2).max() <= 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_polar_express_lets_small_singular_values_be(dtype):
    X = spectrum(8, 8, 1e6, dtype)
    P, sigma, Q = torch.linalg.svd(X.double())
    relative = sigma / (sigma**8).sum() ** (1 / 8)
    gain = (P.mT @ polar_express(X).double() @ Q.mT).diagonal() / relative
    small = relative < 1e-3
    assert small.any() and (gain[small] <= 480).all()
    if dtype == torch.float64:  # float32 does not resolve these
        assert (gain[small] >= 240).all()
    assert not polar_express(torch.zeros(2, 3, 3, dtype=dtype)).any()
    assert polar_express(torch.full((3, 3), torch.finfo(dtype).max, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-3])
def test_msign_follows_its_damping(damping):
    X = spectrum(20, 6, 50.0, torch.float64)
    assert sign_error(X, msign(X, damping=damping), damping) <= 1e-12  # 90 draws


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e37])
def test_msign_does_not_depend_on_the_scale(scale):
    X = spectrum(20, 6, 10.0, torch.float32)
    assert (msign(X * scale) - msign(X)).abs().max() <= 1e-4


def test_msign_of_zero_is_zero_alone_and_in_a_batch():
    X = torch.stack([torch.zeros(6, 4), torch.randn(6, 4), torch.zeros(6, 4)])
    Y = msign(X)
    assert not Y[0].any() and not Y[2].any()
    assert sign_error(X[1], Y[1]) <= 2e-3
    assert not msign(torch.zeros(4, 6)).any()
    assert msign(torch.zeros(0, 6, 4)).shape == (0, 6, 4)


def test_msign_of_a_singular_matrix_keeps_its_kernel():
    X = torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 6, dtype=torch.float64)
    sigma = torch.linalg.svdvals(msign(X))
    assert (sigma[:2] > 0.99).all() and (sigma[2:] < 1e-10).all()


def test_msign_does_not_depend_on_the_frames():
    X, O1, O2 = torch.randn(12, 5, dtype=torch.float64), rotation(12), rotation(5)
    assert (msign(O1 @ X @ O2) - O1 @ msign(X) @ O2).abs().max() < 1e-10


def test_msign_has_batch_dimensions_that_equal_a_loop():
    X = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    assert (msign(X)[1, 2] - msign(X[1, 2])).abs().max() < 1e-12


def damped(X):
    """Q and P of X = Q P."""
    P, T, d = damped_factor(X)
    return apply(X, T, d), P


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("m, n", [(5, 1), (8, 8), (40, 16), (300, 256)])
def test_damped_factor_has_the_span_and_the_damped_singular_values(m, n, condition):
    X = graded(m, n, condition, torch.float64)
    Q, P = damped(X)
    sigma = torch.linalg.svdvals(X)
    expected = sigma / (sigma**2 + (1e-3 * sigma.norm()) ** 2).sqrt()
    assert (Q @ P - X).norm() < 1e-13 * X.norm() * n  # 10 x the worst of 64 draws
    assert (torch.linalg.svdvals(Q) - expected).abs().max() < 1e-9
    assert not P.tril(-1).any()


def test_damped_factor_of_zero_is_zero_and_single_precision_stays_finite():
    Q, P = damped(torch.zeros(6, 4))
    assert not Q.any() and not P.any()
    Q, P = damped(graded(40, 16, 1e12, torch.float32))
    assert Q.isfinite().all() and torch.linalg.matrix_norm(Q, 2) < 1 + 1e-3


@given(
    scale=st.floats(-37, 37),
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    spread=st.floats(0, 8),
    seed=st.integers(0, 1000),
)
def test_msign_is_finite_and_at_most_one(scale, m, n, spread, seed):
    torch.manual_seed(seed)
    X = torch.randn(m, n) * 10 ** (-spread * torch.rand(n)) * 10**scale
    Y = msign(X)
    assert Y.isfinite().all()
    assert torch.linalg.matrix_norm(Y, 2) <= 1 + 2e-3
