"""A U-shaped network for segmentation whose stages are momentum residual stacks."""

from typing import Literal

from torch import Tensor, nn

from lowrank_geo.models.bottleneck import ResidualTransformer
from lowrank_geo.models.checks import check_images, check_sizes
from lowrank_geo.models.momentum import Mode
from lowrank_geo.models.residual import Coarsen, Momentum, Refine, out, reset_convolutions, stage

Bottleneck = Literal["convolution", "transformer"]


class MomentumUNet(nn.Module):
    """Class scores of every pixel; the image is halved `depth` times while the channels double from `width`.

    Every size has a stage of `blocks` momentum steps on the way down and one on the way up, joined by a skip
    connection. γ = 0 is the plain residual network. `bottleneck="transformer"` adds a `ResidualTransformer`
    after the coarsest stage.

    Shapes: images (B, in_channels, H, W), sides at least 2^depth -> (B, classes, H, W).
    Raises: ValueError for sizes below 1, a γ outside [0, 1), γ = 0 in reversible mode, images of other channels
        or too small.
    Source: Biswas et al., arXiv 2408.05692, which does not publish its architecture; ours is the smallest that
        fits its text.

    >>> import torch
    >>> net = MomentumUNet(in_channels=1, classes=2, width=4, depth=2, blocks=1)
    >>> net(torch.zeros(3, 1, 16, 20)).shape
    torch.Size([3, 2, 16, 20])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        width: int = 32,
        depth: int = 4,
        blocks: int = 3,
        gamma: float = 0.9,
        mode: Mode = "backprop",
        *,
        bottleneck: Bottleneck = "convolution",
    ) -> None:
        super().__init__()
        check_sizes(
            "MomentumUNet", in_channels=in_channels, classes=classes, width=width, depth=depth, blocks=blocks
        )  # fmt: skip
        if bottleneck not in ("convolution", "transformer"):
            raise ValueError(
                'MomentumUNet needs bottleneck "convolution" or "transformer", '
                f"got {bottleneck!r}; use one of them"
            )
        self.in_channels, self.depth = in_channels, depth
        momentum = Momentum(gamma, mode)
        widths = [width * 2**level for level in range(depth + 1)]
        fine_to_coarse = list(zip(widths[:-1], widths[1:], strict=True))
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList(stage(w, blocks, momentum) for w in widths)
        self.coarsen = nn.ModuleList(Coarsen(fine, coarse) for fine, coarse in fine_to_coarse)
        self.refine = nn.ModuleList(Refine(coarse, fine) for fine, coarse in fine_to_coarse[::-1])
        self.up = nn.ModuleList(stage(w, blocks, momentum) for w in widths[-2::-1])
        reset_convolutions(self)
        self.bottleneck = (
            ResidualTransformer(widths[-1], momentum)
            if bottleneck == "transformer"
            else nn.Identity()
        )
        self.head = out(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        check_images("MomentumUNet", images, self.in_channels, smallest=2**self.depth)
        x, skips = self.down[0](self.stem(images)), []
        for coarsen, steps in zip(self.coarsen, self.down[1:], strict=True):
            skips.append(x)
            x = steps(coarsen(x))
        x = self.bottleneck(x)
        for refine, steps in zip(self.refine, self.up, strict=True):
            x = steps(refine(x, skips.pop()))
        return self.head(x)
