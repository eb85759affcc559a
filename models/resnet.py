"""The small residual networks for 32×32 images: three stages of 3×3 convolutions, depth 6n + 2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_geo.models.checks import check_images, check_sizes


class Block(nn.Module):
    """Two convolutions added to the input, which is subsampled and zero-padded to their shape.

    The shortcut has no parameters (option A of the paper).
    """

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, channels - width
        self.conv1 = nn.Conv2d(width, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (B, width, H, W) -> (B, channels, H / stride, W / stride), rounded up."""
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        before = self.padding // 2
        after = self.padding - before
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))
        return torch.relu(shortcut + y)


class ResNet(nn.Module):
    """Class scores of small images of any size; `width` is the number of channels of the first stage.

    Shapes: images (B, channels, H, W) -> (B, classes).
    Raises: ValueError if depth is not 6n + 2, and for images of other channels or of a side below 4.
    Source: He et al., arXiv 1512.03385, section 4.2.

    >>> ResNet(20)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, depth: int = 20, *, classes: int = 10, channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        check_sizes("ResNet", depth=depth, classes=classes, channels=channels, width=width)
        if depth < 8 or depth % 6 != 2:
            raise ValueError(
                f"ResNet needs a depth of 6n + 2 such as 20, 32, 44 or 56, got {depth}; use one of them"
            )
        self.channels = channels
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks: list[Block] = []
        for stage in range(3):
            for index in range((depth - 2) // 6):
                first = stage > 0 and index == 0
                out = width * 2**stage
                blocks.append(Block(out // 2 if first else out, out, stride=2 if first else 1))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(width * 4, classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights anew: they keep the variance through ReLU (He et al., 2015)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        check_images("ResNet", images, self.channels, smallest=4)
        x = torch.relu(self.norm(self.conv(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))
