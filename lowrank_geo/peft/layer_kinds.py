"""Which layer PEFT puts around one of the model: a class for linear, convolution and embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.layers import LowRankLinear
from lowrank_geo.peft.deltas import kind_of
from lowrank_geo.peft.layer import FixedRankLayer


class FixedRankLinear(FixedRankLayer):
    """Around `nn.Linear`, quantised or not, and Hugging Face's `Conv1D`."""

    def _add(self, name: str, x: Tensor, result: Tensor) -> Tensor:
        delta: Any = self.fixed_rank_delta[name]
        if name in self.fixed_rank_start or not isinstance(delta, LowRankLinear):
            return super()._add(name, x, result)
        return delta.add_to(result, self.fixed_rank_dropout[name](x), self.fixed_rank_scale[name])


class FixedRankConv2d(FixedRankLayer):
    """Around `nn.Conv2d`."""


class FixedRankEmbedding(FixedRankLayer):
    """Around `nn.Embedding`; dropout does not apply to indices."""

    def _change(self, name: str, x: Tensor, *, like: Tensor) -> Tensor:
        change = super()._change(name, x, like=like)
        scale = getattr(self.get_base_layer(), "embed_scale", None)
        return change if scale is None else change * torch.as_tensor(scale).to(change)


CLASSES: dict[str, type[FixedRankLayer]] = {
    "linear": FixedRankLinear,
    "conv1d": FixedRankLinear,
    "conv2d": FixedRankConv2d,
    "embedding": FixedRankEmbedding,
}


def layer_class(base: nn.Module) -> type[FixedRankLayer]:
    """The class for a base layer."""
    return CLASSES[kind_of(base)]
