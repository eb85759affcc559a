"""The parts of momentum networks for images: residual branches, layers that resize, stages of them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_geo.models.momentum import Mode, MomentumStack

SLOPE = 0.1  # of LeakyReLU below zero, as in TransNetR


class Momentum(NamedTuple):
    """How the branches of every stage are combined."""

    gamma: float
    mode: Mode


class Branch(nn.Sequential):
    """f(x) of a residual block: norm, LeakyReLU, 3×3 convolution, twice; nothing follows the sum x + v.

    Shapes: x (B, width, H, W), kept.
    Source: He et al., arXiv 1603.05027, the arrangement of figure 4 (e).
    """

    def __init__(self, width: int) -> None:
        super().__init__(*_activated(width, width, 3, 1), *_activated(width, width, 3, 1))


class Coarsen(nn.Sequential):
    """Half the sides, rounded up, at other channels; it changes the shape, so it stands between two stacks.

    Shapes: x (B, width, H, W) -> (B, channels, H / 2, W / 2).
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(*_activated(width, channels, 3, 2))


class Refine(nn.Module):
    """An image at the size and number of channels of a finer one, whose content it takes over.

    Shapes: x (B, width, H, W), skip (B, channels, H', W') -> (B, channels, H', W').
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.merge = nn.Sequential(*_activated(width + channels, channels, 3, 1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.merge(torch.cat([x, skip], dim=1))


def stage(width: int, blocks: int, momentum: Momentum) -> MomentumStack:
    return MomentumStack([Branch(width) for _ in range(blocks)], momentum.gamma, mode=momentum.mode)


def out(width: int, classes: int) -> nn.Sequential:
    """Scores of every pixel, as a 1×1 convolution of the normalised stream."""
    return nn.Sequential(*_activated(width, classes, 1, 1, bias=True))


@torch.no_grad()
def reset_convolutions(model: nn.Module) -> None:
    """Draw the initial kernels anew: they keep the variance through LeakyReLU (He et al., 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE, nonlinearity="leaky_relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _activated(
    width: int, channels: int, side: int, stride: int, *, bias: bool = False
) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(width, channels, side, stride, padding=side // 2, bias=bias)
    return nn.BatchNorm2d(width), nn.LeakyReLU(SLOPE), convolution
