"""Convolution with a kernel of fixed rank: `lowrank_linear` on every window of the image, without
unfolding it.

The kernel, as an out_channels × (in_channels·kh·kw) matrix, is U S Vᵀ. Gradients have the two
meanings of `lowrank_geo.functional`.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_geo.functional import (
    GRADIENTS,
    Gradient,
    autocast,
    refuse_double_backward,
    refuse_forward_derivatives,
)


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
    stride, dilation = list(geometry.stride), list(geometry.dilation)
    if gradient == "tangent":
        refuse_forward_derivatives("lowrank_conv2d", x, U, S, V)
        y = tangent_conv2d(x, U, S, V, [kh, kw], stride, dilation)[0]
        return y if bias is None else y + bias.to(y.dtype)[:, None, None]
    a = F.conv2d(x, kernel(V, x, [kh, kw]), None, stride, 0, dilation)
    left = (U.to(x.dtype) @ S.to(x.dtype))[..., None, None]
    return F.conv2d(a, left, None if bias is None else bias.to(x.dtype))


def kernel(V: Tensor, x: Tensor, size: list[int]) -> Tensor:
    """V as the kernel of the convolution to r channels, in the dtype of x.

    Shapes: V (c·kh·kw, r), x (B, c, H, W) -> (r, c, kh, kw).
    """
    return V.to(x.dtype).mT.reshape(V.shape[1], x.shape[1], *size)


def layout(x: Tensor) -> torch.memory_format:
    """channels_last for an image stored that way, else rows: what all images made from x have.

    Shapes: x (B, c, H, W).
    """
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.custom_op("lowrank_geo::tangent_conv2d", mutates_args=())
def tangent_conv2d(
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    """y and a = x ∗ V, the only activation kept besides x.

    Shapes: x (B, c, H, W), already padded -> y (B, m, H', W'), a (B, r, H', W').
    """
    a = F.conv2d(x, kernel(V, x, size), None, stride, 0, dilation)
    y = F.conv2d(a, (U.to(x.dtype) @ S.to(x.dtype))[..., None, None])
    return y.contiguous(memory_format=layout(x)), a.contiguous(memory_format=layout(x))


@tangent_conv2d.register_fake
def _(
    x: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor]:
    a = F.conv2d(x, kernel(V, x, size), None, stride, 0, dilation)
    y = a.new_empty(a.shape[0], U.shape[0], *a.shape[2:])
    like = layout(x)
    return torch.empty_like(y, memory_format=like), torch.empty_like(a, memory_format=like)


@torch.library.custom_op("lowrank_geo::tangent_conv2d_backward", mutates_args=())
def tangent_conv2d_backward(
    g: Tensor,
    x: Tensor,
    a: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    size: list[int],
    stride: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂L/∂x and the tangent coordinates of the Riemannian gradient, gauged in the dtype of U.

    Shapes: g = ∂L/∂y (B, m, H', W'), x (B, c, H, W), a (B, r, H', W') -> dx, Up (m, r), M (r, r),
        Vp (n, r).
    """
    frame = U.to(g.dtype)
    b = F.conv2d(g, frame.mT[..., None, None])  # (B, r, H', W')
    bS = F.conv2d(b, S.to(g.dtype).mT[..., None, None])

    def transposed(grad: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.convolution_backward(
            grad, x, kernel(V, x, size), None, stride, [0, 0], dilation, False, [0, 0], 1, mask
        )

    dx = transposed(bS, [True, False, False])[0]
    GtU = transposed(b, [False, True, False])[1].flatten(1).mT.to(U.dtype)
    GV = torch.einsum("bmhw,brhw->mr", g, a).to(U.dtype)
    M = U.mT @ GV
    Vp = GtU - V @ (V.mT @ GtU)
    return (
        dx.contiguous(memory_format=layout(x)),
        (GV - U @ M).contiguous(),
        M.contiguous(),
        Vp.contiguous(),
    )


@tangent_conv2d_backward.register_fake
def _(
    g: Tensor, x: Tensor, a: Tensor, U: Tensor, S: Tensor, V: Tensor,
    size: list[int], stride: list[int], dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x, memory_format=layout(x))
    return dx, U.new_empty(U.shape), S.new_empty(S.shape), V.new_empty(V.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, U, S, V, *ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], U, S, V)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple:
    x, a, U, S, V = ctx.saved_tensors
    grads = tangent_conv2d_backward(g.contiguous(), x, a, U, S, V, *ctx.window)
    return (*grads, None, None, None)


tangent_conv2d.register_autograd(_backward, setup_context=_save)
tangent_conv2d_backward.register_autograd(partial(refuse_double_backward, "lowrank_conv2d"))
