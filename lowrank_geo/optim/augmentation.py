"""Changes of rank: a basis augmented by the gradient, and one truncated at a tolerance.

Matrices of rank a ≤ R are kept in factors of width R: U and V have orthonormal columns throughout, and S is zero
outside its leading a×a block. So a matrix of any rank is a `Point` that every function of this package accepts, no
parameter changes its shape, and the rank of each matrix is a number on the device. These events are rare: they may
use `torch.linalg`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent


class Change(NamedTuple):
    """A point in new frames. A core X in the old frames is PᵀXQ in the new ones, `carried`."""

    point: Point
    rank: Tensor  # (L,)
    P: Tensor  # (L, R, R), UᵀU_new
    Q: Tensor  # (L, R, R), VᵀV_new


def inside(rank: Tensor, width: int) -> Tensor:
    """Which columns of a frame are in use.

    Shapes: rank (L,) -> (L, width), bool.
    """
    return torch.arange(width, device=rank.device) < rank[..., None]


def block(rank: Tensor, width: int) -> Tensor:
    """Which entries of a core are in use.

    Shapes: rank (L,) -> (L, width, width), bool.
    """
    columns = inside(rank, width)
    return columns[..., :, None] & columns[..., None, :]


def used_rank(S: Tensor) -> Tensor:
    """The size of the leading block outside which S is zero; the width for S = 0, which hides nothing.

    Shapes: S (..., R, R) -> (...), int64.

    >>> used_rank(torch.diag(torch.tensor([3.0, 0.0, 1.0, 0.0]))), used_rank(torch.zeros(2, 2))
    (tensor(3), tensor(2))
    """
    width = S.shape[-1]
    filled = (S != 0).any(-1) | (S != 0).any(-2)
    last = (filled * torch.arange(1, width + 1, device=S.device)).amax(-1)
    return torch.where(last > 0, last, width)


def augment(point: Point, gradient: Tangent, rank: Tensor) -> Change:
    """The same matrix in the bases [U, GV] and [V, GᵀU] of twice the rank, or as much as the width has room for.

    Range(∂L/∂U) = range(GV) where S has an inverse, and needs none. Where the gradient adds no direction, any
    orthonormal one takes its place.

    Shapes: a batch of points of width R and tangent coordinates at them, rank (L,) -> `Change`, of rank min(2a, R).
    Error:  |W − W_new| below 10·eps·√R·|W|.
    Source: Ceruti, Kusch & Lubich, BIT 62, 2022 (augmented BUG); Schotthöfer et al., arXiv 2505.08022, algorithm 1.
    """
    width = point.S.shape[-1]
    tail = ~inside(rank, width)[..., None]
    # G V without its part in the frame in use; the gauge has removed the columns out of use, too.
    left = gradient.Up + point.U @ (tail * gradient.M)
    right = gradient.Vp + point.V @ (tail * gradient.M.mT)
    U, V = _widened(point.U, left, rank), _widened(point.V, right, rank)
    P, Q = point.U.mT @ U, point.V.mT @ V
    wider = (2 * rank).clamp(max=width)
    change = Change(Point(U, point.S, V), wider, P, Q)
    return change._replace(point=Point(U, carried(point.S, change), V))


def _widened(U: Tensor, extra: Tensor, rank: Tensor) -> Tensor:
    """An orthonormal basis that begins with those of the first a columns of U and the first a of `extra`.

    Shapes: U, extra (L, m, R), rank (L,) -> (L, m, R).
    """
    column = torch.arange(U.shape[-1], device=U.device)
    a = rank[:, None]
    source = (column - a).clamp(min=0)[:, None, :].expand_as(U)
    K = torch.where((column < a)[:, None], U, torch.gather(extra, -1, source))
    K = torch.where((column < 2 * a)[:, None], K, 0.0)
    # Householder's Q is orthonormal whatever the rank of K, and completes it where K is zero.
    Q, R = torch.linalg.qr(K)
    flipped = torch.diagonal(R, dim1=-2, dim2=-1) < 0
    return torch.where(flipped[:, None], -Q, Q)


def truncate(
    point: Point, rank: Tensor, *, tolerance: float, min_rank: int = 1, max_rank: int | None = None
) -> Change:
    """The best approximation of lowest rank with an error below τ|S|_F, S diagonal; rank within [min_rank, max_rank].

    Matrices that are not finite stay as they are.

    Shapes: a batch of points of width R, rank (L,) -> `Change`.
    Error:  |W − W_new|_F < τ|W|_F, unless max_rank cuts more.
    Source: Schotthöfer et al., arXiv 2505.08022, algorithm 1.
    """
    U, S, V = point
    width = S.shape[-1]
    finite = S.isfinite().all(-1).all(-1)[:, None, None]
    identity = torch.eye(width, dtype=S.dtype, device=S.device)
    # svd raises for the whole batch on one NaN, and a diverging matrix must not stop the others.
    P, sigma, Qt = torch.linalg.svd(torch.where(finite, S, identity))
    sigma = torch.where(inside(rank, width), sigma, 0.0)
    # |(σ_j+1, …)| for j = 0, 1, …; the first below τ|σ| decides.
    beyond = sigma.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    needed = (beyond >= tolerance * beyond[:, :1]).sum(-1)
    kept = needed.clamp(min=min_rank, max=width if max_rank is None else max_rank)
    kept = torch.where(finite[:, 0, 0], torch.minimum(kept, rank), rank)
    P, Q = torch.where(finite, P, identity), torch.where(finite, Qt.mT, identity)
    core = torch.where(finite, torch.diag_embed(sigma), S)
    core = torch.where(block(kept, width), core, 0.0)
    return Change(Point(U @ P, core, V @ Q), kept, P, Q)


def carried(X: Tensor, change: Change) -> Tensor:
    """PᵀXQ, a core or its momentum in the new frames; what is out of use is zero.

    Shapes: X (L, R, R) -> (L, R, R).
    """
    return torch.where(
        block(change.rank, X.shape[-1]), change.P.mT @ X @ change.Q, torch.zeros_like(X)
    )


def mixed(X: Tensor, change: Change) -> Tensor:
    """(P∘P)ᵀ X (Q∘Q): second moments of uncorrelated entries in the new frames, exactly; sums and signs are kept.

    Shapes: X (L, R, R), entries >= 0 -> (L, R, R).
    """
    squares = change._replace(P=change.P.square(), Q=change.Q.square())
    return carried(X, squares)


def augmented_gradient(point: Point, gradient: Tangent, rank: Tensor, change: Change) -> Tensor:
    """The gradient of the new core as far as the old one's tells it: all but the block of new rows and new columns.

    Shapes: the old point, its tangent coordinates, its rank (L,), what `augment` made of it -> (L, R, R).
    Source: the blocks of the parallel BUG integrator, Ceruti, Kusch & Lubich, 2024.
    """
    width = point.S.shape[-1]
    U1, _, V1 = change.point
    K = point.U @ gradient.M + gradient.Up
    G = (U1.mT @ K) @ change.Q + change.P.mT @ (gradient.Vp.mT @ V1)
    new = ~inside(rank, width)
    unknown = new[:, :, None] & new[:, None, :]
    return torch.where(block(change.rank, width) & ~unknown, G, torch.zeros_like(G))
