"""Matrices of one shape as one batch, and back."""

import torch
from torch import Tensor


def stack(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """A batch of one without a copy, a stack of many.

    Shapes: L tensors (...) -> (L, ...).
    """
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack(list(tensors)).detach()


def store(targets: list[Tensor], batch: Tensor) -> None:
    """The parts of a batch, copied into tensors of their own: the inverse of `stack`.

    Shapes: L tensors (...), batch (L, ...).
    """
    torch._foreach_copy_(targets, list(batch.unbind()))
