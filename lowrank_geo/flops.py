"""Multiply-add counts of the layers' operators, for `torch.utils.flop_counter.FlopCounterMode`.

Formulas count two operations per multiply-add, as torch does, with the association that `lowrank_geo.functional.fold`
picks.
"""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.lowrank_geo.tangent_linear)
def tangent_linear_flops(x: Shape, U: Shape, S: Shape, V: Shape, *_: Any, **__: Any) -> int:
    """a = x V, then a Sᵀ Uᵀ."""
    B, (m, r), n = x[0], U, V[0]
    return 2 * (B * r * (m + n) + r * r * min(B, m))


@register_flop_formula(torch.ops.lowrank_geo.tangent_linear_backward)
def tangent_linear_backward_flops(
    g: Shape, x: Shape, a: Shape, U: Shape, S: Shape, V: Shape, *_: Any, **__: Any
) -> int:
    """b = g U, dx = b S Vᵀ, gᵀa, xᵀb, and the r×r products of the gauge."""
    B, (m, r), n = g[0], U, V[0]
    return 2 * (2 * B * r * (m + n) + r * r * (min(B, n) + 2 * m + n))


@register_flop_formula(torch.ops.lowrank_geo.tangent_conv2d)
def tangent_conv2d_flops(
    x: Shape, U: Shape, S: Shape, V: Shape, *_: Any, out_val: Any = None, **__: Any
) -> int:
    """A convolution to r channels, U S, and a pointwise convolution."""
    (m, r), n = U, V[0]
    windows = output_windows(out_val)
    return 2 * (windows * r * (m + n) + r * r * m)


@register_flop_formula(torch.ops.lowrank_geo.tangent_conv2d_backward)
def tangent_conv2d_backward_flops(
    g: Shape, x: Shape, a: Shape, U: Shape, S: Shape, V: Shape, *_: Any, **__: Any
) -> int:
    """b = g U, b S, the transposed convolution, both weight gradients, and the gauge."""
    (m, r), n = U, V[0]
    windows = g[0] * prod(g[2:])
    return 2 * (2 * windows * r * (m + n) + r * r * (windows + 2 * m + n))


def output_windows(outputs: Any) -> int:
    """Number of output positions over the batch."""
    y = outputs[0]
    return y.shape[0] * prod(y.shape[2:])
