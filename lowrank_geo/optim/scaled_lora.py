"""Any torch optimizer on LoRA adapters, with gradients scaled by the inverse Gram matrices of the other factor."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo.optim.lora_pairs import lora_factors


def scaled_lora(
    model: nn.Module,
    optimizer_cls: type[Optimizer] = torch.optim.AdamW,
    *,
    lr: float | Tensor,
    reg: float = 1e-2,
    **settings: Any,
) -> Optimizer:
    """`optimizer_cls` on all that a model trains, where LoRA's ∂L/∂A is (BᵀB + reg I)⁻¹ ∂L/∂A and ∂L/∂B is
    ∂L/∂B (AAᵀ + reg I)⁻¹.

    What PEFT's create_riemannian_optimizer computes, with one batched Cholesky factorisation of all r×r matrices in
    place of a pseudo-inverse of each: on a GPU without a wait. It is the metric without the manifold: no momentum is
    carried along and nothing is retracted, as in `LoRAPreconditioned`. Gradients are scaled in place by each step.

    Args: settings: of the optimizer.
    Raises: ValueError for a model without trained pairs, unless reg > 0, and in steps with a closure, which would
        compute the gradients again.
    Source: Zhang & Pilanci, Riemannian preconditioned LoRA, ICML 2024 (arXiv 2402.02347).
    """
    if not reg > 0:
        raise ValueError(
            f"scaled_lora needs reg > 0, got {reg}; pass e.g. 1e-2: B starts at 0, whose Gram matrix has no inverse"
        )
    pairs = [(found.B, found.A) for found in lora_factors(model)]
    if not pairs:
        raise ValueError(
            "scaled_lora needs a model with trained lora_A and lora_B matrices, got none; wrap it with "
            "peft.get_peft_model and a LoraConfig"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Optimizer = optimizer_cls(trained, lr=lr, **settings)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(partial(before_step, pairs, reg))
    return optimizer


def before_step(
    pairs: list[tuple[nn.Parameter, nn.Parameter]],
    reg: float,
    optimizer: Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Scale the gradients that a step is about to read."""
    if args[1:] or kwargs.get("closure") is not None:
        raise ValueError(
            "scaled_lora takes steps without a closure, got one, which would compute the gradients again after "
            "they are scaled; call backward before the step"
        )
    scale_gradients(pairs, reg)


@torch.no_grad()
def scale_gradients(pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
    """∂L/∂A ← (BᵀB + reg I)⁻¹ ∂L/∂A and ∂L/∂B ← ∂L/∂B (AAᵀ + reg I)⁻¹ in place, computed in float32 or better.

    Shapes: B (m, r), A (r, n), any of them in one call.
    """
    # The rows of both are of length r: Bᵀ and A, whose other factor's gradient is A's and Bᵀ's.
    sides = [(B.detach().mT, A.grad) for B, A in pairs if A.grad is not None]
    sides += [(A.detach(), B.grad.mT) for B, A in pairs if B.grad is not None]
    for factors, gradients in by_rank(sides):
        inverses = inverse(torch.stack([F @ F.mT for F in map(widened, factors)]), reg)
        for gradient, P in zip(gradients, inverses, strict=True):
            gradient.copy_(P @ widened(gradient))


def by_rank(
    sides: list[tuple[Tensor, Tensor]],
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Factors and gradients with r rows, by r, dtype and device."""
    buckets: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for factor, gradient in sides:
        buckets.setdefault((len(factor), factor.dtype, factor.device), []).append(
            (factor, gradient)
        )
    for bucket in buckets.values():
        yield [factor for factor, _ in bucket], [gradient for _, gradient in bucket]


def widened(X: Tensor) -> Tensor:
    """X in float32 at least."""
    return X.to(torch.promote_types(X.dtype, torch.float32))


def inverse(G: Tensor, reg: float) -> Tensor:
    """(G + reg I)⁻¹ of Gram matrices.

    Shapes: (L, r, r) -> (L, r, r).
    """
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L, _ = torch.linalg.cholesky_ex(G + reg * identity)
    return torch.cholesky_inverse(L)
