"""orthonormal: dense SVD oracles over condition numbers, ranks, dtypes and scales."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import frame, graded, orthonormality, polar, rotation

from lowrank_geo import orthonormal
from lowrank_geo.orthonormal import factorize, inverse_sqrt, orthonormalize, polar_update, twice

DTYPES = [torch.float32, torch.float64]
ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-13}
everywhere = pytest.mark.usefixtures("wherever")
FRAMES = [(5, 1), (20, 8), (8, 8), (100, 64), (211, 97), (300, 256)]


def residual(K, Q):
    """|K − QQᵀK| / (eps √r |K|), in the eps of K."""
    eps, r = torch.finfo(K.dtype).eps, K.shape[-1]
    K, Q = K.double() / K.abs().max(), Q.double()
    return ((K - Q @ (Q.mT @ K)).norm() / (eps * r**0.5 * K.norm())).item()


def product_error(K, Q, R):
    """|R − QᵀK| / (eps √r |K|), in the eps of K."""
    eps, r = torch.finfo(K.dtype).eps, K.shape[-1]
    return ((R - Q.mT.double() @ K.double()).norm() / (eps * r**0.5 * K.double().norm())).item()


@everywhere
@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e12, 1e16])
@pytest.mark.parametrize("m, r", FRAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_basis_is_orthonormal_and_spans_whatever_the_condition(m, r, condition, dtype):
    K = graded(m, r, condition, dtype)
    U = frame(m, r, dtype)
    Q, R = factorize(K, U)
    assert torch.equal(Q, orthonormalize(K, U))
    assert orthonormality(Q) <= ORTHONORMAL[dtype]
    assert residual(K, Q) <= 10  # at most 4.7 in 400 draws
    assert product_error(K, Q, R) <= 2


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
    found = twice(K)
    if condition <= 10:
        assert found is not None
    if found is not None:
        Q, R = found
        assert orthonormality(Q) <= ORTHONORMAL[dtype]
        assert residual(K, Q) <= 1
        assert product_error(K, Q, R) <= 1
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
    conditions = (1.0, 1e6, 1e12)
    K = torch.stack([graded(9, 3, c, torch.float64) for c in conditions] + [torch.zeros(9, 3)])
    U = torch.stack([frame(9, 3) for _ in range(4)])
    eps = torch.finfo(torch.float64).eps
    for i, (Q, condition) in enumerate(zip(orthonormalize(K, U), (*conditions, 1.0), strict=True)):
        # A batch may round its products otherwise than one matrix does, which K magnifies.
        assert (Q - orthonormalize(K[i], U[i])).abs().max() < 10 * eps * condition


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


@settings(max_examples=25)
@given(
    r=st.integers(1, 256),
    extra=st.integers(0, 50),
    exponent=st.floats(0, 12),
    kept=st.floats(0, 1),
    host=st.booleans(),
)
def test_basis_is_sound_for_any_rank_and_condition(r, extra, exponent, kept, host):
    torch.manual_seed(r)
    U = frame(r + extra, r, torch.float32)
    core = graded(r, r, 10.0**exponent, torch.float32)
    K = U @ torch.where(torch.arange(r) < max(1, kept * r), core, 0.0)  # S is singular for kept < 1
    with patch.object(orthonormal, "on_host", lambda x: host):
        Q = orthonormalize(K, U)
    assert orthonormality(Q) <= 1e-6
    assert residual(K, Q) <= 10


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
