"""The matching rules for parameters that are not factors: pure functions on lists of tensors, in
place.

Every rule leaves a parameter, its state and its counter bit for bit unchanged when lr = 0, the
gradient is zero and the state is fresh.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_geo.optim.filters import Coefficients
from lowrank_geo.orthonormal import msign

State = dict[str, Tensor]  # of one parameter, by name


def decay(params: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """p ← (1 − lr·wd) p."""
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)


def filtered(grads: list[Tensor], momenta: list[Tensor], how: Coefficients) -> list[Tensor]:
    """m ← u m + v g in place; returns a g + b m."""
    torch._foreach_mul_(momenta, how.u)
    torch._foreach_add_(momenta, torch._foreach_mul(grads, how.v))
    output = torch._foreach_mul(momenta, how.b)
    torch._foreach_add_(output, torch._foreach_mul(grads, how.a))
    return list(output)


def descend(params: list[Tensor], directions: list[Tensor], lr: float | Tensor) -> None:
    """p ← p − lr·d."""
    torch._foreach_sub_(params, torch._foreach_mul(directions, lr))


def adam_directions(
    grads: list[Tensor],
    momenta: list[Tensor],
    variances: list[Tensor],
    steps: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Element-wise Adam; momenta and variances are updated in place, with σ² in place of v for
    tied betas.

    Equals torch.optim.AdamW with the same betas and eps.

    Source: Orvieto & Gower, arXiv 2505.21829, proposition 1.
    """
    beta1, beta2 = betas
    tied = beta1 == beta2
    # σ² ← β σ² + β(1−β)(g − m)² with the old m, or v ← β₂ v + (1−β₂) g²
    sample = list(torch._foreach_sub(grads, momenta)) if tied else grads
    torch._foreach_mul_(variances, beta2)
    weight = (beta2 if tied else 1) * (1 - beta2)
    torch._foreach_addcmul_(variances, sample, sample, value=weight)
    torch._foreach_lerp_(momenta, grads, 1 - beta1)
    second = torch._foreach_mul(momenta, momenta) if tied else [v.clone() for v in variances]
    if tied:
        torch._foreach_add_(second, variances)
    directions = []
    for mean, square, step in zip(momenta, second, steps, strict=True):
        denominator = square.div_(unbias(beta2, step)).sqrt_().add_(eps)
        directions.append(mean / unbias(beta1, step) / denominator)
    return directions


def adam_step(group: dict[str, Any], grads: list[Tensor], states: list[State]) -> list[Tensor]:
    """`adam_directions` with the settings of a parameter group; advances the states in place."""
    return adam_directions(
        grads,
        [s["momentum"] for s in states],
        [s["variance"] for s in states],
        [s["step"].clamp(min=1) for s in states],
        betas=group["betas"],
        eps=group["eps"],
    )


def unbias(beta: float, step: Tensor) -> Tensor:
    """1 − βᵗ, the weight an average that started from zero has gathered after t steps.

    In float64: in float32 the difference has lost four digits at β = 0.999, t = 1.
    """
    return 1 - beta ** step.double()


def muon_directions(outputs: list[Tensor], scale: float) -> list[Tensor]:
    """msign of each matrix, of spectral norm scale·√max(m, n); a convolution counts as out ×
    (in·kh·kw).

    Source: Jordan et al., Muon, 2024; the scale is torch.optim.Muon's "match_rms_adamw".
    """
    directions = []
    for output in outputs:
        matrix = output.flatten(1)
        size = scale * max(matrix.shape) ** 0.5
        directions.append((msign(matrix) * size).reshape(output.shape))
    return directions
