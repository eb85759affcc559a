"""Retractions: from a point and a tangent step back to the manifold.

All three of the embedded metric are second order, R(tξ) = W + tξ + O(t²) normal to the tangent
space + O(t³), need no inverse of S and take batch dimensions. `polar` is the retraction of the
product metric.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_geo import dispatch
from lowrank_geo.geometry import Point, Tangent, magnitude
from lowrank_geo.orthonormal import on_host


def svd(point: Point, xi: Tangent) -> Point:
    """Best rank-r approximation of W + ξ (metric projection); S comes back diagonal.

    Shapes: as `Point` and `Tangent` -> `Point`.
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
    return Point(A @ P[..., :r], torch.diag_embed(sigma[..., :r]), B @ Qt.mT[..., :r])


def orthographic(point: Point, xi: Tangent) -> Point:
    """Galerkin form of the orthographic retraction: W + ξ projected to the ranges of K = (W+ξ)V
    and L = (W+ξ)ᵀU.

    One fixed-rank BUG step without an SVD. Its tangent part is W + ξ up to O(t⁴) where σ_r(S) > 0.

    Shapes: as `Point` and `Tangent` -> `Point`.
    Source: Absil & Oseledets, 2015, section 3.3; Ceruti & Lubich, BIT 62, 2022 (BUG).
    """
    U, S, V = point
    A = S + xi.M
    # W + ξ = U (A Vᵀ + Vpᵀ) + Up Vᵀ, so U1ᵀ(W + ξ)V1 takes the frames' products alone.
    U1, U1tU, U1tUp = dispatch.retract(U, A, xi.Up)
    V1, V1tV, V1tVp = dispatch.retract(V, A.mT, xi.Vp)
    return Point(U1, (U1tU @ A + U1tUp) @ V1tV.mT + U1tU @ V1tVp.mT, V1)


def splitting(point: Point, xi: Tangent) -> Point:
    """Projector splitting: a K step, the S step backwards, an L step.

    Shapes: as `Point` and `Tangent` -> `Point`.
    Source: Lubich & Oseledets, BIT 54, 2014.
    """
    U, S, V = point
    A = S + xi.M
    U1, U1tU, U1tUp = dispatch.retract(U, A, xi.Up)
    # ξV is known exactly: S1 = U1ᵀK less the backward step U1ᵀξV is U1ᵀU S, and L = V S1ᵀ + ξᵀU1 = V Cᵀ + Vp UᵀU1.
    C = U1tU @ A + U1tUp
    V1, V1tV, V1tVp = dispatch.retract(V, C.mT, xi.Vp, U1tU.mT)
    return Point(U1, C @ V1tV.mT + U1tU @ V1tVp.mT, V1)


def polar(point: Point, step: Tangent) -> Point:
    """Retraction of the product metric: U ← polar(U + ΔU), S ← S + ΔS, V ← polar(V + ΔV).

    The frames rotate as little as possible, so optimizer state needs only a projection
    afterwards. Rotations of more than 45° may be cut, to 51° at most.

    Shapes: as `Point`, with the step (ΔU, ΔS, ΔV) in a `Tangent` -> `Point`.
    """
    U, S, V = point
    return Point(dispatch.polar(U, step.Up)[0], S + step.M, dispatch.polar(V, step.Vp)[0])


RETRACTIONS: dict[str, Callable[[Point, Tangent], Point]] = {
    "svd": svd,
    "orthographic": orthographic,
    "splitting": splitting,
}


def retract(point: Point, xi: Tangent, *, method: str = "orthographic") -> Point:
    """The retraction called `method`.

    Raises: ValueError for an unknown name.
    """
    if method not in RETRACTIONS:
        names = ", ".join(sorted(RETRACTIONS))
        raise ValueError(f"retract needs a method out of {names}, got {method!r}; use one of them")
    return RETRACTIONS[method](point, xi)


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
    if still is None:
        return new
    still = still[..., None, None]

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(still, a, b)

    return Point(choose(old.U, new.U), choose(old.S, new.S), choose(old.V, new.V))
