"""Averages of two matrices of rank r that are of rank r again.

Averaging the factors is no average: U and V are only fixed up to a rotation each, and the mean of two rotated frames is
anything between both and zero. Both operators here depend on the matrices alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_geo.geometry import Point
from lowrank_geo.orthonormal import factorize

Average = Callable[[Point, Point, float | Tensor], Point]


def truncate(x: Point, z: Point, c: float | Tensor) -> Point:
    """The matrix of rank r nearest to (1 − c) x + c z, by the SVD of its 2r×2r core.

    c = 0 gives x and c = 1 gives z, bit for bit, and so do equal operands.

    Shapes: two points with batch dimensions (...), c a number or (...) -> `Point`.
    """
    c = weights(c, x)
    r = x.S.shape[-1]
    A, R_u = torch.linalg.qr(torch.cat([x.U, z.U], -1))
    B, R_v = torch.linalg.qr(torch.cat([x.V, z.V], -1))
    middle = torch.cat([R_u[..., :r] @ ((1 - c) * x.S), R_u[..., r:] @ (c * z.S)], -1)
    core = middle @ R_v.mT
    # LAPACK raises for a core that is not finite; a run that diverged shall see it in its loss.
    finite = core.isfinite().all(-1).all(-1)[..., None, None]
    P, sigma, Qt = torch.linalg.svd(torch.where(finite, core, 0.0), full_matrices=False)
    S = torch.diag_embed(torch.where(finite[..., 0], sigma, torch.nan)[..., :r])
    return exact(x, z, c, Point(A @ P[..., :r], S, B @ Qt.mT[..., :r]))


def orthographic(x: Point, z: Point, c: float | Tensor) -> Point:
    """R_x(c R_x⁻¹(z)) with the orthographic retraction R: K A⁻¹ Lᵀ, whose tangent part is x + c P_T(z − x).

    R_x⁻¹(z) = P_T(z − x) exactly, so with c = 1/t this is the streaming geometric average. It needs UᵀzV and
    A = (1 − c) S + c UᵀzV to be invertible; what is singular in A is left out. The bits of c = 0, c = 1 and of
    equal operands are as in `truncate`.

    Shapes: as `truncate`.
    Error:  about eps·cond(A)/5: 3e-5 in float32 at a condition of 10³, 8e-3 at 10⁵; `truncate` stays at 1e-6.
    Source: Tripuraneni, Flammarion, Bach & Jordan, COLT 2018 (the streaming average); Absil & Oseledets, 2015 (R).
    """
    c = weights(c, x)
    U, S, V = x
    zV, ztU = z.U @ (z.S @ (z.V.mT @ V)), z.V @ (z.S.mT @ (z.U.mT @ U))
    # x + ξ with ξ = c P_T(z − x): K = (x + ξ)V, L = (x + ξ)ᵀU, A = Uᵀ(x + ξ)V
    K, L = (1 - c) * (U @ S) + c * zV, (1 - c) * (V @ S.mT) + c * ztU
    A = U.mT @ K
    finite = A.isfinite().all(-1).all(-1)[..., None, None]
    (U1, U1tK), (V1, V1tL) = factorize(K, U), factorize(L, V)
    middle = torch.linalg.pinv(torch.where(finite, A, 0.0))
    core = torch.where(finite, U1tK @ middle @ V1tL.mT, torch.nan)
    return exact(x, z, c, Point(U1, core, V1))


AVERAGES: dict[str, Average] = {"truncate": truncate, "orthographic": orthographic}


def average_named(name: str) -> Average:
    """The operator called `name`.

    Raises: ValueError for an unknown name.
    """
    if not isinstance(name, str) or name not in AVERAGES:
        raise ValueError(
            f"average needs to be one of {', '.join(sorted(AVERAGES))}, got {name!r}; use one of them"
        )
    return AVERAGES[name]


def weights(c: float | Tensor, x: Point) -> Tensor:
    """c as a factor of the matrices of a batch.

    Shapes: () or (...) -> (..., 1, 1).
    """
    c = torch.as_tensor(c, dtype=x.S.dtype, device=x.S.device)
    return c.expand(x.S.shape[:-2])[..., None, None]


def exact(x: Point, z: Point, c: Tensor, mean: Point) -> Point:
    """`mean`, but x where c = 0 or the operands are equal, and z where c = 1.

    Shapes: as `truncate`, c (..., 1, 1).
    """
    equal = torch.stack([(a == b).all(-1).all(-1) for a, b in zip(x, z, strict=True)]).all(0)
    first, second = (c == 0) | equal[..., None, None], c == 1
    parts = (
        torch.where(first, a, torch.where(second, b, m)) for a, b, m in zip(x, z, mean, strict=True)
    )
    return Point(*parts)
