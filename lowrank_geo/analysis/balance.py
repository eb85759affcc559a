"""The balance of two factors W = U Vᵀ: gradient flow conserves UᵀU − VᵀV, momentum does not.

The low-rank counterpart of what momentum does to diagonal networks (`lowrank_geo.analysis.diagonal`).
"""

import torch
from torch import Tensor

from lowrank_geo.analysis.coefficients import steady
from lowrank_geo.analysis.two_step import TwoStep


def imbalance(U: Tensor, V: Tensor) -> Tensor:
    """UᵀU − VᵀV.

    Shapes: U (m, r), V (n, r) -> (r, r), symmetric.
    Units: squared weights.
    Raises: ValueError for factors of different ranks.
    Source: derived; gradient flow leaves it as it is: d(UᵀU)/dt = −(UᵀGV + VᵀGᵀU) = d(VᵀV)/dt.
    """
    if U.shape[-1] != V.shape[-1]:
        raise ValueError(
            f"imbalance needs factors of one rank, got {tuple(U.shape)} and {tuple(V.shape)}; pass U (m, r), V (n, r)"
        )
    return U.mT @ U - V.mT @ V


def balance_change(method: TwoStep, lr: float, gradients: Tensor) -> Tensor:
    """By how much a run of momentum changes UᵀU − VᵀV: 2 lr γ ∫ (g_Uᵀg_U − g_Vᵀg_V) dt.

    For heavy ball η(1 + μ)/(1 − μ)³ times the integral. For gradient descent the sum over its steps is exact.

    Args: gradients: Σ lr (g_Uᵀg_U − g_Vᵀg_V) over the steps, with g_U = ∂L/∂U and g_V = ∂L/∂V.
    Shapes: gradients (r, r) -> (r, r).
    Units: gradients in loss (lr times squared slopes), the change in squared weights.
    Error:  relative O(lr); 0 without momentum.
    Source: derived from the first counter term of the flow, arXiv 2506.14806.

    >>> import torch
    >>> from lowrank_geo.analysis.two_step import two_step
    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> balance_change(two_step(HeavyBall(0.0)), 0.1, torch.ones(1, 1))
    tensor([[0.1000]])
    """
    return -2 * lr * float(steady(method, 2)[1]) * gradients  # steady(…)[1] is −γ


def horizontal(U: Tensor, V: Tensor, gU: Tensor, gV: Tensor) -> tuple[Tensor, Tensor]:
    """The part of a change (gU, gV) of two factors that is orthogonal to those that leave U Vᵀ as it is, (U A, −V Aᵀ).

    Along these directions the loss is flat, the companion roots of momentum are {1, β}, and noise adds up without end:
    only what is horizontal has a stationary distribution. A solves UᵀU A + A VᵀV = Uᵀ gU − gVᵀ V.

    Shapes: U, gU (…, m, r), V, gV (…, n, r) -> theirs.
    Units: those of the change.
    Raises: ValueError where neither UᵀU nor VᵀV has full rank.
    Source: derived.

    >>> U, V = torch.eye(2, 1), 2 * torch.eye(3, 1)
    >>> [part.sum().item() for part in horizontal(U, V, U, -V)]  # such a change has no horizontal part
    [0.0, 0.0]
    """
    left, P = torch.linalg.eigh(U.mT @ U)
    right, Q = torch.linalg.eigh(V.mT @ V)
    sums = left[..., :, None] + right[..., None, :]
    if not bool(sums.min() > torch.finfo(sums.dtype).eps * sums.max()):
        raise ValueError(
            f"horizontal needs factors of full rank, got eigenvalues of UᵀU and VᵀV down to {float(sums.min()):.3g} "
            "together; lower the rank"
        )
    A = P @ ((P.mT @ (U.mT @ gU - gV.mT @ V) @ Q) / sums) @ Q.mT
    return gU - U @ A, gV + V @ A.mT
