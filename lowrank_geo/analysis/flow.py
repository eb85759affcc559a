"""The flow that gradient descent with momentum follows: a gradient flow with counter terms to a chosen order.

Source: Lyu et al., Heavy-ball momentum method in continuous time and discretization error analysis, NeurIPS 2025, arXiv
2506.14806.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from lowrank_geo.analysis.checks import check_count
from lowrank_geo.analysis.coefficients import check_order, settled, steady
from lowrank_geo.analysis.differentials import Field, evaluate
from lowrank_geo.analysis.integrate import dop853, rk4
from lowrank_geo.analysis.quadratic import symmetric_eigen
from lowrank_geo.analysis.trees import forest
from lowrank_geo.analysis.two_step import TwoStep, heavy_ball, two_step, validity_bound
from lowrank_geo.optim.filters import Filter

Outside = Literal["refuse", "warn", "ignore"]
POWERS = 30  # power iterations for the largest curvature
DENSE = 64  # dimensions up to which the Hessian is decomposed instead
INTEGRATORS = {"rk4": rk4, "dop853": dop853}


@dataclass(frozen=True)
class Flow:
    """x' = F_k(x) on [k·lr, (k + 1)·lr), made by `heavy_ball_flow` or `momentum_flow`.

    With piecewise=False it is x' = F_∞(x) from a start shifted by lr·warmup·∇L(x₀) if `shift`, which is of order 2 at
    the most, and of order 1 without the shift.
    """

    gradient: Field
    method: TwoStep
    lr: float
    order: int
    series: tuple[np.ndarray, ...]  # of F_0, F_1, …; the last one stays
    piecewise: bool = True
    shift: bool = True

    def field(self, k: int) -> Field:
        """F_k.

        Shapes: (d) -> (d).
        """
        powers = self.lr ** (forest(self.order).sizes - 1.0)
        coefficients = (self.series[min(k, len(self.series) - 1)] * powers).tolist()
        return lambda x: evaluate(self._force, coefficients, self.order, x)

    def _force(self, x: Tensor) -> Tensor:
        return -self.gradient(x)

    def start(self, x: Tensor) -> Tensor:
        """Where the flow starts for iterates that start at x.

        Shapes: (d) -> (d).
        """
        if self.piecewise or not self.shift:
            return x
        return x + self.lr * self.method.warmup * self.gradient(x)

    def trajectory(
        self,
        x: Tensor,
        steps: int,
        *,
        integrator: Literal["rk4", "dop853"] = "rk4",
        substeps: int = 1,
        outside: Outside = "refuse",
    ) -> Tensor:
        """The flow at the times 0, lr, …, steps·lr, to be compared with the iterates.

        Args: integrator: "rk4" takes `substeps` fixed steps an interval, "dop853" is scipy's, adaptive to 1e-12.
            outside: what happens where no first-order flow follows the iterates for ever; "ignore" looks at nothing.
        Shapes: x (d) -> (steps + 1, d).
        Error:  below the last counter term lr^order for either integrator (of order 4 an interval, and 8).
        Raises: ValueError if lr times the largest curvature at x is beyond `validity_bound`, if the Jacobian of the
            gradient is not symmetric there, or for no steps or an unknown integrator.
        """
        check_count("a flow", "steps", steps, 1)
        if integrator not in INTEGRATORS:
            raise ValueError(
                f"a flow needs an integrator out of {', '.join(INTEGRATORS)}, got {integrator!r}; use one of them"
            )
        self.check_curvature(x, outside)
        points = [self.start(x)]
        advance = INTEGRATORS[integrator]
        for k in range(steps):
            points.append(advance(self.field(k), points[-1], self.lr, substeps))
        return torch.stack(points)

    def check_curvature(self, x: Tensor, outside: Outside) -> None:
        """Refuse, or warn, if lr·λ_max(x) is not below the validity bound."""
        if outside == "ignore":
            return
        bound, curvature = validity_bound(self.method), largest_curvature(self.gradient, x)
        if self.lr * curvature < bound:
            return
        told = (
            f"a first-order flow needs lr·λ < {bound:.3g}, got {self.lr * curvature:.3g} at the start; "
            f"lower lr below {bound / curvature:.3g} (the iterates oscillate and the flow does not)"
        )
        if outside == "refuse":
            raise ValueError(told)
        warnings.warn(told, stacklevel=3)


def heavy_ball_flow(
    gradient: Field, mu: float, eta: float, order: int, piecewise: bool = True, shift: bool = True
) -> Flow:
    """The flow of x₊ = x + μ(x − x₋) − η ∇L(x) with `order` terms; order 1 is −∇L/(1 − μ) after the start.

    Args: gradient: ∇L, that torch.func can differentiate order − 1 times (`gradient_of` makes one of a model).
    Shapes: gradient (d) -> (d).
    Units: eta is that of torch.optim.SGD(momentum=mu, lr=eta).
    Error:  supremum over a fixed time O(eta^order) with piecewise=True; O(eta^2) at best without, O(eta) without shift.
    Raises: ValueError for μ outside [0, 1), η ≤ 0 or an order outside 1 … 8.
    Source: Lyu et al., arXiv 2506.14806.

    >>> flow = heavy_ball_flow(lambda x: x, mu=0.5, eta=0.01, order=3)
    >>> x = flow.trajectory(torch.ones(1, dtype=torch.float64), steps=100)[-1]
    >>> round(x.item(), 4)  # as the iterates of heavy ball
    0.1298
    """
    return _flow(gradient, heavy_ball("heavy_ball_flow", mu), eta, order, piecewise, shift)


def momentum_flow(
    gradient: Field, filter: Filter, lr: float, order: int, piecewise: bool = True
) -> Flow:
    """The flow of gradient descent with any filter of the family whose coefficients do not change.

    Shapes: gradient (d) -> (d).
    Units: lr as the optimizer takes it.
    Raises: as `heavy_ball_flow`; ValueError for a filter that changes along the run.
    Source: Lyu et al., arXiv 2506.14806, with Φ_k = id + β(id − Φ_{k−1}⁻¹) − lr(a g + b g∘Φ_{k−1}⁻¹).
    """
    return _flow(gradient, two_step(filter), lr, order, piecewise, shift=True)


def _flow(
    gradient: Field, method: TwoStep, lr: float, order: int, piecewise: bool, shift: bool
) -> Flow:
    check_order("a flow", order)
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"a flow needs a positive step, got {lr}; pass e.g. 0.001")
    series = tuple(settled(method, order)) if piecewise else (steady(method, order),)
    return Flow(gradient, method, lr, order, series, piecewise, shift)


def flow_validity_bound(mu: float) -> float:
    """(1 − √μ)²: heavy ball with η·λ from here on oscillates, and its flow ends at a finite step.

    Shapes: numbers.
    Units: η times curvature, no unit.
    Raises: ValueError for μ outside [0, 1).
    Source: derived: r = 1 + μ(1 − 1/r) − ηλ has a real solution up to here.

    >>> f"{flow_validity_bound(0.9):.5f}"
    '0.00263'
    """
    return validity_bound(heavy_ball("flow_validity_bound", mu))


def largest_curvature(gradient: Field, x: Tensor) -> float:
    """The largest eigenvalue, by absolute value, of the Hessian at x.

    By decomposition up to 64 dimensions, else by power iteration, which is a lower bound.

    Shapes: x (d).
    Units: loss per squared weight.
    Raises: ValueError where the Jacobian of `gradient` is not symmetric: it is no gradient.
    Source: derived; the λ of the bound (1 − √μ)².
    """

    def product(v: Tensor) -> Tensor:
        return jvp(gradient, (x,), (v,))[1]

    if x.numel() <= DENSE:
        basis = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        hessian = torch.stack([product(e) for e in basis])
        return float(symmetric_eigen("a flow", hessian)[0].abs().max())
    return _power_iteration(product, x)


def _power_iteration(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    seed = torch.Generator(device="cpu").manual_seed(0)
    v, w = (torch.randn(x.shape, generator=seed, dtype=x.dtype).to(x.device) for _ in range(2))
    check_symmetric(product, v, w)
    largest = 0.0
    for _ in range(POWERS):
        v = product(v / v.norm().clamp_min(torch.finfo(v.dtype).tiny))
        largest = float(v.norm())
    return largest


def check_symmetric(product: Callable[[Tensor], Tensor], v: Tensor, w: Tensor) -> None:
    """Raise ValueError unless ⟨w, H v⟩ = ⟨v, H w⟩ to √eps of the products' sizes, as for the Hessian of any loss."""
    Hv, Hw = product(v), product(w)
    gap = float((w @ Hv - v @ Hw).abs())
    size = float(w.norm() * Hv.norm() + v.norm() * Hw.norm())
    if not gap <= torch.finfo(v.dtype).eps ** 0.5 * size:
        raise ValueError(
            f"a flow needs a symmetric Hessian, got ⟨w, Hv⟩ − ⟨v, Hw⟩ = {gap:.3g} for products of size {size:.3g}; "
            "pass the gradient of a loss"
        )
