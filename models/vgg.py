"""VGG-11 and VGG-16, with parameters named and shaped as torchvision's, so that its checkpoints load."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.models.checks import check_fields, check_images

STAGES = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3)}  # convolutions before each of five poolings
CHANNELS = (64, 128, 256, 512, 512)


@dataclass(frozen=True)
class VGGConfig:
    """The sizes of a `VGG`; the defaults are torchvision's, for images of 224×224.

    For 32×32 take `pool=1, hidden=512`: the features of such an image are 1×1, and a wider classifier would
    read copies of them.

    Raises: TypeError or ValueError for sizes that make no model.
    """

    depth: int = 16
    classes: int = 10
    channels: int = 3
    batch_norm: bool = False
    pool: int = 7  # side of the features that the classifier reads
    hidden: int = 4096  # width inside the classifier
    dropout: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.depth not in STAGES:
            raise ValueError(f"VGGConfig needs depth 11 or 16, got {self.depth}; use one of them")
        if self.dropout >= 1:
            raise ValueError(
                f"VGGConfig needs dropout below 1, got {self.dropout}; 0.5 is usual, 0 turns it off"
            )


class VGG(nn.Module):
    """Class scores of images of any size from 32×32.

    Shapes: images (B, channels, H, W) -> (B, classes).
    Raises: ValueError for images of other channels or of a side below 32.
    Source: Simonyan and Zisserman, arXiv 1409.1556, table 1, columns A and D.

    >>> VGG(VGGConfig(depth=11, pool=1, hidden=16)).eval()(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """

    def __init__(self, config: VGGConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VGGConfig()
        self.features = nn.Sequential(*feature_layers(config))
        self.avgpool = nn.AdaptiveAvgPool2d(config.pool)
        self.classifier = nn.Sequential(
            nn.Linear(CHANNELS[-1] * config.pool**2, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.classes),
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights anew: they keep the variance through ReLU (He et al., 2015)."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        check_images("VGG", images, self.config.channels, smallest=32)
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def feature_layers(config: VGGConfig) -> list[nn.Module]:
    """The convolutions, each with ReLU, and the five poolings, in order.

    Convolutions keep their bias under batch norm, which cancels it, as torchvision's checkpoints have it.
    """
    layers: list[nn.Module] = []
    width = config.channels
    for count, channels in zip(STAGES[config.depth], CHANNELS, strict=True):
        for _ in range(count):
            layers.append(nn.Conv2d(width, channels, 3, padding=1))
            if config.batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers.append(nn.ReLU())
            width = channels
        layers.append(nn.MaxPool2d(2))
    return layers


def vgg11(**sizes: Any) -> VGG:
    """VGG-11; `sizes` are the other fields of `VGGConfig`."""
    return VGG(VGGConfig(depth=11, **sizes))


def vgg16(**sizes: Any) -> VGG:
    """VGG-16; `sizes` are the other fields of `VGGConfig`.

    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in vgg16(classes=10).parameters())
    134301514
    """
    return VGG(VGGConfig(depth=16, **sizes))
