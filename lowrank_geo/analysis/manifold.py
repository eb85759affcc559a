"""Momentum on the fixed-rank manifold: its flow to the first counter term, and the noise it ends with."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from lowrank_geo.analysis.checks import check_positive
from lowrank_geo.analysis.coefficients import settled
from lowrank_geo.analysis.integrate import rk4
from lowrank_geo.analysis.two_step import TwoStep, validity_bound
from lowrank_geo.geometry import Point, Tangent, check_rank, embed, norm, project, to_dense

Field = Callable[[Tensor], Tensor]
ORDERS = (1, 2)
POWERS = 60  # iterations for the largest curvature


def nearest(W: Tensor, rank: int) -> Point:
    """The nearest matrix of a rank, by SVD.

    Shapes: W (m, n) -> U (m, r), S (r, r), V (n, r).
    Units: those of W, in S.
    Source: Eckart & Young, Psychometrika 1, 1936.
    """
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    return Point(U[:, :rank], torch.diag(values[:rank]), Vh[:rank].mT)


def riemannian_hessian(gradient: Field, point: Point, xi: Tangent) -> Tangent:
    """The Hessian of a loss on the manifold along a tangent vector, in the embedded metric.

    P(∇²L[ξ]), and the curvature of the manifold: (I − UUᵀ) G Vp S⁻ᵀ and (I − VVᵀ) Gᵀ Up S⁻¹ in Up and Vp.

    Args: gradient: ∇L of the whole matrix, differentiable by torch.func.
    Shapes: gradient (m, n) -> (m, n).
    Units: loss per squared weight, times that of ξ.
    Raises: ValueError for a singular S: the curvature grows without bound as σ_r falls.
    Source: Vandereycken, SIAM J. Optim. 23(2), 2013, section 2.3 (for diagonal S).
    """
    if not bool(torch.linalg.svdvals(point.S)[-1] > torch.finfo(point.S.dtype).eps):
        raise ValueError(
            f"riemannian_hessian needs a core S of full rank, got its smallest singular value "
            f"{float(torch.linalg.svdvals(point.S)[-1]):.3g}; lower the rank"
        )
    U, S, V = point
    value = jvp(gradient, (to_dense(point),), (embed(point, xi),))
    G, along = value[0], value[1]
    flat = project(point, along)
    left = G @ torch.linalg.solve(S, xi.Vp.mT).mT  # G Vp S⁻ᵀ, (m, r)
    right = G.mT @ torch.linalg.solve(S, xi.Up, left=False)  # Gᵀ Up S⁻¹, (n, r)
    return Tangent(flat.Up + left - U @ (U.mT @ left), flat.M, flat.Vp + right - V @ (V.mT @ right))


def riemannian_flow(
    gradient: Field, point: Point, method: TwoStep, lr: float, order: int, steps: int
) -> Iterator[Tensor]:
    """Where momentum with the embedded metric goes: W' = −c_k grad L − lr γ_k Hess L[grad L], at 0, lr, … steps·lr.

    The scalars c_k, γ_k are those of flat space; gradient and Hessian are those of the manifold.

    Shapes: gradient (m, n) -> (m, n); -> W (m, n), steps + 1 times.
    Error:  O(lr^order) against `RiemannianSGD` with any second-order retraction and transport by projection.
    Units: lr and time as those of the optimizer, weights per gradient.
    Raises: ValueError for lr times the largest curvature on the manifold beyond `validity_bound`, or an order other
        than 1 or 2: from the third on, the flow needs a retraction and a transport that are accurate to third order,
        and the curvature tensor.
    Source: the flow of Lyu et al., arXiv 2506.14806, carried over; derived and tested here.
    """
    if order not in ORDERS:
        raise ValueError(
            f"riemannian_flow needs order 1 or 2, got {order}; the optimizer's retraction and transport are "
            "second-order accurate, so that a further counter term would be below their error"
        )
    check_positive("riemannian_flow", "lr", lr)
    bound, curvature = validity_bound(method), largest_riemannian_curvature(gradient, point)
    if not lr * curvature < bound:
        raise ValueError(
            f"riemannian_flow needs lr·λ < {bound:.3g}, got {lr * curvature:.3g} at the start; lower lr below "
            f"{bound / curvature:.3g} (the iterates oscillate and the flow does not)"
        )
    return _flow(gradient, point, list(settled(method, order)), lr, steps)


def _flow(
    gradient: Field, point: Point, series: list[np.ndarray], lr: float, steps: int
) -> Iterator[Tensor]:
    rank, W = point.S.shape[-1], to_dense(point)
    yield W
    for k in range(steps):
        c, gamma = (*series[min(k, len(series) - 1)].tolist(), 0.0)[:2]

        def field(X: Tensor, c: float = c, gamma: float = gamma) -> Tensor:
            return _field(gradient, nearest(X, rank), c, lr * gamma)

        W = to_dense(nearest(rk4(field, W, lr, 1), rank))
        yield W


def _field(gradient: Field, at: Point, c: float, gamma: float) -> Tensor:
    # The trees are in f = −∇L: c f − γ f'f is −c grad − γ Hess[grad], and the series holds −γ.
    grad = project(at, gradient(to_dense(at)))
    velocity = -c * embed(at, grad)
    if gamma:
        velocity = velocity + gamma * embed(at, riemannian_hessian(gradient, at, grad))
    return velocity


def largest_riemannian_curvature(gradient: Field, point: Point) -> float:
    """The largest eigenvalue, by absolute value, of the Hessian on the manifold, by power iteration: a lower bound.

    Shapes: gradient (m, n) -> (m, n), point (m, r), (r, r), (n, r).
    Units: loss per squared weight.
    Raises: as `riemannian_hessian`.
    Source: derived; what takes the place of λ in the stability bound and in (1 − √μ)².
    """
    W, seed = to_dense(point), torch.Generator(device="cpu").manual_seed(0)
    xi = project(point, torch.randn(W.shape, generator=seed, dtype=W.dtype).to(W.device))
    largest = 0.0
    for _ in range(POWERS):
        size = norm(xi).clamp_min(torch.finfo(W.dtype).tiny)
        xi = riemannian_hessian(gradient, point, Tangent(*(x / size for x in xi)))
        largest = float(norm(xi))
    return largest


def noise_floor(m: int, n: int, r: int) -> float:
    """The stationary excess loss of training at rank r over that of training all m·n weights: r(m + n − r)/(mn).

    At a minimiser of rank r with curvature and noise the same in all directions: only noise within the tangent space is
    kept, and r(m + n − r) is its dimension.

    Shapes: numbers.
    Units: none, a share.
    Error:  O(lr); exact for constant curvature.
    Raises: ValueError for a rank above min(m, n).
    Source: derived; tested against `RiemannianSGD`.

    >>> round(noise_floor(12, 10, 2), 3)
    0.333
    """
    check_rank("noise_floor", m, n, r)
    return r * (m + n - r) / (m * n)
