"""Retractions: from a point and a tangent step back to the manifold.

All three of the embedded metric are second order, R(tξ) = W + tξ + O(t²) normal to the tangent
space + O(t³), need no inverse of S and take batch dimensions; what they find out about the frames on
the way comes back in a `Turn`. `polar` is the retraction of the product metric.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo import dispatch
from lowrank_geo.geometry import Point, Tangent, magnitude
from lowrank_geo.orthonormal import on_host


class Turn(NamedTuple):
    """A new point, and how its frames lie to the old ones."""

    point: Point
    UtU1: Tensor  # (..., r, r)
    VtV1: Tensor  # (..., r, r)


def svd(point: Point, xi: Tangent) -> Turn:
    """Best rank-r approximation of W + ξ (metric projection); S comes back diagonal.

    Shapes: as `Point` and `Tangent` -> `Turn`.
    Source: Absil & Oseledets, Low-rank retractions, Comput. Optim. Appl. 62, 2015, section 3.2.
    """
    U, S, V = point
    r = S.shape[-1]
    A, R_u = torch.linalg.qr(
        torch.cat([U, xi.Up], -1)
    )  # W + ξ = [U Up] [[S + M, I], [I, 0]] [V Vp]ᵀ
    B, R_v = torch.linalg.qr(torch.cat([V, xi.Vp], -1))
    identity = torch.eye(r, dtype=S.dtype, device=S.device).expand_as(S)
    core = torch.cat(
        [torch.cat([S + xi.M, identity], -1), torch.cat([identity, torch.zeros_like(S)], -1)], -2
    )
    P, sigma, Qt = torch.linalg.svd(R_u @ core @ R_v.mT, full_matrices=False)
    U1, V1 = A @ P[..., :r], B @ Qt.mT[..., :r]
    return Turn(Point(U1, torch.diag_embed(sigma[..., :r]), V1), U.mT @ U1, V.mT @ V1)


def orthographic(point: Point, xi: Tangent) -> Turn:
    """Galerkin form of the orthographic retraction: W + ξ projected to the ranges of K = (W+ξ)V
    and L = (W+ξ)ᵀU.

    One fixed-rank BUG step without an SVD. Its tangent part is W + ξ up to O(t⁴) where σ_r(S) > 0.

    Shapes: as `Point` and `Tangent` -> `Turn`.
    Source: Absil & Oseledets, 2015, section 3.3; Ceruti & Lubich, BIT 62, 2022 (BUG).
    """
    U, S, V = point
    A = S + xi.M
    U1, R, UtU1 = dispatch.retract(U, A, xi.Up)
    V1, T, VtV1 = dispatch.retract(V, A.mT, xi.Vp)
    # W + ξ = K Vᵀ + U Vpᵀ with R = U1ᵀK, and T = V1ᵀ(V Aᵀ + Vp): U1ᵀ(W + ξ)V1 takes r×r matrices alone.
    return Turn(Point(U1, R @ VtV1 + UtU1.mT @ (T - VtV1.mT @ A.mT).mT, V1), UtU1, VtV1)


def splitting(point: Point, xi: Tangent) -> Turn:
    """Projector splitting: a K step, the S step backwards, an L step.

    Shapes: as `Point` and `Tangent` -> `Turn`.
    Source: Lubich & Oseledets, BIT 54, 2014.
    """
    U, S, V = point
    U1, R, UtU1 = dispatch.retract(U, S + xi.M, xi.Up)
    # ξV is known exactly: S1 = R = U1ᵀK less the backward step U1ᵀξV is U1ᵀU S, and L = V S1ᵀ + ξᵀU1 = V Rᵀ + Vp UᵀU1.
    V1, T, VtV1 = dispatch.retract(V, R.mT, xi.Vp, UtU1)
    return Turn(Point(U1, T.mT, V1), UtU1, VtV1)


def polar(point: Point, step: Tangent) -> Point:
    """Retraction of the product metric: U ← polar(U + ΔU), S ← S + ΔS, V ← polar(V + ΔV).

    The frames rotate as little as possible, so optimizer state needs only a projection
    afterwards. Rotations of more than 45° may be cut, to 51° at most.

    Shapes: as `Point`, with the step (ΔU, ΔS, ΔV) in a `Tangent` -> `Point`.
    """
    U, S, V = point
    return Point(dispatch.polar(U, step.Up)[0], S + step.M, dispatch.polar(V, step.Vp)[0])


RETRACTIONS: dict[str, Callable[[Point, Tangent], Turn]] = {
    "svd": svd,
    "orthographic": orthographic,
    "splitting": splitting,
}


def retract(point: Point, xi: Tangent, *, method: str = "orthographic") -> Point:
    """The new point of the retraction called `method`.

    Raises: ValueError for an unknown name.
    """
    if method not in RETRACTIONS:
        names = ", ".join(sorted(RETRACTIONS))
        raise ValueError(f"retract needs a method out of {names}, got {method!r}; use one of them")
    return RETRACTIONS[method](point, xi).point


def carried(point: Point, step: Tangent, xi: Tangent, *, method: str) -> tuple[Point, Tangent]:
    """`retract` and `keep_if_zero`, with `xi` projected to the tangent space at the new point.

    Shapes: as `Point` and `Tangent` -> `Point`, `Tangent`.
    """
    new, *overlaps = RETRACTIONS[method](point, step)
    still = still_ones(step)
    if still is not None:
        new = chosen(still, point, new)
        identity = torch.eye(point.S.shape[-1], dtype=point.S.dtype, device=point.S.device)
        overlaps = [torch.where(still[..., None, None], identity, C) for C in overlaps]
    return new, Tangent(*dispatch.transport(point.U, point.V, *xi, new.U, new.V, *overlaps))


def polar_carried(point: Point, step: Tangent, xi: Tangent) -> tuple[Point, Tangent]:
    """`polar` and `keep_if_zero`, with `xi` projected to the tangent space of the new frames.

    Shapes: as `Point` and `Tangent` -> `Point`, `Tangent`.
    """
    still = still_ones(step)
    U, Up = dispatch.polar(point.U, step.Up, xi.Up, still)
    V, Vp = dispatch.polar(point.V, step.Vp, xi.Vp, still)
    assert Up is not None and Vp is not None
    S = point.S + step.M
    if still is not None:
        S = torch.where(still[..., None, None], point.S, S)
    return Point(U, S, V), Tangent(Up, xi.M, Vp)


def is_zero(step: Tangent) -> Tensor:
    """Whether every entry of a step is exactly zero.

    Shapes: as `Tangent` -> (...).
    """
    return torch.stack([magnitude(x)[..., 0, 0] for x in step]).amax(0) == 0


def still_ones(step: Tangent) -> Tensor | None:
    """`is_zero`, or None where a look at the numbers costs nothing and shows that every matrix moves.

    Shapes: as `Tangent` -> (...).
    """
    still = is_zero(step)
    return None if on_host(still) and not still.any() else still


def keep_if_zero(old: Point, step: Tangent, new: Point) -> Point:
    """`new`, but bit for bit `old` for every matrix of the batch whose step is exactly zero.

    Shapes: as `Point` and `Tangent` -> `Point`.
    """
    still = still_ones(step)
    return new if still is None else chosen(still, old, new)


def chosen(still: Tensor, old: Point, new: Point) -> Point:
    """`old` where `still`, `new` elsewhere.

    Shapes: still (...), as `Point` -> `Point`.
    """
    pairs = zip(old, new, strict=True)
    return Point(*(torch.where(still[..., None, None], a, b) for a, b in pairs))
