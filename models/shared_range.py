"""Momentum blocks whose outputs lie in one subspace: the velocity needs only its coordinates there."""

from collections.abc import Iterable

import torch  # noqa: F401 (of the example)
from torch import Tensor, nn

from lowrank_geo.models.momentum import check_gamma


class SharedRangeStack(nn.Module):
    """z ← γ z + (1−γ) g(x), x ← x + frame(z): a `MomentumStack` of blocks frame ∘ g that keeps v = frame(z) as z.

    The velocity takes r numbers where x takes d. The same as the stack of `nn.Sequential(g, frame)` for a frame that is
    linear, such as `nn.Linear(r, d, bias=False)`.

    Shapes: x (..., d), kept; every block (..., d) -> (..., r), frame (..., r) -> (..., d).
    Raises: ValueError for a γ outside [0, 1), no blocks, or blocks of other coordinates than the first.

    >>> stack = SharedRangeStack([nn.Linear(8, 2) for _ in range(3)], nn.Linear(2, 8, bias=False))
    >>> x, z = stack.flow(torch.zeros(5, 8))
    >>> x.shape, z.shape
    (torch.Size([5, 8]), torch.Size([5, 2]))
    """

    def __init__(self, blocks: Iterable[nn.Module], frame: nn.Module, gamma: float = 0.9) -> None:
        super().__init__()
        self.gamma = check_gamma(gamma)
        self.blocks, self.frame = nn.ModuleList(blocks), frame
        if not self.blocks:
            raise ValueError("SharedRangeStack needs at least one block, got none; pass a list")

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x)[0]

    def flow(self, x: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Position and the coordinates of the velocity after the blocks, from those before."""
        for block in self.blocks:
            g = block(x)
            if z is not None and g.shape != z.shape:
                raise ValueError(
                    f"SharedRangeStack needs blocks of the same coordinates, got {tuple(g.shape)} after "
                    f"{tuple(z.shape)}; give them one output size"
                )
            z = (1 - self.gamma) * g if z is None else self.gamma * z + (1 - self.gamma) * g
            x = x + self.frame(z)
        assert z is not None
        return x, z
