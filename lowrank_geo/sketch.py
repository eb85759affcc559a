"""A few numbers of the gradient and the weights of all low-rank layers, the same whatever frames U, V stand for them.

On the manifold frames turn from step to step, and coordinates with them: their changes look like noise of high
frequency. The inner products with fixed matrices a bᵀ of the surrounding space do not. Factors that an optimizer moves
as they are do not turn: there the space of the factors is the one whose curvature the optimizer sees.
"""

import torch
from torch import Tensor, nn

from lowrank_geo.geometry import Point
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer

Probes = list[tuple[Tensor, Tensor]]  # (count, m), (count, n) of each matrix


class Sketch:
    """Inner products with `count` random rank-one matrices of each layer, summed over the layers.

    Of W where the layer has gradient="tangent", of U, S and V where it has gradient="factors".

    The mean of the products of two sketches' entries estimates ⟨X, Y⟩; where X = Y with a relative standard deviation
    from √(2/count), for many layers or ranks, to √(8/count), for one matrix of rank one.

    Shapes: for each matrix a (count, m), b (count, n), standard normal.
    Raises: ValueError for a count below 1, or a model without low-rank layers.
    """

    def __init__(self, model: nn.Module, count: int, seed: int = 0) -> None:
        if count < 1:
            raise ValueError(f"Sketch needs a count >= 1, got {count}; pass e.g. 16")
        generator = torch.Generator().manual_seed(seed)
        self.layers = [layer for _, layer in lowrank_layers(model)]
        if not self.layers:
            raise ValueError(
                "Sketch needs a model with low-rank layers, got none; convert it with lowrank_geo.convert"
            )
        self.probes = [self._probes(layer, count, generator) for layer in self.layers]

    @staticmethod
    def _probes(layer: LowRankLayer, count: int, generator: torch.Generator) -> Probes:
        U, _, V = layer.point
        shapes = [(len(U), len(V))]
        if layer.gradient == "factors":
            shapes = [(x.shape[0], x.shape[1]) for x in layer.point]
        return [
            (
                torch.randn(count, rows, generator=generator).to(U),
                torch.randn(count, columns, generator=generator).to(U),
            )
            for rows, columns in shapes
        ]

    @torch.no_grad()
    def weights(self) -> Tensor:
        """Σ aᵀ W b.

        Shapes: -> (count).
        """
        parts = []
        for layer, probes in zip(self.layers, self.probes, strict=True):
            x = _point(layer)
            if layer.gradient == "factors":
                parts += [_products(X, *pair) for X, pair in zip(x, probes, strict=True)]
            else:
                [(a, b)] = probes
                parts.append(((a @ x.U) @ x.S * (b @ x.V)).sum(-1))
        return torch.stack(parts).sum(0)

    @torch.no_grad()
    def gradients(self) -> Tensor:
        """Σ aᵀ ξ b of the Riemannian gradients ξ = U M Vᵀ + Up Vᵀ + U Vpᵀ, or Σ aᵀ (∂L/∂X) b over the factors X.

        Layers without gradient count as 0.

        Shapes: -> (count).
        """
        parts = [torch.zeros_like(self.probes[0][0][0][:, 0])]
        for layer, probes in zip(self.layers, self.probes, strict=True):
            U, _, V = _point(layer)
            Up, M, Vp = (parameter.grad for parameter in layer.point)
            if Up is None or M is None or Vp is None:
                continue
            if layer.gradient == "factors":
                parts += [_products(g, *pair) for g, pair in zip((Up, M, Vp), probes, strict=True)]
                continue
            [(a, b)] = probes
            left, right = a @ U, b @ V
            parts.append(((left @ M + a @ Up) * right + left * (b @ Vp)).sum(-1))
        return torch.stack(parts).sum(0)


def _products(X: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """aᵀ X b of each probe.

    Shapes: X (m, n), a (count, m), b (count, n) -> (count).
    """
    return ((a @ X) * b).sum(-1)


def _point(layer: LowRankLayer) -> Point:
    return Point(*(p.detach() for p in layer.point))
