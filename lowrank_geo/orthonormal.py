"""Orthonormal columns from matrix products and r×r Cholesky factors only, batched and without a
host sync.

`torch.linalg.qr` on CUDA is serial in the batch; batched Cholesky and matrix products are not.
Everything here works on (..., m, r) with m >= r and costs a few tall products; the rest is r×r.
"""

import torch
from torch import Tensor

from lowrank_geo.geometry import plus


def symmetric(A: Tensor) -> Tensor:
    """(A + Aᵀ)/2."""
    return (A + A.mT) / 2


def normalized(X: Tensor) -> tuple[Tensor, Tensor]:
    """X divided by its Frobenius norm, without overflow, and the norm; zero stays zero, with norm 0.

    Shapes: X (..., m, r) -> (..., m, r), (..., 1, 1).
    """
    largest = X.abs().amax((-2, -1), keepdim=True)
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

    Shifted Cholesky QR, the first Gram in float64. K is first moved by a few rounding errors along a rotated U, which
    bounds its condition number: a singular K keeps its range, K = 0 gives U back. On the CPU, where a look at the
    numbers waits for nothing, well-conditioned matrices take two passes in their own dtype (`twice`).

    Shapes: K, U (..., m, r), UᵀU = I -> (..., m, r).
    Error:  |QᵀQ − I|_max below 1e-6 in float32 and 1e-13 in float64, |K − QQᵀK| below 10·eps·√r·|K|, for every K.
    Source: Fukaya et al., Shifted Cholesky QR, SIAM J. Sci. Comput. 42(1), 2020; Yamazaki et al., Mixed-precision
        Cholesky QR, SIAM J. Sci. Comput. 37(3), 2015.
    """
    if on_host(K) and (Q := twice(K)) is not None:
        return Q
    K, size = normalized(K)
    dtype, r = K.dtype, K.shape[-1]
    Q = K.double() + (U @ (4 * torch.finfo(dtype).eps * mixing(r, U))).double()
    # The shifts keep the Cholesky factors real; the passes after them repair what they did. A matrix of float32 is
    # within reach of float32 after one.
    for shift in (1, 1, 0, 0) if dtype == torch.float64 else (1, 0, 0):
        L = cholesky(Q, shift * r * 1e-15)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False).to(dtype)
    return torch.where(size > 0, Q, U)


def twice(K: Tensor) -> Tensor | None:
    """Cholesky QR done twice, or None if a matrix of the batch is not well-conditioned enough for it.

    Four tall products, no copies, no float64. Looks at the numbers of K.

    Shapes: K (..., m, r) -> (..., m, r).
    Error:  |QᵀQ − I|_max below 6e-7 in float32, |K − QQᵀK| below eps·√r·|K|; both are measured the same up to a
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
    return Q @ inverse(cholesky(Q)).mT


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
    largest = D.abs().amax((-2, -1), keepdim=True).clamp(min=1)
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


# Optimal odd quintics for singular values in [1e-3, 1], one a step, from Table 1 of the source;
# the last is the fixed point and repeats.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
HEADROOM = 1.01  # the first polynomials may leave [0, 1] slightly for an argument of exactly 1
DAMPING = 1e-3
# Six reach 1.2e-3, as near as float32 resolves the Gram of a singular value at the damping; eight 5e-12.
STEPS = {torch.float32: 6, torch.float64: 8}


def msign(X: Tensor, *, damping: float = DAMPING) -> Tensor:
    """X (XᵀX + ε²I)^(−½): X with its singular values σ replaced by about σ/√(σ² + ε²), ε =
    damping·|X|_F.

    All iterations are on the Gram of the short side; the long side is touched by one product in,
    one out.

    Shapes: X (..., m, r), tall or wide -> (..., m, r).
    Error:  singular values within 4e-3 of the formula for damping 1e-3; msign(0) = 0; finite for
        every finite X.
    Source: Amsel et al., The Polar Express, arXiv 2505.16932, 2025.
    """
    if X.shape[-2] < X.shape[-1]:
        return msign(X.mT, damping=damping).mT
    X, _ = normalized(X)
    return X @ sign_factor(X.mT @ X, damping)


def polar_express(X: Tensor) -> Tensor:
    """The polar factor of X by six Polar Express steps on X itself: three quarters of the work of `msign` for square X.

    Shapes: X (..., m, r) -> (..., m, r).
    Error:  singular values from 1e-3·|X|_F on within 2e-3 of 1, below that 1 000 to 2 000 times as large; 0 stays 0;
        finite for every finite X.
    Source: Amsel et al., The Polar Express, arXiv 2505.16932, 2025.
    """
    X = normalized(X)[0] / HEADROOM
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    for a, b, c in POLAR_EXPRESS[:6]:
        gram = X.mT @ X
        X = X @ (a * identity + plus(b * gram, c * gram, gram))
    return X


def sign_factor(G: Tensor, damping: float = DAMPING) -> Tensor:
    """C with `msign(X)` = X C for |X|_F = 1, from the Gram G = XᵀX alone.

    Shapes: (..., r, r) -> (..., r, r).
    """
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    # The damping keeps the Gram positive under rounding, which the growing polynomials need.
    gram = symmetric(G) + damping**2 * identity
    gram, Q = gram / HEADROOM**2, identity
    steps = POLAR_EXPRESS[: STEPS.get(G.dtype, len(POLAR_EXPRESS))]
    for step, (a, b, c) in enumerate(steps, start=1):
        P = a * identity + plus(b * gram, c * gram, gram)
        Q = Q @ P if step > 1 else P / HEADROOM
        if step < len(steps):
            gram = symmetric(P @ gram @ P)
    return Q


def damped_basis(X: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Q and upper triangular P with X = Q P, by one Cholesky factor; Q has the singular values σ/√(σ² + ε²) of `msign`.

    Where the span of X matters and not its polar factor: a fifth of the time of `msign`.

    Shapes: X (..., m, r) with m >= r -> Q (..., m, r), P (..., r, r).
    """
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1.0)
    gram = symmetric(X.mT @ X)
    square = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)[..., None, None]  # |X|²
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    L, _ = torch.linalg.cholesky_ex(
        gram + torch.where(square > 0, damping**2 * square, 1.0) * identity
    )
    return X @ inverse(L).mT, L.mT * largest
