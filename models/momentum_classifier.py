"""A convolutional classifier whose stages are momentum residual stacks."""

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_geo.models.checks import check_images, check_sizes
from lowrank_geo.models.momentum import Mode
from lowrank_geo.models.residual import SLOPE, Coarsen, Momentum, reset_convolutions, stage


class MomentumClassifier(nn.Module):
    """Class scores of images of any size, halved `depth` times while the channels double from `width`.

    Every size has a stage of `blocks` momentum steps; γ = 0 is the plain residual network.

    Shapes: images (B, in_channels, H, W), sides at least 2^depth -> (B, classes).
    Raises: ValueError for sizes below 1, a γ outside [0, 1), γ = 0 in reversible mode, images of other channels
        or too small.
    Source: Biswas et al., arXiv 2408.05692; Sander et al., arXiv 2102.07870.

    >>> import torch
    >>> MomentumClassifier(in_channels=1, classes=10, width=4)(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        width: int = 32,
        depth: int = 2,
        blocks: int = 3,
        gamma: float = 0.9,
        mode: Mode = "backprop",
    ) -> None:
        super().__init__()
        check_sizes(
            "MomentumClassifier",
            in_channels=in_channels, classes=classes, width=width, depth=depth, blocks=blocks,
        )  # fmt: skip
        self.in_channels, self.depth = in_channels, depth
        momentum = Momentum(gamma, mode)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
        layers.append(stage(width, blocks, momentum))
        for level in range(depth):
            layers.append(Coarsen(width * 2**level, width * 2 ** (level + 1)))
            layers.append(stage(width * 2 ** (level + 1), blocks, momentum))
        self.body = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width * 2**depth)
        self.head = nn.Linear(width * 2**depth, classes)
        reset_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        check_images("MomentumClassifier", images, self.in_channels, smallest=2**self.depth)
        x = F.leaky_relu(self.norm(self.body(images)), SLOPE)
        return self.head(x.mean(dim=(2, 3)))
