"""A stack of linear layers with ReLU between them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowrank_geo.models.checks import check_sizes


class MLP(nn.Module):
    """Linear layers of the given widths with ReLU between them; images are read as flat vectors.

    Shapes: x (B, ...) of widths[0] numbers per sample -> (B, widths[-1]).
    Raises: ValueError if there are fewer than two widths or one is below 1, or if x has another size.

    >>> MLP([64, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(self, widths: Sequence[int], *, bias: bool = True) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(
                f"MLP needs at least two widths, input and output, got {list(widths)}; add one"
            )
        check_sizes("MLP", **{f"widths[{i}]": width for i, width in enumerate(widths)})
        self.widths = tuple(widths)
        self.layers = nn.ModuleList(
            nn.Linear(n, m, bias=bias) for n, m in zip(widths[:-1], widths[1:], strict=True)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights anew: they keep the variance through ReLU (He et al., 2015)."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            last = index == len(self.layers) - 1
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if last else "relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.widths[0]:
            raise ValueError(
                f"MLP needs {self.widths[0]} numbers per sample, got a batch of shape "
                f"{tuple(x.shape)}; reshape it or change the first width"
            )
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)
