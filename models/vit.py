"""A small vision transformer: patches, learned positions, pre-norm blocks, mean pooling.

Its attention is written out, because `nn.MultiheadAttention` hides its weights from `lowrank_geo.convert`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lowrank_geo.models.checks import check_fields, check_heads, check_images


@dataclass(frozen=True)
class ViTConfig:
    """The sizes of a `ViT`; the defaults fit CIFAR.

    Raises: TypeError or ValueError for sizes that make no model.
    """

    image_size: int = 32  # side of the square images
    patch: int = 4  # side of a patch
    channels: int = 3
    classes: int = 10
    width: int = 192
    layers: int = 6
    heads: int = 3
    hidden: int = 768  # width inside the MLP

    def __post_init__(self) -> None:
        check_fields(self)
        check_heads("ViTConfig", self.width, self.heads)
        if self.image_size % self.patch:
            raise ValueError(
                "ViTConfig needs an image_size divisible by patch, got "
                f"{self.image_size} and {self.patch}; change one of them"
            )


class Attention(nn.Module):
    """Self-attention over all patches.

    The keys have no bias, because softmax cancels it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (B, T, width) -> (B, T, width)."""
        Q, K, V = (
            rearrange(project(x), "b t (h d) -> b h t d", h=self.heads)
            for project in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(Q, K, V)
        return self.o(rearrange(y, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    """down(gelu(up x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised copy of the stream and added to it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = FeedForward(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Class scores of square images of one fixed size.

    Shapes: images (B, channels, image_size, image_size) -> (B, classes).
    Source: Dosovitskiy et al., arXiv 2010.11929; mean pooling as in Beyer et al., arXiv 2205.01580.

    >>> ViT(ViTConfig(image_size=8, width=16, layers=1, heads=2, hidden=32))(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: ViTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ViTConfig()
        patches = (config.image_size // config.patch) ** 2
        self.embed = nn.Linear(config.channels * config.patch**2, config.width)
        self.position = nn.Parameter(torch.empty(patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights anew.

        Entries of a weight have variance 1 / in_features, divided by 2 layers where a block writes to the
        stream; biases are zero.
        """
        nn.init.normal_(self.position, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                writes = name.endswith((".o", ".down"))
                branches = 2 * self.config.layers if writes else 1
                nn.init.normal_(module.weight, std=(module.in_features * branches) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        check_images("ViT", images, self.config.channels, exactly=self.config.image_size)
        side = self.config.patch
        patches = rearrange(
            images, "b c (row i) (col j) -> b (row col) (c i j)", i=side, j=side
        )  # (B, T, channels · patch²)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
