"""The change of one layer as a module: a low-rank layer whose weight is ΔW, or several for blocks of rows.

ΔW is m × n with m outputs and n inputs, whatever the layout of the layer that it is added to.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.geometry import Point
from lowrank_geo.geometry import to_dense as dense
from lowrank_geo.layers import LowRankLinear
from lowrank_geo.lookup import lowrank_embedding
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.peft.blocks import Blocks


class LowRankEmbedding(LowRankLayer):
    """A table of n rows with m entries, Wᵀ = (U S Vᵀ)ᵀ; rows at `padding_idx` get no gradient.

    Shapes: indices (...) -> (..., m); U (m, r), S (r, r), V (n, r).
    """

    def __init__(self, point: Point, padding_idx: int | None = None) -> None:
        super().__init__(point, None)
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        y = lowrank_embedding(indices, *self.point, gradient=self._gradient)
        if self.padding_idx is None or not torch.is_grad_enabled():
            return y
        return torch.where((indices == self.padding_idx)[..., None], y.detach(), y)


class LowRankBlocks(nn.Module):
    """A linear layer whose blocks of rows have factors of their own.

    Shapes: x (..., n) -> (..., m).
    """

    def __init__(self, layers: Sequence[LowRankLinear], blocks: Blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)
        self.pattern = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.pattern.join(torch.stack([layer(x) for layer in self.blocks]))


Delta = LowRankLinear | LowRankConv2d | LowRankEmbedding | LowRankBlocks


def layers_of(delta: nn.Module) -> list[LowRankLayer]:
    """The triples of a change, in the order of its blocks."""
    return [module for module in delta.modules() if isinstance(module, LowRankLayer)]


def kind_of(base: Any) -> str:
    """How a layer stores its weight: "linear" (m, n), "conv1d" and "embedding" (n, m), "conv2d" (m, c, kh, kw)."""
    if isinstance(base, nn.Embedding):
        return "embedding"
    if isinstance(base, nn.Conv2d):
        return "conv2d"
    return "conv1d" if type(base).__name__ == "Conv1D" else "linear"


def sizes_of(base: Any) -> tuple[int, int]:
    """(m, n) of the weight of a layer as a matrix; of its declared features where the weight is packed.

    Raises: TypeError for a layer that has neither.
    """
    kind = kind_of(base)
    if kind == "embedding":
        return base.embedding_dim, base.num_embeddings
    if kind == "conv2d":
        kh, kw = base.kernel_size
        return base.out_channels, base.in_channels // base.groups * kh * kw
    if kind == "conv1d":
        n, m = base.weight.shape
        return m, n
    if hasattr(base, "in_features") and hasattr(base, "out_features"):
        return base.out_features, base.in_features
    raise TypeError(
        f"Target module {base} is not supported. Currently, only `torch.nn.Linear` (optionally quantized), "
        "`torch.nn.Embedding`, `torch.nn.Conv2d` and `transformers.pytorch_utils.Conv1D` are supported."
    )


def to_matrix(weight: Tensor, base: Any) -> Tensor:
    """The weight of a layer as a matrix.

    Shapes: in the layout of `kind_of` -> (m, n).
    """
    kind = kind_of(base)
    return (
        weight.mT
        if kind in ("conv1d", "embedding")
        else weight.flatten(1)
        if kind == "conv2d"
        else weight
    )


def to_layout(matrix: Tensor, base: Any) -> Tensor:
    """A matrix in the layout of the layer's weight; the inverse of `to_matrix`.

    Shapes: (m, n) -> in the layout of `kind_of`.
    """
    kind = kind_of(base)
    if kind == "conv2d":
        return matrix.reshape(base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return matrix.mT if kind in ("conv1d", "embedding") else matrix


def make_delta(base: Any, points: Sequence[Point], blocks: Blocks | None) -> Delta:
    """The module that adds the given change to a layer.

    Raises: ValueError for a grouped convolution.
    """
    if blocks is not None:
        return LowRankBlocks([LowRankLinear.from_point(point) for point in points], blocks)
    (point,) = points
    kind = kind_of(base)
    if kind == "embedding":
        return LowRankEmbedding(point, base.padding_idx)
    if kind == "conv2d":
        return LowRankConv2d.from_point(point, base)
    return LowRankLinear.from_point(point)


@torch.no_grad()
def matrix_of(delta: nn.Module) -> Tensor:
    """ΔW.

    Shapes: -> (m, n).
    """
    found = torch.stack([dense(layer.point) for layer in layers_of(delta)])
    return delta.pattern.join_rows(found) if isinstance(delta, LowRankBlocks) else found[0]


@torch.no_grad()
def factors_of(delta: nn.Module) -> tuple[Tensor, Tensor]:
    """B and A with B A = ΔW; for b blocks of rank r the rank of the product is b r.

    Shapes: -> B (m, R), A (R, n).
    """
    layers = layers_of(delta)
    lefts = [layer.U @ layer.S for layer in layers]
    A = torch.cat([layer.V for layer in layers], 1).mT.contiguous()
    if not isinstance(delta, LowRankBlocks):
        return lefts[0], A
    rows = torch.zeros(len(layers), lefts[0].shape[0], A.shape[0], dtype=A.dtype, device=A.device)
    at = 0
    for index, left in enumerate(lefts):
        rows[index, :, at : at + left.shape[1]] = left
        at += left.shape[1]
    return delta.pattern.join_rows(rows), A


def split_rows(W: Tensor, blocks: Blocks | None) -> list[Tensor]:
    """A matrix, or its blocks of rows.

    Shapes: (m, n) -> [(m, n)] or b times (m / b, n).
    """
    return [W] if blocks is None else list(blocks.split_rows(W))
