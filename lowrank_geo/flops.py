"""Operation counts of the layers' operators, for `torch.utils.flop_counter.FlopCounterMode`; importing this registers
them.

Two operations per multiply-add, as torch counts, with the association that `lowrank_geo.functional.fold` picks.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# The operators exist once these are imported.
from lowrank_geo import convolution, functional  # noqa: F401

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.lowrank_geo.tangent_linear)
def tangent_linear_flops(x: Shape, U: Shape, S: Shape, V: Shape, **_: Any) -> int:
    """a = x V, then a Sᵀ Uᵀ.

    Shapes: x (B, n), U (m, r), S (r, r), V (n, r).
    """
    B, (m, r), n = x[0], U, V[0]
    return 2 * (B * r * (m + n) + r * r * min(B, m))


@register_flop_formula(torch.ops.lowrank_geo.tangent_linear_backward, get_raw=True)
def tangent_linear_backward_flops(
    g: Tensor, x: Tensor, a: Tensor, U: Tensor, S: Tensor, V: Tensor, **_: Any
) -> int:
    """b = g U, dx = b S Vᵀ, gᵀa, xᵀb, and the r×r products of the gauge: one more in low precision.

    Shapes: g (B, m), x (B, n), a (B, r), U (m, r), S (r, r), V (n, r).
    """
    B, (m, r), n = g.shape[0], U.shape, V.shape[0]
    gauge = 2 * m + (n if g.dtype == U.dtype else 2 * n)
    return 2 * (2 * B * r * (m + n) + r * r * (min(B, n) + gauge))


@register_flop_formula(torch.ops.lowrank_geo.tangent_conv2d)
def tangent_conv2d_flops(
    x: Shape, U: Shape, S: Shape, V: Shape, *_: Any, out_shape: tuple[Shape, Shape]
) -> int:
    """A convolution to r channels, U S, and a pointwise convolution.

    Shapes: U (m, r), S (r, r), V (n, r), out_shape those of y (B, m, H', W') and a.
    """
    (m, r), n = U, V[0]
    return 2 * (output_windows(out_shape[0]) * r * (m + n) + r * r * m)


@register_flop_formula(torch.ops.lowrank_geo.tangent_conv2d_backward)
def tangent_conv2d_backward_flops(
    g: Shape, x: Shape, a: Shape, U: Shape, S: Shape, V: Shape, *_: Any, **__: Any
) -> int:
    """b = g U, b S, the transposed convolution, both weight gradients, and the gauge.

    Shapes: g (B, m, H', W'), U (m, r), S (r, r), V (n, r).
    """
    (m, r), n, windows = U, V[0], output_windows(g)
    return 2 * (2 * windows * r * (m + n) + r * r * (windows + 2 * m + 2 * n))


def output_windows(shape: Shape) -> int:
    """Number of output positions over the batch.

    Shapes: (B, m, H', W').
    """
    return shape[0] * prod(shape[2:])
