"""What momentum adds to the loss it descends, and how smooth the loss is along the way that was taken."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad

from lowrank_geo.analysis.coefficients import steady
from lowrank_geo.analysis.two_step import TwoStep, heavy_ball, two_step
from lowrank_geo.optim.filters import Filter

Loss = Callable[[Tensor], Tensor]


def gradient_penalty(method: TwoStep, lr: float) -> float:
    """The weight of |∇L|² in the loss that the method descends: L + weight·|∇L|², to first order in lr.

    lr·γ/(2c): lr(1 + μ)/(4(1 − μ)²) for heavy ball; for QHM, of effective step a, (a/4)(1 + 2νβ/(1 − β)).

    Shapes: numbers.
    Units: squared weights per loss, as lr.
    Source: Ghosh et al., ICLR 2023, arXiv 2302.00849; Kovachki & Stuart, JMLR 22, 2021.

    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> round(gradient_penalty(two_step(HeavyBall(0.9)), 0.01), 3)
    0.475
    """
    c, minus_gamma = steady(method, 2)
    return float(-lr * minus_gamma / (2 * c))


def modified_loss(loss: Loss, mu: float, eta: float) -> Loss:
    """The loss whose gradient flow heavy ball follows to first order: L + η(1 + μ)/(4(1 − μ)²)·|∇L|².

    Shapes: loss (d) -> (), and so the result.
    Units: η as in torch.optim.SGD, the result a loss.
    Raises: ValueError for μ outside [0, 1).
    Source: Ghosh et al., ICLR 2023, arXiv 2302.00849.

    >>> modified_loss(lambda x: (x**2).sum() / 2, mu=0.0, eta=0.1)(torch.ones(1))  # 1/2 + 0.1/4
    tensor(0.5250)
    """
    return _modified(loss, gradient_penalty(heavy_ball("modified_loss", mu), eta))


def modified_loss_of(loss: Loss, filter: Filter, lr: float) -> Loss:
    """`modified_loss` for any filter of constant coefficients.

    Shapes: loss (d) -> (), and so the result.
    Units: lr as the optimizer takes it, the result a loss.
    Raises: ValueError for a filter that changes along the run.
    Source: as `gradient_penalty`.
    """
    return _modified(loss, gradient_penalty(two_step(filter), lr))


def _modified(loss: Loss, weight: float) -> Loss:
    def modified(x: Tensor) -> Tensor:
        return loss(x) + weight * grad(loss)(x).square().sum()

    return modified


def directional_smoothness(points: Tensor, gradients: Tensor) -> Tensor:
    """The curvature along each step, ⟨Δg, Δx⟩/|Δx|²: what the method sees of the Hessian.

    The gradients have to be those of one loss: of one batch, or of all data. NaN where a step is zero.

    Shapes: points, gradients (k, d) -> (k − 1).
    Units: loss per squared weight, as a Hessian's eigenvalue.
    Raises: ValueError for shapes that differ or fewer than two points.
    Source: Lyu et al., arXiv 2506.14806 (what heavy ball regularises); g^T H g/|g|² in the limit of short steps.

    >>> x = torch.tensor([[1.0], [0.5], [0.2]])
    >>> directional_smoothness(x, 3 * x)
    tensor([3., 3.])
    """
    if points.shape != gradients.shape or points.dim() != 2 or len(points) < 2:
        raise ValueError(
            "directional_smoothness needs points and gradients of one shape (k, d) with k >= 2, got "
            f"{tuple(points.shape)} and {tuple(gradients.shape)}; stack what was recorded"
        )
    steps, changes = points.diff(dim=0), gradients.diff(dim=0)
    return torch.linalg.vecdot(steps, changes) / torch.linalg.vecdot(steps, steps)
