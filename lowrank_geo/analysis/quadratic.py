"""On quadratics the flow of momentum is known to all orders: x' = (ln r_k / lr) x for each curvature."""

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_geo.analysis.checks import check_count, check_positive
from lowrank_geo.analysis.two_step import TwoStep, heavy_ball, validity_bound


class QuadraticFlow(NamedTuple):
    """The flow of a momentum method on L(x) = xᵀHx/2."""

    lr: float
    vectors: Tensor  # (d, d), eigenvectors of H as columns
    factors: Tensor  # (steps, d), r_k: what a step multiplies each mode by
    start: Tensor  # (d), in the basis of the eigenvectors

    def rates(self) -> Tensor:
        """ln r_k / lr, constant on [k·lr, (k + 1)·lr).

        Shapes: -> (steps, d).
        """
        return self.factors.log() / self.lr

    def at(self, times: Tensor) -> Tensor:
        """The flow at some times between 0 and steps·lr.

        Shapes: times (t) -> (t, d).
        Raises: ValueError for times outside.
        """
        steps = len(self.factors)
        place = times / self.lr
        if times.numel() and not (0 <= float(times.min()) and float(place.max()) <= steps + 1e-9):
            raise ValueError(
                f"the flow needs times between 0 and {steps * self.lr:g}, got {times.tolist()}; ask for more steps"
            )
        whole = place.round().where((place - place.round()).abs() < 1e-9, place.floor())
        whole = whole.clamp(max=steps).long()
        logs = torch.cat(
            [torch.zeros_like(self.factors[:1]), self.factors.log().cumsum(0)]
        )  # (s+1, d)
        last = torch.cat([self.factors, self.factors[-1:]]).log()
        moved = logs[whole] + (place - whole)[:, None].clamp(min=0) * last[whole]
        return (moved.exp() * self.start) @ self.vectors.mT


def quadratic_flow(hessian: Tensor, x: Tensor, mu: float, eta: float, steps: int) -> QuadraticFlow:
    """Heavy ball on xᵀHx/2 as a flow, without a series: r_0 = 1 − ηλ, r_k = 1 + μ(1 − 1/r_{k−1}) − ηλ.

    Shapes: hessian (d, d) symmetric, x (d).
    Units: η as in torch.optim.SGD, weights per gradient; time is η times steps.
    Error:  equals the iterates to 1e-13 at multiples of η.
    Raises: ValueError for a Hessian that is not symmetric, μ outside [0, 1), η ≤ 0, no steps or ηλ beyond (1 − √μ)².
    Source: Lyu et al., arXiv 2506.14806: Φ_k = id + μ(id − Φ_{k−1}⁻¹) − η g, solved on linear maps.

    >>> H = torch.eye(1, dtype=torch.float64)
    >>> quadratic_flow(H, H[0], mu=0.0, eta=0.5, steps=2).at(torch.tensor([0.5, 1.0])).tolist()
    [[0.5], [0.25]]
    """
    method = heavy_ball("quadratic_flow", mu)
    return quadratic_momentum_flow(hessian, x, method, eta, steps)


def quadratic_momentum_flow(
    hessian: Tensor, x: Tensor, method: TwoStep, lr: float, steps: int
) -> QuadraticFlow:
    """The same for any method of two points: r_k = 1 + β − a·lr·λ − (β + b·lr·λ)/r_{k−1}.

    Shapes: hessian (d, d) symmetric, x (d).
    Units: lr times an eigenvalue of the Hessian has none.
    Raises: as `quadratic_flow`.
    Source: as `quadratic_flow`, for x₊ = x + β(x − x₋) − lr(a g(x) + b g(x₋)).
    """
    check_positive("quadratic_flow", "lr", lr)
    check_count("quadratic_flow", "steps", steps, 1)
    values, vectors = symmetric_eigen("quadratic_flow", hessian)
    bound, largest = validity_bound(method), float(values.max())
    if lr * largest >= bound:
        raise ValueError(
            f"quadratic_flow needs lr·λ < {bound:.3g}, got {lr * largest:.3g}; lower lr below {bound / largest:.3g}"
        )
    s = lr * values
    factors = [1 - method.current * s]
    for _ in range(steps - 1):
        factors.append(
            1 + method.beta - method.current * s - (method.beta + method.previous * s) / factors[-1]
        )
    return QuadraticFlow(lr, vectors, torch.stack(factors), vectors.mT @ x)


def symmetric_eigen(call: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Shapes: (d, d) -> (d), (d, d).
    Raises: ValueError, naming `call`, if it is not square, or not symmetric to √eps of its largest entry.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"{call} needs a square Hessian, got shape {tuple(matrix.shape)}; pass (d, d)"
        )
    skew = float((matrix - matrix.mT).abs().max())
    # Written so that NaN is refused, too.
    if not skew <= max(1e-6, torch.finfo(matrix.dtype).eps ** 0.5) * float(matrix.abs().max()):
        raise ValueError(
            f"{call} needs a symmetric Hessian, got |H − Hᵀ| up to {skew:.3g}; pass (H + Hᵀ)/2 if that is meant"
        )
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors
