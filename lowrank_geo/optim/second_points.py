"""The low-rank layers of a model that are evaluated between their weight and a second point."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.branches import Branch
from lowrank_geo.geometry import Point
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer


class SecondPoints:
    """Sets and reads the second points of a model; without a model there is nothing to do.

    Args: watch: whether backward computes ⟨g, W₂ − W⟩.
    """

    def __init__(self, model: nn.Module | None, beta: float, *, watch: bool) -> None:
        self.model, self._beta, self._watch = model, beta, watch

    def set(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Evaluate the layers at (1 − β) W + β x from now on."""
        for layer in self.layers(groups):
            x = Point(*(state[p]["x"] for p in layer.point))
            kind: dict[str, Any] = {"dtype": x.S.dtype, "device": x.S.device}
            beta = torch.tensor(self._beta, requires_grad=self._watch, **kind)
            layer.second = Branch(x, beta) if self._beta else None

    def remove(self, groups: list[dict[str, Any]]) -> None:
        """Evaluate the layers at their weight again."""
        for layer in self.layers(groups):
            layer.second = None

    def ahead(self, groups: list[dict[str, Any]]) -> list[Tensor]:
        """⟨g, W − W_y⟩ = −β⟨g, x − W⟩ of every layer that has had a backward pass.

        Shapes: -> any number of ().
        """
        betas = [layer.second.weight for layer in self.layers(groups) if layer.second is not None]
        return [-beta.detach() * beta.grad for beta in betas if beta.grad is not None]

    def zero_grad(self, groups: list[dict[str, Any]]) -> None:
        """Forget the inner products of past backward passes."""
        for layer in self.layers(groups):
            if layer.second is not None:
                layer.second.weight.grad = None

    def layers(self, groups: list[dict[str, Any]]) -> list[LowRankLayer]:
        """The layers whose triples are in fixed-rank groups.

        Raises: ValueError if the model does not hold one of them.
        """
        if self.model is None:
            return []
        known = {id(layer.U): layer for _, layer in lowrank_layers(self.model)}
        fixed = [group for group in groups if group.get("geometry") == "fixed_rank"]
        frames = [U for group in fixed for U in list(group["params"])[::3]]
        for U in frames:
            if id(U) not in known:
                raise ValueError(
                    "ScheduleFree with gradient_at='branches' needs the model that holds its low-rank layers, "
                    f"got one without the layer of U {tuple(U.shape)}; pass the whole model, or 'collapsed'"
                )
        return [known[id(U)] for U in frames]
