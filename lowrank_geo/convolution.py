"""Convolution with a kernel of fixed rank: `lowrank_linear` on every window of the image, without
unfolding it.

The kernel, as an out_channels × (in_channels·kh·kw) matrix, is U S Vᵀ. Gradients have the two
meanings of `lowrank_geo.gradients`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_geo.gradients import (
    GRADIENTS,
    Gradient,
    autocast,
    keep,
    no_autocast,
    once,
    refuse_forward_derivatives,
)
from lowrank_geo.reference import coordinates


class ConvGeometry(NamedTuple):
    """Which windows a convolution looks at."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom
    padding_mode: str  # as in torch.nn.functional.pad, "constant" for zeros

    @classmethod
    def of(cls, dense: nn.Conv2d) -> "ConvGeometry":
        """The windows of a `torch.nn.Conv2d`."""
        left, right, top, bottom = dense._reversed_padding_repeated_twice
        mode = "constant" if dense.padding_mode == "zeros" else dense.padding_mode
        return cls(
            (dense.kernel_size[0], dense.kernel_size[1]),
            (dense.stride[0], dense.stride[1]),
            (dense.dilation[0], dense.dilation[1]),
            (left, right, top, bottom),
            mode,
        )


def lowrank_conv2d(
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    *,
    gradient: Gradient = "factors",
) -> Tensor:
    """Convolution of x with the kernel U S Vᵀ, in the dtype of x (or of autocast); the kernel is
    never formed.

    Shapes: x (B, c, H, W) or (c, H, W), U (m, r), S (r, r), V (c·kh·kw, r), bias (m) -> (B, m,
        H', W').
    Raises: ValueError if the channels of x do not fit V, or for an unknown `gradient`.
    """
    kh, kw = geometry.kernel_size
    channels = V.shape[0] // (kh * kw)
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"lowrank_conv2d needs x of shape (B, {channels}, H, W), got {tuple(x.shape)}; "
            "check the input channels of the layer"
        )
    if gradient not in GRADIENTS:
        raise ValueError(
            f"lowrank_conv2d needs gradient 'factors' or 'tangent', got {gradient!r}; use one of them"
        )
    if x.dim() == 3:
        return lowrank_conv2d(x[None], U, S, V, bias, geometry, gradient=gradient)[0]
    x = autocast(x)
    if any(geometry.padding):
        x = F.pad(x, geometry.padding, geometry.padding_mode)
    if gradient == "tangent":
        refuse_forward_derivatives("lowrank_conv2d", x, U, S, V)
        y, _ = TangentConv2d.apply(x, U, S, V, geometry)
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]
    a = F.conv2d(x, kernel(V, x, geometry), None, geometry.stride, 0, geometry.dilation)
    left = (U.to(x.dtype) @ S.to(x.dtype))[..., None, None]
    return F.conv2d(a, left, None if bias is None else bias.to(x.dtype))


def kernel(V: Tensor, x: Tensor, geometry: ConvGeometry) -> Tensor:
    """V as the kernel of the convolution to r channels, in the dtype of x.

    Shapes: V (c·kh·kw, r), x (B, c, H, W) -> (r, c, kh, kw).
    """
    return V.to(x.dtype).mT.reshape(V.shape[1], x.shape[1], *geometry.kernel_size)


class TangentConv2d(torch.autograd.Function):
    """y and a = x ∗ V, the only activation kept besides x; backward is `tangent_gradients`.

    Shapes: x (B, c, H, W), already padded, U (m, r), S (r, r), V (c·kh·kw, r) -> y (B, m, H', W'),
        a (B, r, H', W').
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, U: Tensor, S: Tensor, V: Tensor, geometry: ConvGeometry
    ) -> tuple[Tensor, Tensor]:
        a = F.conv2d(x, kernel(V, x, geometry), None, geometry.stride, 0, geometry.dilation)
        return F.conv2d(a, (U.to(x.dtype) @ S.to(x.dtype))[..., None, None]), a

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.geometry = inputs[4]
        keep(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple:
        if g is None:
            return (None,) * 5
        x, U, S, V, a = ctx.saved_tensors
        with no_autocast(g):
            grads = tangent_gradients(
                g, x, U, S, V, a, ctx.geometry, with_x=ctx.needs_input_grad[0]
            )
        return *once("lowrank_conv2d", grads), None


def tangent_gradients(
    g: Tensor,
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    a: Tensor,
    geometry: ConvGeometry,
    *,
    with_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """∂L/∂x, if asked for, and the tangent coordinates of the Riemannian gradient.

    Shapes: g = ∂L/∂y (B, m, H', W'), x (B, c, H, W), a (B, r, H', W') -> dx, Up (m, r), M (r, r),
        Vp (n, r).
    """

    def transposed(grad: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        stride, dilation = geometry.stride, geometry.dilation
        return torch.ops.aten.convolution_backward(
            grad, x, kernel(V, x, geometry), None, stride, [0, 0], dilation, False, [0, 0], 1, mask
        )

    b = F.conv2d(g, U.to(g.dtype).mT[..., None, None])  # (B, r, H', W')
    dx = None
    if with_x:
        dx = transposed(F.conv2d(b, S.to(g.dtype).mT[..., None, None]), [True, False, False])[0]
    GtU = transposed(b, [False, True, False])[1].flatten(1).mT
    return dx, *coordinates(U, V, torch.einsum("bmhw,brhw->mr", g, a), GtU)
