"""Any torch optimizer on LoRA adapters, with gradients scaled by the inverse Gram matrices of the other factor."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo.optim.groups import by_shape
from lowrank_geo.optim.lora_pairs import lora_factors
from lowrank_geo.optim.stacks import stack, store
from lowrank_geo.precision import full_precision

LOOPS = {"fused", "foreach", "differentiable"}  # torch takes one of them at most
FUSED = {"cpu", "cuda"}


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

    Args: settings: of the optimizer; fused=True if torch has it and nothing else is asked for.
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
    settings = fused(optimizer_cls, trained, settings) | settings
    optimizer: Optimizer = optimizer_cls(trained, lr=lr, **settings)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(partial(before_step, pairs, reg))
    return optimizer


def fused(
    optimizer_cls: type[Optimizer], parameters: list[nn.Parameter], settings: dict[str, Any]
) -> dict[str, Any]:
    """The setting with which torch's own optimizers make a step in one pass over memory, where they can and nothing
    else is asked for.
    """
    has = "fused" in inspect.signature(optimizer_cls).parameters and not settings.keys() & LOOPS
    return {"fused": True} if has and all(p.device.type in FUSED for p in parameters) else {}


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
@full_precision()
def scale_gradients(pairs: list[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
    """∂L/∂A ← (BᵀB + reg I)⁻¹ ∂L/∂A and ∂L/∂B ← ∂L/∂B (AAᵀ + reg I)⁻¹ in place, computed in float32 or better.

    Shapes: B (m, r), A (r, n), any of them in one call; those of one shape are one batch.
    """
    for bucket in by_shape(pairs):
        downs = [(A.grad, B) for B, A in bucket if A.grad is not None]
        if downs:
            gradients, others = map(list, zip(*downs, strict=True))
            store(gradients, inverse_gram(wide_stack(others).mT, reg) @ wide_stack(gradients))
        ups = [(B.grad, A) for B, A in bucket if B.grad is not None]
        if ups:
            gradients, others = map(list, zip(*ups, strict=True))
            store(gradients, wide_stack(gradients) @ inverse_gram(wide_stack(others), reg))


def wide_stack(tensors: list[Tensor]) -> Tensor:
    """A batch in float32 at least.

    Shapes: L tensors (...) -> (L, ...).
    """
    batch = stack(tensors)
    return batch.to(torch.promote_types(batch.dtype, torch.float32))


def inverse_gram(F: Tensor, reg: float) -> Tensor:
    """(F Fᵀ + reg I)⁻¹.

    Shapes: (L, r, k) -> (L, r, r).
    """
    identity = torch.eye(F.shape[-2], dtype=F.dtype, device=F.device)
    L, _ = torch.linalg.cholesky_ex(F @ F.mT + reg * identity)
    return torch.cholesky_inverse(L)
