"""What every accelerated operation means, in plain torch: twins of `lowrank_geo.operators`, same names and signatures.

They are what runs on a CPU, in float64 and wherever a kernel does not apply, and what the kernels are tested against.
Stacks of matrices have any number of leading dimensions here.
"""

import torch
from torch import Tensor

from lowrank_geo import geometry, msign, orthonormal
from lowrank_geo.geometry import Point, Tangent


def fold(tokens: int, U: Tensor, S: Tensor) -> tuple[Tensor, Tensor | None]:
    """The cheaper association of a Sᵀ Uᵀ: (U S, None) for many tokens, (U, Sᵀ) for few.

    Shapes: U (m, r), S (r, r) -> left (m, r), right (r, r) or None.
    """
    return (U @ S, None) if tokens >= U.shape[0] else (U, S.mT)


def lowrank_linear(
    x: Tensor, U: Tensor, S: Tensor, V: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = x V Sᵀ Uᵀ + bias and a = x V, in the dtype of x.

    Shapes: x (B, n), U (m, r), S (r, r), V (n, r), bias (m) -> y (B, m), a (B, r).
    """
    U, S, V = U.to(x.dtype), S.to(x.dtype), V.to(x.dtype)
    a = x @ V
    left, right = fold(x.shape[0], U, S)
    y = (a if right is None else a @ right) @ left.mT
    return y if bias is None else y + bias.to(y.dtype), a


def add_lowrank_linear(
    y0: Tensor, x: Tensor, U: Tensor, S: Tensor, V: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """y0 + scale · x V Sᵀ Uᵀ and a = x V, in the dtype of x.

    Shapes: y0 (B, m), x (B, n), U (m, r), S (r, r), V (n, r) -> y (B, m), a (B, r).
    """
    a = x @ V.to(x.dtype)
    left, right = fold(x.shape[0], U.to(x.dtype), S.to(x.dtype))
    return torch.addmm(y0, a if right is None else a @ right, left.mT, alpha=scale), a


def lowrank_linear_backward(
    g: Tensor, x: Tensor, U: Tensor, S: Tensor, V: Tensor, a: Tensor, with_x: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """∂L/∂x, if asked for, and the tangent coordinates of the Riemannian gradient.

    Shapes: g = ∂L/∂y (B, m), x (B, n), U (m, r), S (r, r), V (n, r), a = x V (B, r) -> dx (B, n),
        Up (m, r), M (r, r), Vp (n, r).
    """
    b = g @ U.to(g.dtype)  # (B, r)
    gradients = coordinates(U, V, g.mT @ a, x.mT @ b)
    if not with_x:
        return None, *gradients
    left, right = fold(g.shape[0], V.to(g.dtype), S.to(g.dtype).mT)
    return (b if right is None else b @ right) @ left.mT, *gradients


def coordinates(U: Tensor, V: Tensor, GV: Tensor, GtU: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Up, M, Vp) of P_T G from G V and GᵀU, gauged in the dtype of U and V.

    Shapes: U (m, r), V (n, r), GV (m, r), GtU (n, r) -> Up (m, r), M (r, r), Vp (n, r).
    """
    if GV.dtype != U.dtype:
        # Rounded products disagree on M, and each would leak into the gauge of the other.
        GV, GtU = GV.to(U.dtype), GtU.to(U.dtype)
        M, Mt = U.mT @ GV, V.mT @ GtU
    else:
        M = U.mT @ GV if U.shape[0] <= V.shape[0] else GtU.mT @ V
        Mt = M.mT
    # In place saves 1 % of a pass, but torch.func has no rule for it and FLOP counters pass over it.
    return torch.addmm(GV, U, M, alpha=-1), M, torch.addmm(GtU, V, Mt, alpha=-1)


def tangent(
    Z: Tensor,
    U: Tensor | None = None,
    C: Tensor | None = None,
    R: Tensor | None = None,
    momentum: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """g = Z R − U C, m = u·momentum + v·g and out = a·g + b·m with weights (u, v, a, b).

    Without a filter only g has elements; without products g is Z itself and has none.

    Shapes: Z, U, momentum (L, rows, r), C, R (L, r, r), weights (L, 4) -> thrice (L, rows, r).
    """
    g = Z if R is None else Z @ R
    if C is not None:
        assert U is not None
        g = g - U @ C
    none = Z.new_empty(0)
    if momentum is None or weights is None:
        return g, none, none
    u, v, a, b = weights.to(Z.dtype)[..., None, None].unbind(-3)
    m = u * momentum + v * g
    return none if g is Z else g, m, a * g + b * m


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
    """The tangent (Up, M, Vp) at (U, V), projected to the tangent space at (U1, V1).

    Shapes: U, Up, U1 (..., m, r), M (..., r, r), V, Vp, V1 (..., n, r), UᵀU1, VᵀV1 (..., r, r) -> (Up, M, Vp) at
        the new frames.
    """
    overlaps = UtU1, VtV1
    Up, M, Vp = geometry.transport(Point(U, M, V), Tangent(Up, M, Vp), Point(U1, M, V1), overlaps)
    return Up, M, Vp


def retract(
    U: Tensor, A: Tensor, Up: Tensor, B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis Q of K = U A + Up B (B = I if missing), with QᵀK and UᵀQ.

    Shapes: U, Up (..., m, r), A, B (..., r, r) -> Q (..., m, r), QᵀK, UᵀQ (..., r, r).
    Error:  that of `lowrank_geo.orthonormal.orthonormalize`.
    """
    K = geometry.plus(Up if B is None else Up @ B, U, A)
    Q, R = orthonormal.factorize(K, U)
    return Q, R, U.mT @ Q


def polar(
    U: Tensor, D: Tensor, X: Tensor | None = None, still: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The polar factor Q of U + D, or U where `still`, and X projected to its tangent space, X − Q QᵀX.

    Shapes: U, D, X (..., m, r), still (...) -> Q (..., m, r), (..., m, r).
    """
    Q = orthonormal.polar_update(U, D)
    if still is not None:
        Q = torch.where(still[..., None, None], U, Q)
    return Q, None if X is None else geometry.minus(X, Q, Q.mT @ X)


def spectral(X: Tensor, damping: float = msign.DAMPING) -> Tensor:
    """`lowrank_geo.msign.msign`.

    Shapes: (..., m, r) -> (..., m, r).
    """
    return msign.msign(X, damping=damping)


def damped_factor(X: Tensor, damping: float = msign.DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """`lowrank_geo.msign.damped_factor`.

    Shapes: X (..., m, r) with m >= r -> P, T (..., r, r), d (...).
    """
    return msign.damped_factor(X, damping=damping)


def apply(X: Tensor, C: Tensor, d: Tensor) -> Tensor:
    """(X/d) C.

    Shapes: X (..., m, r), C (..., r, q), d (...) -> (..., m, q).
    """
    return X / d[..., None, None] @ C
