"""Retractions: from a point and a tangent step back to the manifold.

All three of the embedded metric are second order, R(tξ) = W + tξ + O(t²) normal to the tangent
space + O(t³), need no inverse of S and take batch dimensions. `polar` is the retraction of the
product metric.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent, plus
from lowrank_geo.orthonormal import on_host, orthonormalize, polar_update


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
    K, L = plus(xi.Up, U, A), plus(xi.Vp, V, A.mT)
    U1, V1 = orthonormalize(K, U), orthonormalize(L, V)
    # U1ᵀ(W + ξ)V1 with W + ξ = K Vᵀ + U Vpᵀ.
    return Point(U1, (U1.mT @ K) @ (V.mT @ V1) + (U1.mT @ U) @ (xi.Vp.mT @ V1), V1)


def splitting(point: Point, xi: Tangent) -> Point:
    """Projector splitting: a K step, the S step backwards, an L step.

    Shapes: as `Point` and `Tangent` -> `Point`.
    Source: Lubich & Oseledets, BIT 54, 2014.
    """
    U, S, V = point
    K = U @ (S + xi.M) + xi.Up
    U1 = orthonormalize(K, U)
    # ξV is known exactly, so S1 = U1ᵀK and the backward step subtracts U1ᵀξV.
    S_back = U1.mT @ (U @ S)
    # ξᵀU1 = V (U M + Up)ᵀU1 + Vp UᵀU1
    L = V @ S_back.mT + V @ ((U @ xi.M + xi.Up).mT @ U1) + xi.Vp @ (U.mT @ U1)
    V1 = orthonormalize(L, V)
    return Point(U1, L.mT @ V1, V1)


def polar(point: Point, step: Tangent) -> Point:
    """Retraction of the product metric: U ← polar(U + ΔU), S ← S + ΔS, V ← polar(V + ΔV).

    The frames rotate as little as possible, so optimizer state needs only a projection
    afterwards. Rotations of more than 45° may be cut, to 51° at most.

    Shapes: as `Point`, with the step (ΔU, ΔS, ΔV) in a `Tangent` -> `Point`.
    """
    U, S, V = point
    return Point(polar_update(U, step.Up), S + step.M, polar_update(V, step.Vp))


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


def keep_if_zero(old: Point, step: Tangent, new: Point) -> Point:
    """`new`, but bit for bit `old` for every matrix of the batch whose step is exactly zero.

    Shapes: as `Point` and `Tangent` -> `Point`.
    """
    largest = torch.stack([x.abs().amax((-2, -1)) for x in step]).amax(0)
    still = (largest == 0)[..., None, None]
    if on_host(still) and not still.any():
        return new

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(still, a, b)

    return Point(choose(old.U, new.U), choose(old.S, new.S), choose(old.V, new.V))
