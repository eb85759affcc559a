"""Rotary position embedding: every head turns its pairs of coordinates by an angle linear in the position.

Queries and keys turned so have inner products that depend on the difference of their positions only.
Coordinate i is paired with coordinate i + d/2, as in LLaMA.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """The angles of a run of consecutive positions, in float32 or better."""

    cos: Tensor  # (T, d / 2)
    sin: Tensor  # (T, d / 2)


def rotation(start: int, length: int, width: int, *, theta: float, like: Tensor) -> Rotation:
    """The rotation of the positions start .. start + length - 1 for heads of `width` coordinates.

    It is computed in every forward pass: as a buffer it would lose its precision in `model.bfloat16()`
    and its values between `meta` and a real device, and it costs less than one row of the model.

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2.2.

    >>> rotation(0, 5, 8, theta=10000.0, like=torch.zeros(1)).cos.shape
    torch.Size([5, 4])
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, width, 2, dtype=dtype, device=like.device) / width
    position = torch.arange(start, start + length, dtype=dtype, device=like.device)
    angle = position[:, None] * theta**-exponent
    return Rotation(angle.cos(), angle.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x with every pair of coordinates turned by its angle, in the dtype of x.

    Shapes: x (..., T, d), rotation over T positions -> (..., T, d).
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)
