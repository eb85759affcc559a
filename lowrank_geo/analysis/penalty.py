"""What momentum adds to the loss of a low-rank matrix: on the manifold, and in the two factors W = U Vᵀ.

On the manifold the penalty is that of the Riemannian gradient and a property of W. In factors it is that of both their
gradients and depends on how W is split, so that it also balances: U → U A, V → V A⁻ᵀ leaves W and changes it.
"""

from collections.abc import Callable

from torch import Tensor
from torch.func import grad

from lowrank_geo.analysis.regularization import gradient_penalty
from lowrank_geo.analysis.two_step import two_step
from lowrank_geo.geometry import Point, norm, project, to_dense
from lowrank_geo.optim.filters import Filter

Loss = Callable[[Tensor], Tensor]


def manifold_penalty(loss: Loss, point: Point) -> Tensor:
    """|grad L|² in the embedded metric: |G V|² + |Gᵀ U|² − |Uᵀ G V|², with G = ∇L at W = U S Vᵀ.

    Shapes: loss (m, n) -> (), point (m, r), (r, r), (n, r) -> ().
    Units: squared loss per squared weight.
    Source: derived; the Riemannian counterpart of Ghosh et al., ICLR 2023, arXiv 2302.00849.
    """
    return norm(project(point, grad(loss)(to_dense(point)))).square()


def factor_penalty(loss: Loss, U: Tensor, V: Tensor) -> Tensor:
    """|∂L/∂U|² + |∂L/∂V|² = |G V|² + |Gᵀ U|², with G = ∇L at W = U Vᵀ.

    Shapes: loss (m, n) -> (), U (m, r), V (n, r) -> ().
    Units: squared loss per squared weight.
    Source: Ghosh et al., ICLR 2023, arXiv 2302.00849, in these coordinates.
    """
    G = grad(loss)(U @ V.mT)
    return (G @ V).square().sum() + (G.mT @ U).square().sum()


def manifold_modified_loss(loss: Loss, filter: Filter, lr: float) -> Callable[[Point], Tensor]:
    """The loss on the manifold whose gradient flow momentum follows to second order in lr: L + w |grad L|².

    w = lr γ/(2c) is that of flat space: (a/4)(1 + 2νβ/(1 − β)) for QHM of effective step a.

    Shapes: loss (m, n) -> (); the result takes a `Point` -> ().
    Units: lr as the optimizer takes it, the result a loss.
    Raises: ValueError for a filter that changes along the run.
    Source: derived from `riemannian_flow`, as grad ½|grad L|² = Hess L[grad L].
    """
    weight = gradient_penalty(two_step(filter), lr)
    return lambda point: loss(to_dense(point)) + weight * manifold_penalty(loss, point)


def factor_modified_loss(
    loss: Loss, filter: Filter, lr: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The same for momentum on two factors: L + w (|G V|² + |Gᵀ U|²).

    Shapes: loss (m, n) -> (); the result takes U (m, r), V (n, r) -> ().
    Units: lr as the optimizer takes it, the result a loss.
    Raises: ValueError for a filter that changes along the run.
    Source: Ghosh et al., ICLR 2023, arXiv 2302.00849: L + w |∇L|², in these coordinates.
    """
    weight = gradient_penalty(two_step(filter), lr)
    return lambda U, V: loss(U @ V.mT) + weight * factor_penalty(loss, U, V)
