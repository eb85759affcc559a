"""Orthonormal columns from matrix products and r×r Cholesky factors only, batched and without a
host sync.

`torch.linalg.qr` on CUDA is serial in the batch; batched Cholesky and matrix products are not.
Everything here works on (..., m, r) with m >= r and costs a few tall products; the rest is r×r.
"""

import torch
from torch import Tensor

from lowrank_geo.geometry import magnitude


def symmetric(A: Tensor) -> Tensor:
    """(A + Aᵀ)/2."""
    return (A + A.mT) / 2


def normalized(X: Tensor) -> tuple[Tensor, Tensor]:
    """X divided by its Frobenius norm, without overflow, and the norm; zero stays zero, with norm 0.

    Shapes: X (..., m, r) -> (..., m, r), (..., 1, 1).
    """
    largest = magnitude(X)
    X = X / torch.where(largest > 0, largest, 1.0)
    size = torch.linalg.matrix_norm(X)[..., None, None]
    return X / torch.where(size > 0, size, 1.0), size * largest


def mixing(r: int, like: Tensor) -> Tensor:
    """The orthogonal cosine transform DCT-IV, of which no entry is zero.

    Shapes: -> (r, r).
    """
    half = torch.arange(r, dtype=like.dtype, device=like.device) + 0.5
    return torch.cos(half[:, None] * half * (torch.pi / r)) * (2 / r) ** 0.5


def orthonormalize(K: Tensor, U: Tensor) -> Tensor:
    """Orthonormal basis of span(K), completed within span(U) where K is rank deficient.

    On the CPU, where a look at the numbers waits for nothing, well-conditioned matrices take two passes in their own
    dtype (`twice`), the others and all elsewhere `shifted` Cholesky QR.

    Shapes: K, U (..., m, r), UᵀU = I -> (..., m, r).
    Error:  |QᵀQ − I|_max below 1e-6 in float32 and 1e-13 in float64, |K − QQᵀK| below 10·eps·√r·|K|, for every K.
    """
    found = twice(K) if on_host(K) else None
    return shifted(K, U) if found is None else found[0]


def factorize(K: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Q of `orthonormalize` with R = QᵀK, not triangular, for a tall product less than one after the other.

    Shapes: K, U (..., m, r), UᵀU = I -> Q (..., m, r), R (..., r, r).
    """
    found = twice(K) if on_host(K) else None
    if found is not None:
        return found
    Q = shifted(K, U)
    return Q, Q.mT @ K


def shifted(K: Tensor, U: Tensor) -> Tensor:
    """Shifted Cholesky QR, the first Gram in float64.

    K is first moved by a few rounding errors along a rotated U, which bounds its condition number: a singular K keeps
    its range, K = 0 gives U back.

    Shapes, error: as `orthonormalize`.
    Source: Fukaya et al., Shifted Cholesky QR, SIAM J. Sci. Comput. 42(1), 2020; Yamazaki et al., Mixed-precision
        Cholesky QR, SIAM J. Sci. Comput. 37(3), 2015.
    """
    K, size = normalized(K)
    dtype, r = K.dtype, K.shape[-1]
    Q = K.double() + (U @ (4 * torch.finfo(dtype).eps * mixing(r, U))).double()
    # The shifts keep the Cholesky factors real; the passes after them repair what they did. A matrix of float32 is
    # within reach of float32 after one.
    for shift in (1, 1, 0, 0) if dtype == torch.float64 else (1, 0, 0):
        L = cholesky(Q, shift * r * 1e-15)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False).to(dtype)
    return torch.where(size > 0, Q, U)


def twice(K: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cholesky QR, then a symmetric correction of what its rounding left; None if a matrix of the batch is not
    well-conditioned enough for it.

    Four tall products, no copies, no float64. Looks at the numbers of K.

    Shapes: K (..., m, r) -> Q (..., m, r), R = QᵀK (..., r, r).
    Error:  |QᵀQ − I|_max below 6e-7 in float32, |K − QQᵀK| and |R − QᵀK| below eps·√r·|K|; measured the same up to a
        hundred times `WELL_CONDITIONED`.
    Source: Yamamoto et al., Roundoff error analysis of CholeskyQR2, ETNA 44, 2015.
    """
    gram = symmetric(K.mT @ K)
    L, failed = torch.linalg.cholesky_ex(gram)
    R_inv = inverse(L).mT
    condition = R_inv.square().sum((-2, -1)) * torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)
    # NaN and overflow are not below any bound.
    if failed.any() or not (condition < WELL_CONDITIONED * K.shape[-1] ** 2).all():
        return None
    Q = K @ R_inv
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    E = symmetric(Q.mT @ Q) - identity
    square = E @ E
    # (I + E)^(−½) and (I + E)^(½) to O(E³), below rounding.
    if not square.diagonal(dim1=-2, dim2=-1).sum(-1).amax() < torch.finfo(K.dtype).eps ** (2 / 3):
        return None
    Q = Q @ (identity - E / 2 + square * 0.375)
    R = L.mT
    return Q, R + (E / 2 - square / 8) @ R


