"""The sign of rectangular matrices, their orthogonal polar factor, from matrix products alone, without a host sync.

`msign` works on the Gram of the short side, `polar_express` on the matrix itself; `damped_factor` for where any
basis will do.
"""

import torch
from torch import Tensor

from lowrank_geo.geometry import add_, magnitude
from lowrank_geo.orthonormal import inverse, normalized, symmetric

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
REACH = 1.97**2  # the second polynomial takes singular values up to 1.98
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
    """The polar factor of X by five Polar Express steps on X itself: less than two thirds of the work of `msign` for
    square X.

    The first step of the source only lifts small singular values of a matrix of unit Frobenius norm. It is left out:
    the powers of the Gram that the second step forms give the tighter bound β = (Σσ⁸)^(1/8) >= |X|₂ for nothing.

    Shapes: X (..., m, r) -> (..., m, r).
    Error:  singular values from 4.2e-3·β on within 2e-3 of 1, β <= r^(1/8)·|X|₂; below that 240 to 480 times as large
        as in X/β; 0 stays 0; finite for every finite X.
    Source: Amsel et al., The Polar Express, arXiv 2505.16932, 2025.
    """
    X = normalized(X)[0]
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    first, *steps = POLAR_EXPRESS[1:6]
    gram = X.mT @ X
    square = gram @ gram
    bound = torch.linalg.matrix_norm(square)[..., None, None].sqrt()  # β²
    scale = REACH / torch.where(bound > 0, bound, 1.0)
    a, b, c = first
    X = X @ (scale.sqrt() * (a * identity + (b * scale) * gram + (c * scale.square()) * square))
    for a, b, c in steps:
        gram = X.mT @ X
        X = X @ (a * identity + add_(b * gram, gram, gram, alpha=c))
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
        P = a * identity + add_(b * gram, gram, gram, alpha=c)
        Q = Q @ P if step > 1 else P / HEADROOM
        if step < len(steps):
            gram = symmetric(P @ gram @ P)
    return Q


def damped_factor(X: Tensor, *, damping: float = DAMPING) -> tuple[Tensor, Tensor, Tensor]:
    """P, T and d of the basis Q = (X/d) T of X = Q P, P upper triangular, with the singular values of `msign`.

    Where the span of X matters and not its polar factor. Q itself is never formed: Q Z is `apply(X, T Z, d)`, one tall
    product whatever Z is.

    Shapes: X (..., m, r) with m >= r -> P, T (..., r, r), d (...), the largest entry of X.
    """
    largest = magnitude(X)
    divisor = torch.where(largest > 0, largest, 1.0)
    X = X / divisor
    gram = symmetric(X.mT @ X)
    square = torch.diagonal(gram, dim1=-2, dim2=-1).sum(-1)[..., None, None]  # |X|²
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    L, _ = torch.linalg.cholesky_ex(
        gram + torch.where(square > 0, damping**2 * square, 1.0) * identity
    )
    return L.mT * largest, inverse(L).mT, divisor[..., 0, 0]
