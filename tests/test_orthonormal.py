"""orthonormal: dense SVD oracles over condition numbers, ranks, dtypes and scales."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import damped_sign, orthonormality, polar, rotation

from lowrank_geo import orthonormal
from lowrank_geo.geometry import random
from lowrank_geo.orthonormal import (
    damped_basis,
    inverse_sqrt,
    msign,
    orthonormalize,
    polar_express,
    polar_update,
    twice,
)

DTYPES = [torch.float32, torch.float64]
ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-13}
everywhere = pytest.mark.usefixtures("wherever")
FRAMES = [(5, 1), (20, 8), (8, 8), (100, 64), (300, 256)]


def frame(m, r, dtype=torch.float64):
    return random(m, r, r, dtype=torch.float64).U.to(dtype)


def graded(m, r, condition, dtype):
    """A matrix with singular values from 1 down to 1/condition."""
    sigma = condition ** -torch.linspace(0, 1, r, dtype=torch.float64)
    return ((frame(m, r) * sigma) @ rotation(r)).to(dtype)


def residual(K, Q):
    """|K − QQᵀK| / (eps √r |K|), in the eps of K."""
    eps, r = torch.finfo(K.dtype).eps, K.shape[-1]
    K, Q = K.double() / K.abs().max(), Q.double()
    return ((K - Q @ (Q.mT @ K)).norm() / (eps * r**0.5 * K.norm())).item()


@everywhere
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e12, 1e16])
@pytest.mark.parametrize("m, r", FRAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basis_is_orthonormal_and_spans_whatever_the_condition(m, r, condition, dtype):
    K = graded(m, r, condition, dtype)
    Q = orthonormalize(K, frame(m, r, dtype))
    assert orthonormality(Q) <= ORTHONORMAL[dtype]
    assert residual(K, Q) <= 10  # at most 4.7 in 400 draws


@everywhere
@pytest.mark.parametrize("m, r", FRAMES[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basis_of_a_rank_deficient_matrix_keeps_its_range(m, r, dtype):
    U, K = frame(m, r, dtype), graded(m, r, 10.0, dtype)
    for kept in (1, r // 2, r - 1):
        for deficient in (
            torch.cat([K[:, :kept], torch.zeros_like(K[:, kept:])], -1),  # zero columns
            K[:, :kept] @ K[:kept],  # mixed columns, singular up to rounding
            K[:, torch.arange(r) % kept],  # repeated columns
        ):
            Q = orthonormalize(deficient, U)
            assert orthonormality(Q) <= ORTHONORMAL[dtype]
            assert residual(deficient, Q) <= 10


@pytest.mark.parametrize("m, r", FRAMES)
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_passes_are_enough_or_refused(m, r, condition, dtype):
    K = graded(m, r, condition, dtype)
    Q = twice(K)
    if condition <= 10:
        assert Q is not None
    if Q is not None:
        assert orthonormality(Q) <= ORTHONORMAL[dtype]
        assert residual(K, Q) <= 1
    bad = (
        torch.stack([K, torch.full_like(K, torch.nan)]),
        torch.zeros_like(K),
        K * torch.finfo(dtype).max ** 0.9,
    )
    assert all(twice(X) is None for X in bad)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basis_exists_where_the_kernel_of_K_is_mapped_by_U_into_its_range(dtype):
    # K = U N with N nilpotent: moving K towards U alone leaves it singular to the second order.
    for r in (2, 3, 8):
        U = frame(12, r, dtype)
        K = torch.cat([torch.zeros_like(U[:, :1]), U[:, :-1]], -1)
        Q = orthonormalize(K, U)
        assert orthonormality(Q) <= ORTHONORMAL[dtype]
        assert residual(K, Q) <= 10


@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basis_exists_where_K_is_a_few_rounding_errors_against_U(dtype):
    U, eps = torch.eye(6, 2, dtype=dtype), torch.finfo(dtype).eps
    for opposite in (1, 2, 4, 8, 16):
        K = U * torch.tensor([1.0, -opposite * eps], dtype=dtype)
        Q = orthonormalize(K, U)
        assert orthonormality(Q) <= ORTHONORMAL[dtype]
        assert residual(K, Q) <= 10


@everywhere
@pytest.mark.parametrize("m, r", FRAMES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 5e-7), (torch.float64, 1e-14)], ids=str)
def test_basis_of_zero_is_the_frame_itself(m, r, dtype, bound):
    U = frame(m, r, dtype)
    assert (orthonormalize(torch.zeros_like(U), U) - U).abs().max() <= bound


@everywhere
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37])
def test_basis_does_not_depend_on_the_scale(scale):
    U, K = frame(20, 6, torch.float32), graded(20, 6, 10.0, torch.float32)
    Q = orthonormalize(K * scale, U)
    assert orthonormality(Q) <= 1e-6
    assert residual(K, Q) <= 100  # 1e-38 K is rounded as a subnormal


def test_basis_has_batch_dimensions_that_equal_a_loop():
    K = torch.stack(
        [graded(9, 3, c, torch.float64) for c in (1.0, 1e6, 1e12)] + [torch.zeros(9, 3)]
    )
    U = torch.stack([frame(9, 3) for _ in range(4)])
    for i, Q in enumerate(orthonormalize(K, U)):
        assert (Q - orthonormalize(K[i], U[i])).abs().max() < 1e-12


@given(
    r=st.integers(1, 6),
    extra=st.integers(0, 4),
    exponents=st.lists(st.one_of(st.floats(-30, 0), st.just(-400.0)), min_size=6, max_size=6),
    double=st.booleans(),
    host=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_basis_is_sound_for_any_spectrum(r, extra, exponents, double, host, seed):
    torch.manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    sigma = 10.0 ** torch.tensor(exponents[:r], dtype=torch.float64)
    K = ((frame(r + extra, r) * sigma) @ rotation(r)).to(dtype)
    with patch.object(orthonormal, "on_host", lambda x: host):
        Q = orthonormalize(K, frame(r + extra, r, dtype))
    assert orthonormality(Q) <= ORTHONORMAL[dtype]
    assert not K.any() or residual(K, Q) <= 10


@pytest.mark.parametrize("bound", [0.0, 0.1, 1.0])
def test_inverse_sqrt_matches_the_eigenvalue_formula(bound):
    Q = rotation(12)
    A = (Q * (1 + bound * torch.linspace(0, 1, 12, dtype=torch.float64))) @ Q.mT
    eigenvalues, E = torch.linalg.eigh(A)
    found = inverse_sqrt(A, torch.full((1, 1), bound, dtype=torch.float64))
    assert (found - (E * eigenvalues.rsqrt()) @ E.mT).abs().max() < 1e-14


def rotation_step(U, size, *, rank=None):
    """A step D with UᵀD = 0, |D|₂ = size and `rank` non-zero singular values."""
    m, r = U.shape
    D = torch.randn(m, rank or r, dtype=torch.float64)
    D = D if rank is None else D @ torch.randn(rank, r, dtype=torch.float64)
    for _ in range(2):
        D = D - U @ (U.mT @ D)
    return D * (size / torch.linalg.matrix_norm(D, 2))


STEPS = [(0.01, None), (0.3, None), (0.7, 1), (0.99, None), (0.99, 1)]
POLAR_TOL = {torch.float32: 5e-6, torch.float64: 2e-14}  # 10 x the worst of 200 draws


@pytest.mark.parametrize("size, rank", STEPS)
@pytest.mark.parametrize("m, r", [(5, 1), (9, 8), (40, 16), (100, 64), (300, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_polar_update_is_the_polar_factor_up_to_45_degrees(m, r, size, rank, dtype):
    U = frame(m, r)
    D = rotation_step(U, size, rank=rank)
    Q = polar_update(U.to(dtype), D.to(dtype))
    assert (Q - polar(U + D)).abs().max() <= POLAR_TOL[dtype]


@pytest.mark.parametrize("size", [0.0, 1e-30, 0.3, 1.0, 3.0, 1e4, 1e15, 1e25])
@pytest.mark.parametrize("m, r", [(5, 1), (9, 8), (40, 16), (300, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_polar_update_is_orthonormal_for_every_size(m, r, size, dtype):
    U = frame(m, r)
    Q = polar_update(U.to(dtype), rotation_step(U, size).to(dtype))
    # One step; it repairs the error of the last one, so errors do not add up. r = 256 is the worst.
    assert orthonormality(Q) <= (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("size", [1.5, 10.0, 1e4])
def test_polar_update_shortens_a_long_step_and_keeps_its_direction(size):
    U = frame(40, 16)
    D = rotation_step(U, size)
    Q = polar_update(U, D)
    C = U.mT @ Q
    tangents = (Q - U @ C) @ torch.linalg.inv(C)  # U + tD has the polar factor Q for this tD
    shortened = (tangents * D).sum() / D.square().sum()
    assert (tangents - shortened * D).norm() < 1e-12 * tangents.norm()
    assert 0.5 < torch.linalg.matrix_norm(tangents, 2) <= 1.5  # about 45 degrees


@pytest.mark.parametrize("size", [0.3, 0.99, 3.0, 1e4])
def test_polar_update_does_not_depend_on_the_frame(size):
    U, O1 = frame(40, 16), rotation(16)
    D = rotation_step(U, size)
    assert (polar_update(U @ O1, D @ O1) - polar_update(U, D) @ O1).abs().max() < 1e-12


def test_polar_update_repairs_a_frame_that_has_drifted():
    U = frame(20, 6)
    drifted = U + 1e-3 * torch.randn_like(U)
    assert orthonormality(drifted) > 1e-3
    assert orthonormality(polar_update(drifted, torch.zeros_like(U))) <= 1e-13


def test_polar_update_has_batch_dimensions_that_equal_a_loop():
    U = torch.stack([frame(9, 3) for _ in range(4)])
    D = torch.stack([rotation_step(u, s) for u, s in zip(U, (0.0, 0.1, 0.9, 50.0), strict=True)])
    for i, Q in enumerate(polar_update(U, D)):
        assert (Q - polar_update(U[i], D[i])).abs().max() < 1e-14


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
    P, sigma, Q = torch.linalg.svd(X.double() / torch.linalg.matrix_norm(X.double()))
    gain = (P.mT @ polar_express(X).double() @ Q.mT).diagonal() / sigma
    small = sigma < 1e-4
    assert small.any() and (gain[small] <= 2000).all()
    if dtype == torch.float64:  # float32 does not resolve these
        assert (gain[small] >= 1000).all()
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


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("m, n", [(5, 1), (8, 8), (40, 16), (300, 256)])
def test_damped_basis_has_the_span_and_the_damped_singular_values(m, n, condition):
    X = graded(m, n, condition, torch.float64)
    Q, P = damped_basis(X)
    sigma = torch.linalg.svdvals(X)
    expected = sigma / (sigma**2 + (1e-3 * sigma.norm()) ** 2).sqrt()
    assert (Q @ P - X).norm() < 1e-13 * X.norm() * n  # 10 x the worst of 64 draws
    assert (torch.linalg.svdvals(Q) - expected).abs().max() < 1e-9
    assert not P.tril(-1).any()


def test_damped_basis_of_zero_is_zero_and_single_precision_stays_finite():
    Q, P = damped_basis(torch.zeros(6, 4))
    assert not Q.any() and not P.any()
    Q, P = damped_basis(graded(40, 16, 1e12, torch.float32))
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