# Largest |R⁻¹|²|R|²/r² for `twice`, R the triangular factor: it is 1 for orthonormal columns.
WELL_CONDITIONED = 100.0


def on_host(x: Tensor) -> bool:
    """Whether a look at the numbers of x waits for nothing and changes no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def cholesky(Q: Tensor, shift: float = 0.0) -> Tensor:
    """The lower triangular L with LLᵀ = QᵀQ + shift·I.

    Shapes: Q (..., m, r) -> (..., r, r).
    """
    gram = symmetric(Q.mT @ Q)
    if shift:
        gram = gram + shift * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky_ex(gram)[0]


def inverse(L: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular matrix.

    Shapes: (..., r, r) -> (..., r, r).
    """
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    return torch.linalg.solve_triangular(L, identity, upper=False)


def inverse_sqrt(A: Tensor, bound: Tensor, *, iterations: int = 6) -> Tensor:
    """A^(−½) for symmetric A with eigenvalues in [1, 1 + bound], by coupled Newton–Schulz.

    Shapes: A (..., r, r), bound (..., 1, 1) -> (..., r, r).
    Error:  below 10·eps for bound <= 1.55 with 6 iterations; e = bound/(2 + bound) becomes about e²·3/4 in each.
    Source: Higham, Functions of Matrices, 2008, section 6.7.
    """
    scale = 2 / (2 + bound)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Y, Z = A * scale, identity.expand_as(A)
    for _ in range(iterations):
        T = 1.5 * identity - 0.5 * (Z @ Y)
        Y, Z = Y @ T, T @ Z
    return symmetric(Z) * scale.sqrt()


LARGEST = 1.55  # r^(1/16) stays below it up to r = 1100, so that |D|₂ <= 1 is never shortened


def gram_bound(G: Tensor) -> Tensor:
    """An upper bound of the largest eigenvalue of a Gram matrix, tr(G¹⁶)^(1/16): at most r^(1/16) times too large.

    It depends on eigenvalues alone, so that no choice of a frame shows in it.

    Shapes: G (..., r, r) -> (..., 1, 1).
    """
    trace = torch.diagonal(G, dim1=-2, dim2=-1).sum(-1)[..., None, None]
    power = G / torch.where(trace > 0, trace, 1.0)
    for _ in range(3):
        power = power @ power
    return trace * power.square().sum((-2, -1), keepdim=True) ** (1 / 16)  # |G⁸|² = tr(G¹⁶)


def polar_update(U: Tensor, D: Tensor) -> Tensor:
    """The orthogonal polar factor of U + D: the orthonormal frame nearest to it, without needless rotation.

    Steps are shortened where they would turn by more than 45° to 51°: never for |D|₂ <= 1, always to |D|₂ <= 1.25.
    Within that, six Newton–Schulz iterations reach rounding.

    Shapes: U, D (..., m, r) with UᵀU = I and UᵀD = 0 -> (..., m, r).
    Error:  |QᵀQ − I|_max below 3e-6 in float32 for r <= 64, whatever the number of steps taken: each repairs the last.
    """
    largest = magnitude(D).clamp(min=1)
    D = D / largest
    shorten, bound = shortening(D.mT @ D, largest)
    X = U + D * shorten
    return X @ inverse_sqrt(symmetric(X.mT @ X), bound)


def shortening(G: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """s <= `largest` such that |s D|₂² stays below about `LARGEST`, and a bound of |s D|₂², from G = DᵀD.

    Shapes: G (..., r, r), largest (..., 1, 1) -> twice (..., 1, 1).
    """
    bound = gram_bound(symmetric(G))
    shorten = torch.minimum(largest, (LARGEST / bound.clamp_min(torch.finfo(G.dtype).tiny)).sqrt())
    return shorten, bound * shorten.square()
