"""The convolution whose kernel is a point W = U S Vᵀ; the rest is that of `lowrank_layer.LowRankLayer`."""

from typing import Any

from torch import Tensor, nn

from lowrank_geo.convolution import ConvGeometry, lowrank_conv2d
from lowrank_geo.geometry import Point
from lowrank_geo.gradients import Gradient
from lowrank_geo.init import factorize
from lowrank_geo.lowrank_layer import LowRankLayer, detached


class LowRankConv2d(LowRankLayer):
    """A convolution whose kernel, as an out_channels × (in_channels·kh·kw) matrix, is U S Vᵀ of
    fixed rank.

    It runs as a convolution to r channels (Vᵀ) and a pointwise one to out_channels (U S).

    Shapes: x (B, in_channels, H, W) -> (B, out_channels, H', W'); U (m, r), S (r, r), V (n, r),
        bias (m), with m = out_channels and n = in_channels·kh·kw.
    Raises: ValueError if not 1 <= rank <= min(m, n).

    >>> import torch
    >>> LowRankConv2d(3, 8, 3, rank=4, padding=1)(torch.zeros(2, 3, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        bias: bool = True,
        *,
        init: str = "orthogonal",
        **convolution: Any,
    ) -> None:
        dense = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias, **convolution)
        self._copy_convolution(dense, rank, init)

    @classmethod
    def from_convolution(cls, dense: nn.Conv2d, rank: int, *, init: str = "svd") -> "LowRankConv2d":
        """The layer of a given dense convolution.

        Raises: ValueError for a grouped convolution, whose kernel is not one matrix.
        """
        layer = cls.__new__(cls)
        layer._copy_convolution(dense, rank, init)
        return layer

    @classmethod
    def from_point(
        cls, point: Point, dense: nn.Conv2d, bias: Tensor | None = None
    ) -> "LowRankConv2d":
        """The layer whose kernel is `point`, with the windows of a dense convolution.

        Raises: ValueError for a grouped convolution, whose kernel is not one matrix.
        """
        layer = cls.__new__(cls)
        layer._adopt(point, dense, bias)
        return layer

    def _copy_convolution(self, dense: nn.Conv2d, rank: int, init: str) -> None:
        check_ungrouped(dense)
        self._adopt(factorize(dense.weight.flatten(1), rank, init), dense, detached(dense.bias))

    def _adopt(self, point: Point, dense: nn.Conv2d, bias: Tensor | None) -> None:
        check_ungrouped(dense)
        super().__init__(point, bias)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        self.geometry = ConvGeometry.of(dense)

    def forward(self, x: Tensor) -> Tensor:
        if self.second is None:
            return lowrank_conv2d(x, *self.point, self.bias, self.geometry, gradient=self._gradient)
        y = self._evaluate(self._product, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _product(self, x: Tensor, point: Point, gradient: Gradient) -> Tensor:
        return lowrank_conv2d(x, *point, None, self.geometry, gradient=gradient)

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out_channels, in_channels, kh, kw), built anew at each reading."""
        kernel = self.geometry.kernel_size
        return self.matrix().reshape(self.out_channels, self.in_channels, *kernel)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.geometry.kernel_size}, "
            f"stride={self.geometry.stride}, rank={self.rank}, bias={self.bias is not None}, "
            f"gradient={self._gradient!r}"
        )


def check_ungrouped(dense: nn.Conv2d) -> None:
    """Raise ValueError for a grouped convolution."""
    if dense.groups != 1:
        raise ValueError(
            f"LowRankConv2d needs groups=1, got {dense.groups}; keep grouped convolutions dense"
        )
