"""The operations of `lowrank_geo.reference` by Triton kernels: passes over tall matrices, and r×r algebra between them.

Pure functions of float32 stacks (L, rows, r), without autograd or checks; `lowrank_geo.binding` makes torch.library
operators of them. Nothing here reads a tensor back, and the number of launches depends on nothing but the operation.
"""

import torch
from torch import Tensor

from lowrank_geo import msign, orthonormal
from lowrank_geo.kernels import gram as _gram
from lowrank_geo.kernels import lowrank_linear as _linear
from lowrank_geo.kernels import polar as _polar
from lowrank_geo.kernels import retract as _retract
from lowrank_geo.kernels import spectral as _spectral
from lowrank_geo.kernels import tangent as _tangent
from lowrank_geo.kernels import transport as _transport
from lowrank_geo.orthonormal import symmetric
from lowrank_geo.precision import rounds_products
from lowrank_geo.reference import fold

tangent = _tangent.tangent


def lowrank_linear(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    left, middle = fold(x.shape[0], U.to(x.dtype), S.to(x.dtype))
    return _linear.lowrank_linear(x, V, middle, left, bias, fast=rounds_products())


def lowrank_linear_backward(
    g: Tensor, x: Tensor, U: Tensor, S: Tensor, V: Tensor, a: Tensor, with_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the twin; an unwanted ∂L/∂x has no elements."""
    fast = rounds_products()
    if with_x:
        left, middle = fold(g.shape[0], V.to(g.dtype), S.to(g.dtype).mT)
        dx, b = _linear.lowrank_linear(g, U, middle, left, fast=fast)
    else:
        dx, b = g.new_empty(0), _linear.product(_linear.rows(g), U, fast=fast)
    GV, GtU = _gram.gram(g, a, fast=fast), _gram.gram(x, b, fast=fast)
    # Each side removes its own part: rounded products of activations disagree on M.
    M, Mt = _gram.gram(U, GV), _gram.gram(V, GtU)
    return dx, tangent(GV, U, M)[0][0], M[0], tangent(GtU, V, Mt)[0][0]


def transport(
    U: Tensor,
    V: Tensor,
    Up: Tensor,
    M: Tensor,
    Vp: Tensor,
    U1: Tensor,
    V1: Tensor,
    UtU1: Tensor,
    VtV1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """ξ = K Vᵀ + U Vpᵀ with K = U M + Up, so that ξV1 = U (M C + D) + Up C and ξᵀU1 = V (MᵀA + B) + Vp A."""
    A, B = UtU1, _gram.gram(Up, U1)
    C, D = VtV1, _gram.gram(Vp, V1)
    left, right = M @ C + D, M.mT @ A + B
    M1 = A.mT @ left + B.mT @ C  # U1ᵀξV1
    M1t = C.mT @ right + D.mT @ A
    return (
        _transport.transport_write(U, Up, U1, left, C, M1),
        M1,
        _transport.transport_write(V, Vp, V1, right, A, M1t),
    )


def retract(
    U: Tensor, A: Tensor, Up: Tensor, B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `orthonormal.orthonormalize`: K is moved by a few rounding errors along a rotated U, then shifted Cholesky QR
    with Grams in float64; only the r×r factor T of Q = K T is kept between the passes.
    """
    r = U.shape[-1]
    part = _retract.regram(Up.contiguous(), None)  # UpᵀUp
    wide = A.double()
    part = part if B is None else B.double().mT @ part @ B.double()
    size = (wide.square().sum((-2, -1)) + trace(part)).clamp_min(0).sqrt()
    nudge = 4 * torch.finfo(torch.float32).eps * size[:, None, None]
    K, gram = _retract.stretch(U, (wide + nudge * orthonormal.mixing(r, wide)).float(), Up, B)
    square = trace(gram)
    one = torch.where(square > 0, square, 1.0)[:, None, None]
    identity = torch.eye(r, dtype=gram.dtype, device=gram.device)
    T = (identity * one.rsqrt()).expand_as(gram)
    gram = gram / one
    for shift in (1, 1, 0):
        L, _ = torch.linalg.cholesky_ex(symmetric(gram) + (shift * r * 1e-15) * identity)
        T = torch.linalg.solve_triangular(L.mT, T, upper=True, left=False)
        if shift:
            gram = _retract.regram(K, T)
    zero = square == 0
    Q = _retract.settle(K, torch.where(zero[:, None, None], 0.0, T), U, zero)
    UtQ, KtQ = _retract.products(U, K, Q)
    # Both are parts of one tensor, and the transpose of 1×1 is no copy.
    return Q, KtQ.mT.clone(memory_format=torch.contiguous_format), UtQ


def polar(
    U: Tensor, D: Tensor, X: Tensor | None = None, still: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As the twin; without X the second result has no elements."""
    largest = torch.linalg.vector_norm(D, float("inf"), (-2, -1)).clamp(min=1)
    grams = _polar.polar_grams(U, D, X, largest)
    UU, UD, DD = grams[0], grams[1], grams[2]
    shorten, bound = orthonormal.shortening(DD, largest[:, None, None])
    gram = symmetric(UU + shorten * (UD + UD.mT) + shorten.square() * DD)
    A = orthonormal.inverse_sqrt(gram, bound)
    B = shorten * A
    fixed = torch.zeros_like(largest, dtype=torch.bool) if still is None else still
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    A = torch.where(fixed[:, None, None], identity, A)
    B = torch.where(fixed[:, None, None], 0.0, B)
    P = None if X is None else A.mT @ grams[3] + B.mT @ grams[4]  # QᵀX
    return _polar.polar_write(U, D, X, largest, A, B, P, fixed)


def spectral(X: Tensor, damping: float = msign.DAMPING) -> Tensor:
    gram, size, divisor = unit_gram(X)
    return _spectral.apply(X, msign.sign_factor(gram, damping) / size, divisor)


def damped_factor(X: Tensor, damping: float = msign.DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    gram, size, divisor = unit_gram(X)
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    L, _ = torch.linalg.cholesky_ex(symmetric(gram) + damping**2 * identity)
    T = torch.linalg.solve_triangular(L.mT, identity.expand_as(gram) / size, upper=True, left=False)
    largest = divisor * (trace(gram) > 0)  # P = 0 for X = 0
    return (L.mT * size * largest[:, None, None]).contiguous(), T.contiguous(), divisor


def apply(X: Tensor, C: Tensor, d: Tensor) -> Tensor:
    return _spectral.apply(X, C, d)


def unit_gram(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """XᵀX/|X|², |X/d| and d, the largest entry of X; 1 in place of a norm that is zero.

    Shapes: X (L, rows, r) -> (L, r, r), (L, 1, 1), (L).
    """
    largest = torch.linalg.vector_norm(X, float("inf"), (-2, -1))
    divisor = torch.where(largest > 0, largest, 1.0)
    gram = _gram.gram(X, X, divisor)
    square = trace(gram)[:, None, None]
    square = torch.where(square > 0, square, 1.0)
    return gram / square, square.sqrt(), divisor


def trace(A: Tensor) -> Tensor:
    """Shapes: (L, r, r) -> (L)."""
    return torch.diagonal(A, dim1=-2, dim2=-1).sum(-1)
