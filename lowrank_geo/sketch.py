"""A few numbers of the gradient and the weights of all low-rank layers, the same whatever frames U, V stand for them.

Frames turn from step to step, and coordinates with them: their changes look like noise of high frequency. The inner
products with fixed matrices a bᵀ of the surrounding space do not.
"""

import torch
from torch import Tensor, nn

from lowrank_geo.geometry import Point
from lowrank_geo.layers import LowRankLayer, lowrank_layers


class Sketch:
    """Inner products with `count` random rank-one matrices of each layer, summed over the layers.

    The mean of the products of two sketches' entries estimates ⟨X, Y⟩; where X = Y with a relative standard deviation
    from √(2/count), for many layers or ranks, to √(8/count), for one matrix of rank one.

    Shapes: for each layer a (count, m), b (count, n), standard normal.
    Raises: ValueError for a count below 1, or a model without low-rank layers of tangent gradients.
    """

    def __init__(self, model: nn.Module, count: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"Sketch needs a count >= 1, got {count}; pass e.g. 16")
        generator = torch.Generator().manual_seed(seed)
        self.layers = [layer for _, layer in lowrank_layers(model) if layer.gradient == "tangent"]
        if not self.layers:
            raise ValueError(
                "Sketch needs low-rank layers with gradient='tangent', got none; take an optimizer of lowrank_geo.optim"
            )
        self.probes = [self._probes(layer, count, generator) for layer in self.layers]

    @staticmethod
    def _probes(
        layer: LowRankLayer, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        U, _, V = layer.point
        a, b = (torch.randn(count, len(frame), generator=generator) for frame in (U, V))
        return a.to(U), b.to(V)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Σ aᵀ W b.

        Shapes: -> (count).
        """
        parts = [
            ((a @ x.U) @ x.S * (b @ x.V)).sum(-1)
            for x, (a, b) in zip(map(_point, self.layers), self.probes, strict=True)
        ]
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def gradients(self) -> Tensor:
        """Σ aᵀ ξ b of the Riemannian gradients ξ = U M Vᵀ + Up Vᵀ + U Vpᵀ; layers without gradient count as 0.

        Shapes: -> (count).
        """
        parts = [torch.zeros_like(self.probes[0][0][:, 0])]
        for layer, (a, b) in zip(self.layers, self.probes, strict=True):
            U, _, V = _point(layer)
            Up, M, Vp = (parameter.grad for parameter in layer.point)
            if Up is None or M is None or Vp is None:
                continue
            left, right = a @ U, b @ V
            parts.append(((left @ M + a @ Up) * right + left * (b @ Vp)).sum(-1))
        return torch.stack(parts).sum(0)


def _point(layer: LowRankLayer) -> Point:
    return Point(*(p.detach() for p in layer.point))
