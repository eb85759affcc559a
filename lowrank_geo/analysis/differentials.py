"""A series over rooted trees evaluated at a point, by nested forward-mode derivatives of the gradient."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from lowrank_geo.analysis.trees import Tree, forest
from lowrank_geo.layers import lowrank_layers

Field = Callable[[Tensor], Tensor]


def directional(f: Field, directions: Sequence[Tensor]) -> Field:
    """x ↦ f⁽ᵐ⁾(x)(v₁, …, vₘ), by m nested calls of torch.func.jvp.

    Shapes: f (d) -> (d), directions m times (d).
    """
    for v in directions:
        f = partial(_along, f, v)
    return f


def _along(f: Field, v: Tensor, x: Tensor) -> Tensor:
    return jvp(f, (x,), (v,))[1]


def evaluate(f: Field, coefficients: Sequence[float], order: int, x: Tensor) -> Tensor:
    """Σ c(τ) F(τ)(x) over the trees of at most `order` vertices.

    Costs one nest of jvp a tree: 1, 2, 4, 8 evaluations for the orders 1 … 4.

    Shapes: x and f(x) (d) -> (d).
    """
    values: dict[Tree, Tensor] = {}
    for tree in forest(order).trees:
        values[tree] = directional(f, [values[child] for child in tree])(x)
    return sum((c * v for c, v in zip(coefficients, values.values(), strict=True)), torch.zeros(()))


def gradient_of(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[Field, Tensor]:
    """∇L as a function of one vector of all trained parameters of a model, and where they are now.

    Args: loss: of the model, as a number that torch.func can differentiate.
    Shapes: (d) -> (d), and (d).
    Units: loss per weight.
    Raises: ValueError for low-rank layers with gradient="tangent", whose .grad is not a derivative.
    Source: torch.func; the f = −∇L of the series.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> gradient, x = gradient_of(model, lambda net: net(torch.ones(1)).sum() ** 2)
    >>> bool(torch.isclose(gradient(x), 2 * x))
    True
    """
    for name, layer in lowrank_layers(model):
        if layer.gradient != "factors":
            raise ValueError(
                f"gradient_of needs layers with gradient='factors', got {layer.gradient!r} in {name!r}; "
                "set layer.gradient = 'factors', or use lowrank_geo.analysis.manifold"
            )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes, shapes = [p.numel() for p in trained.values()], [p.shape for p in trained.values()]

    def value(x: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)]
        return loss(Called(model, dict(zip(trained, parts, strict=True))))

    start = torch.cat([p.detach().flatten() for p in trained.values()])
    return grad(value), start


class Called(nn.Module):
    """A model with some of its parameters replaced, to call as the model itself."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self._call = partial(functional_call, model, parameters)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._call(inputs)
