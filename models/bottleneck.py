"""A residual transformer on patches of an image of features."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lowrank_geo.models.checks import check_heads, check_sizes
from lowrank_geo.models.momentum import MomentumStack
from lowrank_geo.models.residual import Momentum
from lowrank_geo.models.vit import Attention, FeedForward


class ResidualTransformer(nn.Module):
    """The image plus what attention over its patches makes of it; attention and MLPs are steps with momentum.

    There are no positions, so that every size fits; sides are padded with zeros to whole patches.

    Shapes: x (B, width, H, W), kept.
    Raises: ValueError for a width that the heads cannot share.
    Source: Jha et al., TransNetR, arXiv 2303.07428: patches of 4, 4 heads, 2 layers.

    >>> import torch
    >>> ResidualTransformer(8, Momentum(0.9, "backprop"))(torch.zeros(2, 8, 6, 5)).shape
    torch.Size([2, 8, 6, 5])
    """

    def __init__(
        self, width: int, momentum: Momentum, *, patch: int = 4, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        check_sizes("ResidualTransformer", width=width, patch=patch, heads=heads, layers=layers)
        check_heads("ResidualTransformer", width, heads)
        self.patch = patch
        self.embed = nn.Linear(width * patch**2, width)
        self.steps = MomentumStack(
            [
                nn.Sequential(nn.LayerNorm(width), part)
                for _ in range(layers)
                for part in (Attention(width, heads), FeedForward(width, 2 * width))
            ],
            momentum.gamma,
            mode=momentum.mode,
        )
        self.norm = nn.LayerNorm(width)
        self.back = nn.Linear(width, width * patch**2)

    def forward(self, x: Tensor) -> Tensor:
        side, (H, W) = self.patch, x.shape[-2:]
        padded = F.pad(x, (0, -W % side, 0, -H % side))
        rows = padded.shape[-2] // side
        tokens = rearrange(padded, "b c (row i) (col j) -> b (row col) (c i j)", i=side, j=side)
        y = self.back(self.norm(self.steps(self.embed(tokens))))
        whole = rearrange(y, "b (row col) (c i j) -> b c (row i) (col j)", row=rows, i=side, j=side)
        return x + whole[..., :H, :W]
