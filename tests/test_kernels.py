"""Every Triton operation against its twin in float64, and the properties that no twin can be asked for."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, LARGE, SHAPES, error, layer, mapped, outputs, stacks
from oracles import damped_sign, graded, orthonormality, polar

from lowrank_geo import geometry, operators, reference
from lowrank_geo.kernels import gram, retract, transport
from lowrank_geo.kernels import lowrank_linear as linear

# retract and spectral have their own tests: a basis is unique only up to conditioning, a damped sign is approximate.
ERRORS = {
    "tangent": 2e-6,
    "transport": 5e-6,
    "polar": 6e-6,
    "apply": 2e-6,
}  # 10 x the worst of all shapes here
THOROUGH = pytest.mark.thorough
LAYERS = [(1, 1, 1, 1), (50, 37, 29, 5), (20, 37, 29, 5), (65, 90, 130, 33), (33, 140, 150, 130)]


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param(LARGE, marks=THOROUGH)], ids=str)
def test_agrees_with_its_twin_in_float64(name, shape):
    given = stacks(*shape)[name]
    wanted = getattr(reference, name)(*mapped(given, torch.Tensor.double))
    found = getattr(operators, name)(*given)
    size = max((x for x in given if x.is_floating_point()), key=torch.linalg.vector_norm)
    for x, y in zip(outputs(found), outputs(wanted), strict=True):
        assert x.dtype == torch.float32 and x.shape == y.shape and x.is_contiguous()
        # Where a frame is square, nothing is left outside of it: the size is that of what went in.
        assert error(x, y, size) < ERRORS[name]


@pytest.mark.parametrize("parts", ["gauge", "factor", "filter"])
def test_tangent_takes_any_of_its_parts(parts):
    Z, U, C, R, momentum, weights = stacks(2, 40, 37, 5)["tangent"]
    given = {
        "gauge": (Z, U, C),
        "factor": (Z, None, None, R),
        "filter": (Z, None, None, None, momentum, weights),
    }[parts]
    wanted = outputs(reference.tangent(*mapped(given, torch.Tensor.double)))
    if parts == "filter":
        wanted = wanted[-2:]
    for x, y in zip(outputs(operators.tangent(*given)), wanted, strict=True):
        assert error(x, y) < 2e-6


CORES = {"well": 1.0, "ill": 1e-7, "singular": 0.0}
CASES: list[Any] = [(shape, core) for shape in SHAPES for core in CORES]


@pytest.mark.parametrize(
    "shape, core", [*CASES, pytest.param(LARGE, "ill", marks=THOROUGH)], ids=str
)
def test_retract_is_an_orthonormal_basis_at_every_condition_number(shape, core):
    U, A, Up, B = stacks(*shape)["retract"]
    r, B = shape[-1], B if shape[0] > 1 else None
    scale = torch.where(torch.linspace(0, 1, r, device=DEVICE) > 0.5, CORES[core], 1.0)
    A, Up, B = A * scale, Up if B is not None else Up * scale, None if B is None else B * scale
    Q, QtK, UtQ = (x.double() for x in operators.retract(U, A, Up, B))
    U, A, Up = U.double(), A.double(), Up.double()
    K = U @ A + (Up if B is None else Up @ B.double())
    # The bounds of orthonormalize: 1e-6, and 10·eps·√r·|K|.
    assert all(orthonormality(q.cpu()) < 1e-6 for q in Q)
    assert (K - Q @ (Q.mT @ K)).norm() <= 10 * 1.2e-7 * r**0.5 * K.norm()
    assert error(UtQ, U.mT @ Q, U) < 5e-6 and error(QtK, Q.mT @ K, K) < 2e-5


def test_retract_gives_a_zero_matrix_its_old_frame_bit_for_bit():
    U, A, Up, _ = stacks(3, 40, 37, 5)["retract"]
    A[1], Up[1] = 0, 0
    Q = operators.retract(U, A, Up)[0]
    assert torch.equal(Q[1], U[1]) and not torch.equal(Q[0], U[0])


def test_retract_survives_sizes_whose_squares_leave_float32():
    U, A, Up, _ = stacks(1, 40, 37, 5)["retract"]
    for size in (1e-25, 1e25):
        assert orthonormality(operators.retract(U, size * A, size * Up)[0][0].cpu()) < 1e-6


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_polar_is_the_polar_factor_or_shortened_like_the_twin(size):
    U, D, X, _ = stacks(2, 40, 37, 5)["polar"]
    D = D * (size / torch.linalg.matrix_norm(D, 2).amax())
    Q, carried = operators.polar(U, D, X)
    wanted, moved = reference.polar(*(x.double() for x in (U, D, X)))
    assert error(Q, wanted) < 3e-6 and error(carried, moved, X) < 5e-6
    if size <= 1:
        assert error(Q.cpu(), polar((U + D).cpu())) < 3e-6
    assert max(orthonormality(q.cpu()) for q in Q) < 3e-6


def test_polar_keeps_still_frames_bit_for_bit_and_projects_their_momentum():
    U, D, X, still = stacks(3, 40, 37, 5)["polar"]
    Q, carried = operators.polar(U, D, X, still)
    assert torch.equal(Q[1], U[1]) and not torch.equal(Q[0], U[0])
    assert (U[1].mT @ carried[1]).abs().max() < 1e-5


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectral_is_the_damped_sign_at_every_size(shape, size):
    (X,) = stacks(*shape)["spectral"]
    wanted = damped_sign(X.cpu(), 1e-3)
    assert error(operators.spectral(size * X).cpu(), wanted) < 4e-3


def test_spectral_and_damped_factor_of_zero_are_zero():
    X = torch.zeros(2, 9, 3, device=DEVICE)
    assert operators.spectral(X).abs().max() == 0
    assert all(x.isfinite().all() for x in operators.damped_factor(X))
    assert operators.damped_factor(X)[0].abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_damped_factor_multiplies_back_and_agrees_with_its_twin(shape):
    (X,) = stacks(*shape)["damped_factor"]
    P, T, d = operators.damped_factor(X)
    wanted = reference.damped_factor(X.double())
    assert error(operators.apply(X, T @ P, d), X) < 5e-6
    assert error(T, wanted[1]) < 5e-5 and error(P, wanted[0]) < 5e-6


# float32: 10 x the worst here. bfloat16: one rounding is 2⁻⁹, the interpreter cuts where a GPU rounds, 2⁻⁸.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["lowrank_linear", "lowrank_linear_backward"])
def test_layer_agrees_with_its_twin_in_float64(name, shape, dtype):
    given = layer(*shape, dtype)[name]
    wanted = getattr(reference, name)(*mapped(given, torch.Tensor.double))
    found = getattr(operators, name)(*given)
    scale = max(y.norm().item() for y in wanted)  # at 1×1 the gauge leaves nothing of Up
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape and (x.double() - y).norm() < LIMITS[dtype] * scale


def test_the_layer_without_gradient_of_x_gives_the_other_three():
    given = layer(20, 37, 29, 5, torch.float32)["lowrank_linear_backward"]
    both = operators.lowrank_linear_backward(*given)
    alone = operators.lowrank_linear_backward(*given[:-1], False)
    assert alone[0].numel() == 0
    assert all(torch.equal(x, y) for x, y in zip(both[1:], alone[1:], strict=True))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_layer_gradients_stay_in_the_gauge(dtype):
    g, x, U, S, V, a, with_x = layer(65, 90, 130, 33, dtype)["lowrank_linear_backward"]
    _, Up, _, Vp = operators.lowrank_linear_backward(g, x, U, S, V, a, with_x)
    size = (g.float().mT @ x.float()).norm()
    assert (U.mT @ Up).norm() < 1e-6 * size and (V.mT @ Vp).norm() < 1e-6 * size


@pytest.mark.slow
@pytest.mark.parametrize("r", [1024, pytest.param(1000, marks=THOROUGH)])
def test_kernels_take_the_largest_ranks(r):
    rows = 40
    A, B, X = (torch.randn(1, rows, r, device=DEVICE) for _ in "ABX")
    C, R = (torch.randn(1, r, r, device=DEVICE) / r**0.5 for _ in "CR")
    T, one = C.double(), torch.ones(1, device=DEVICE)
    no = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    a, b, x, c, q = (z.double() for z in (A, B, X, C, R))
    x1, x2 = retract.stretch(A, C, B, R)
    pairs = {
        "gram": (gram.gram(A, B), a.mT @ b),
        "tangent": (operators.tangent(A, B, C, R)[0], a @ q - b @ c),
        "transport": (transport.transport_write(A, B, X, C, R, C), a @ c + b @ q - x @ c),
        "apply": (operators.apply(A, C, one), a @ c),
        "stretch": (x1, a @ c + b @ q),
        "its Gram": (x2, (a @ c + b @ q).mT @ (a @ c + b @ q)),
        "settle": (retract.settle(A, T, B, no), a @ T),
        "products": (torch.stack(retract.products(A, B, X)), torch.stack([a.mT @ x, b.mT @ x])),
        "layer": (linear.product(A[0], C[0]), a[0] @ c[0]),
    }
    assert all(error(*pair) < 5e-6 for pair in pairs.values()), {
        name: error(*pair) for name, pair in pairs.items()
    }


@settings(max_examples=8)
@given(
    r=st.integers(1, 96),
    extra=st.integers(0, 40),
    exponent=st.floats(0, 12),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
    singular=st.booleans(),
)
def test_retract_keeps_its_bounds_for_any_rank_and_condition(r, extra, exponent, scale, singular):
    torch.manual_seed(r)
    core = graded(r, r, 10.0**exponent, torch.float32)[None].to(DEVICE) * scale
    if singular:
        core[..., -1] = 0
    U = geometry.random(r + extra, r, r, batch=(1,), device=DEVICE).U
    Q = operators.retract(U, core, torch.zeros_like(U))[0].double()
    K = U.double() @ core.double() / scale
    assert orthonormality(Q[0].cpu()) <= 1e-6
    assert (K - Q @ (Q.mT @ K)).norm() <= 10 * 2**-23 * r**0.5 * K.norm()
