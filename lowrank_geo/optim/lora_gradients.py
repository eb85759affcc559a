"""Gradients on the manifold from those of LoRA's factors.

With W = s B A = U S Vᵀ, A = Vᵀ and s B = U S, the gradients of the factors are ∂L/∂B = s G V and ∂L/∂A = (Gᵀ U S)ᵀ.
The first gives G V as it is. The second is divided by S, damped, where S is small: there Vp is shortened, and at B = 0
only U and S move, as in LoRA itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, project_factors
from lowrank_geo.optim.lora_pairs import Pair
from lowrank_geo.precision import full_precision


@full_precision()
def give_gradients(pairs: Iterable[Pair], damping: float) -> None:
    """Set the gradients of the points, of one shape, from those of their factors: tangent coordinates."""
    pairs = list(pairs)
    point = Point(
        *(
            torch.stack([x.detach() for x in column])
            for column in zip(*(p.point for p in pairs), strict=True)
        )
    )
    scaling = torch.tensor([p.scaling for p in pairs]).to(point.S)[:, None, None]
    gB = torch.stack([p.B.grad.to(point.S.dtype) for p in pairs])  # type: ignore[union-attr]
    gA = torch.stack([p.A.grad.to(point.S.dtype) for p in pairs])  # type: ignore[union-attr]
    found = project_factors(point, gB / scaling, divided(gA.mT, point.S, damping))
    for index, pair in enumerate(pairs):
        for part, gradient in zip(pair.point, found, strict=True):
            part.grad = gradient[index]


def divided(KS: Tensor, S: Tensor, damping: float) -> Tensor:
    """K from K S, as K S Sᵀ (S Sᵀ + ε²I)⁻¹ with ε = damping · |S|_F / √r; 0 where S = 0.

    Shapes: KS (L, n, r), S (L, r, r) -> (L, n, r).
    """
    r = S.shape[-1]
    square = S @ S.mT
    mean = torch.diagonal(square, dim1=-2, dim2=-1).mean(-1)[:, None, None]
    shift = torch.where(mean > 0, damping**2 * mean, 1.0)
    identity = torch.eye(r, dtype=S.dtype, device=S.device)
    L, _ = torch.linalg.cholesky_ex(square + shift * identity)
    # Solved for the small matrix Sᵀ, so that the tall one takes part in one product alone.
    return KS @ torch.cholesky_solve(S, L).mT
