"""Rows of Wᵀ = V Sᵀ Uᵀ for given indices, or all of them: an embedding whose table is of fixed rank.

A lookup is a linear layer on one-hot inputs x, so a = x V is V[indices] and xᵀ b adds the rows of b up by index.
Gradients have the two meanings of `lowrank_geo.gradients`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_geo.gradients import (
    GRADIENTS,
    Gradient,
    no_autocast,
    once,
    refuse_forward_derivatives,
)
from lowrank_geo.reference import coordinates, fold


def lowrank_embedding(
    indices: Tensor | None, U: Tensor, S: Tensor, V: Tensor, *, gradient: Gradient = "factors"
) -> Tensor:
    """(U S Vᵀ)ᵀ at the rows `indices`, all of them in order for None, in the dtype of the factors.

    Shapes: indices (...) of integers below n, U (m, r), S (r, r), V (n, r) -> (..., m), or (n, m) for None.
    Raises: ValueError for an unknown `gradient`.
    """
    if gradient not in GRADIENTS:
        raise ValueError(
            f"lowrank_embedding needs gradient 'factors' or 'tangent', got {gradient!r}; use one of them"
        )
    if gradient == "tangent":
        refuse_forward_derivatives("lowrank_embedding", U, S, V)
        rows = None if indices is None else indices.flatten()
        y = TangentLookup.apply(rows, U, S, V)
        return y if indices is None else y.reshape(*indices.shape, U.shape[0])
    a = V if indices is None else F.embedding(indices, V)
    left, right = fold(a.numel() // V.shape[1], U, S)
    return F.linear(a if right is None else a @ right, left)


class TangentLookup(torch.autograd.Function):
    """The rows; backward is `coordinates` of G V = gᵀ V[indices] and Gᵀ U.

    Shapes: indices (B) or None, U (m, r), S (r, r), V (n, r) -> (B, m) or (n, m).
    """

    @staticmethod
    def forward(indices: Tensor | None, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        a = V if indices is None else V[indices]
        left, right = fold(a.shape[0], U, S)
        return (a if right is None else a @ right) @ left.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        indices, U, S, V = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(indices, U, V)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple:
        if g is None:
            return (None,) * 4
        indices, U, V = ctx.saved_tensors
        with no_autocast(g):
            GtU = g @ U.to(g.dtype)  # (B, r)
            a = V if indices is None else V[indices]
            if indices is not None:
                GtU = GtU.new_zeros(V.shape).index_add_(0, indices, GtU)
            Up, M, Vp = coordinates(U, V, g.mT @ a.to(g.dtype), GtU)
        return once("lowrank_embedding", (None, Up, M, Vp))
