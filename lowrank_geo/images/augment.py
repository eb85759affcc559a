"""Random changes of an image and its mask; the published ones: turn, mirror, drop patches."""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

ANGLE = 35.0  # degrees, the largest turn either way
CHANCE = 0.3  # of each change
PATCHES, SIDE = 10, 32 / 256  # at most so many squares, of this part of the image's side


def augment(image: Tensor, mask: Tensor | None, draw: Generator) -> tuple[Tensor, Tensor | None]:
    """Turn by up to 35°, mirror left to right and top to bottom, blacken squares: each with chance 0.3.

    Shapes: image (C, H, W) in [0, 1], mask (H, W) integers -> the same.
    Source: the training code of TransNetR (MIDL 2023) and PVTFormer (ISBI 2024), of the paper's authors.
    """
    if chance(draw):
        image, mask = turn(image, mask, uniform(draw, -ANGLE, ANGLE))
    for axis in (-1, -2):
        if chance(draw):
            image = image.flip(axis)
            mask = None if mask is None else mask.flip(axis)
    if chance(draw):
        image = drop(image, draw)
    return image, mask


def turn(image: Tensor, mask: Tensor | None, degrees: float) -> tuple[Tensor, Tensor | None]:
    """Rotate about the centre, counter-clockwise: the image bilinearly, the mask by the nearest pixel.

    What comes in from outside is mirrored, in the mask as in the image.
    """
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    h, w = image.shape[-2:]
    # Normalised coordinates are stretched where the image is not square.
    matrix = torch.tensor([[c, -s * h / w, 0], [s * w / h, c, 0]])
    grid = F.affine_grid(matrix[None], [1, 1, h, w], align_corners=False)

    def sample(x: Tensor, mode: str) -> Tensor:
        return F.grid_sample(x[None], grid, mode, padding_mode="reflection", align_corners=False)[0]

    turned = None if mask is None else sample(mask[None].float(), "nearest")[0].to(mask.dtype)
    return sample(image, "bilinear"), turned


def drop(image: Tensor, draw: Generator) -> Tensor:
    """Blacken up to ten squares of an eighth of the side; the mask stays, so that what is hidden is to be guessed."""
    image = image.clone()
    h, w = image.shape[-2:]
    side = max(1, round(SIDE * min(h, w)))
    for _ in range(int(torch.randint(1, PATCHES + 1, (), generator=draw))):
        y, x = (int(torch.randint(0, n - side + 1, (), generator=draw)) for n in (h, w))
        image[:, y : y + side, x : x + side] = 0
    return image


def chance(draw: Generator) -> bool:
    return bool(torch.rand((), generator=draw) < CHANCE)


def uniform(draw: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw))
