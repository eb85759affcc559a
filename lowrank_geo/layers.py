"""The linear layer of fixed rank, and how to find the low-rank layers of a model."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank_geo.functional import add_lowrank_linear, lowrank_linear
from lowrank_geo.geometry import Point, check_rank
from lowrank_geo.init import factorize
from lowrank_geo.lowrank_layer import LowRankLayer, detached, matrix_product


class LowRankLinear(LowRankLayer):
    """y = x W ᵀ + bias with W = U S Vᵀ of fixed rank; a drop-in for `nn.Linear`.

    Shapes: x (..., in_features) -> (..., out_features); U (m, r), S (r, r), V (n, r), bias (m),
        with m = out_features and n = in_features.
    Raises: ValueError if not 1 <= rank <= min(m, n).

    >>> LowRankLinear(8, 4, rank=2)(torch.zeros(3, 8)).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        check_rank("LowRankLinear", out_features, in_features, rank)
        super().__init__(factorize(dense.weight, rank, "orthogonal"), detached(dense.bias))
        self.in_features, self.out_features = in_features, out_features
        self.transposed = False

    @classmethod
    def from_weight(
        cls,
        W: Tensor,
        bias: Tensor | None,
        rank: int,
        *,
        init: str = "svd",
        transposed: bool = False,
    ) -> "LowRankLinear":
        """The layer of a given weight; `transposed` says that the dense module stores Wᵀ, as
        Hugging Face's Conv1D.

        Shapes: W (m, n), bias (m).
        """
        return cls.from_point(factorize(W, rank, init), detached(bias), transposed=transposed)

    @classmethod
    def from_point(
        cls, point: Point, bias: Tensor | None = None, *, transposed: bool = False
    ) -> "LowRankLinear":
        """The layer whose weight is `point`; `transposed` as in `from_weight`."""
        layer = cls.__new__(cls)
        LowRankLayer.__init__(layer, point, bias)
        layer.out_features, layer.in_features = point.U.shape[0], point.V.shape[0]
        layer.transposed = transposed
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.second is None:
            return lowrank_linear(x, *self.point, self.bias, gradient=self._gradient)
        y = self._evaluate(matrix_product, x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def add_to(self, y: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
        """y + scale · (what the layer gives for x), in the dtype of y; faster than the sum of both.

        Shapes: y (..., out_features), x (..., in_features) -> (..., out_features).
        """
        if self.second is not None or self.bias is not None:
            return y + (scale * self(x)).to(y.dtype)
        return add_lowrank_linear(y, x, *self.point, scale=scale, gradient=self._gradient)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the layout of the module that this one replaces; built anew at each
        reading.
        """
        return self.matrix().mT if self.transposed else self.matrix()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, gradient={self._gradient!r}"
        )


def lowrank_layers(module: nn.Module) -> Iterator[tuple[str, LowRankLayer]]:
    """The low-rank layers of a model with their names; a shared layer appears once, under its
    first name.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, LowRankLayer):
            yield name, layer
