"""A momentum stack whose blocks share their output range, with the velocity in its coordinates."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_geo.models.momentum import Mode, MomentumStack


class SharedRangeStack(nn.Module):
    """A `MomentumStack` of the blocks f(x) = U g(x), which computes v and x − x₀ as r coefficients of U.

    With v = U c and x = x₀ + U p, the step is c ← γ c + (1−γ) g(x₀ + U p), p ← p + c: state, lost bits and kept
    states of reversible mode take r / d of the memory. `expand` is the linear U without bias, such as
    `nn.Linear(r, d, bias=False)` or a 1×1 convolution, and is a parameter once.

    Shapes: x (..., d), g(x) (..., r) -> (..., d); with a 1×1 convolution (B, d, H, W) and (B, r, H, W).
    Raises: ValueError if a block does not give what `expand` reads, or for an `expand` with a bias; else as
        `MomentumStack`.
    Source: Sander et al., arXiv 2102.07870, for the step.

    >>> import torch
    >>> blocks = [nn.Sequential(nn.Linear(16, 2), nn.Tanh()) for _ in range(3)]
    >>> SharedRangeStack(blocks, nn.Linear(2, 16, bias=False))(torch.zeros(5, 16)).shape
    torch.Size([5, 16])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        expand: nn.Module,
        gamma: float = 0.9,
        *,
        mode: Mode = "backprop",
        exact: bool | None = None,
    ) -> None:
        super().__init__()
        if getattr(expand, "bias", None) is not None:
            raise ValueError(
                "SharedRangeStack needs a linear expand without bias, got one with; build it with bias=False"
            )
        self.expand = expand
        inner = [Inner(block, expand) for block in blocks]
        self.steps = MomentumStack(inner, gamma, mode=mode, exact=exact)

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        p = self.coefficients(x, *arguments, **keywords)
        return x + self.expand(p).to(x.dtype)

    def coefficients(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Those of what all blocks together add to x."""
        origin = self._origin(x)
        return self.steps(origin, x, *arguments, **keywords)

    def _origin(self, x: Tensor) -> Tensor:
        layer: Any = self.expand
        if hasattr(layer, "in_channels"):
            return x.new_zeros(x.shape[0], layer.in_channels, *x.shape[2:])
        return x.new_zeros(*x.shape[:-1], layer.in_features)


class Inner(nn.Module):
    """g at x₀ + U p."""

    def __init__(self, block: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.block, self.expand = block, expand

    def forward(self, p: Tensor, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        return self.block(x + self.expand(p).to(x.dtype), *arguments, **keywords)
