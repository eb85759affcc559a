"""Which parameters belong together: (U, S, V) triples, dense matrices, and the rest."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_geo import guard
from lowrank_geo.geometry import Point, Tangent, magnitude
from lowrank_geo.gradients import Gradient
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import check_orthonormal
from lowrank_geo.optim.values import check_rate

Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])
GEOMETRIES = ("fixed_rank", "matrix", "euclidean")


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    euclidean_lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    dense: tuple[str, ...] = ("lm_head", "embed"),
    gradient: Gradient = "tangent",
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of `lowrank_geo.optim`; switches low-rank layers to
    `gradient`.

    Four groups, empty ones left out: the triples of the low-rank layers, the remaining weight
    matrices of linear layers and convolutions (spectral optimizers treat them as matrices), other
    parameters with two or more dimensions, and vectors, which are never decayed. Frozen layers
    are left out and keep gradient="factors".

    Args: lr: of the weight matrices, low-rank or left dense. euclidean_lr: of embeddings, heads and
        vectors. None for the default of the optimizer. dense: parts of module names that hold
        embeddings or output heads, never treated as matrices. gradient: "factors" for optimizers
        of other packages, which may leave U and V as they like.
    Raises: ValueError if a triple is only partly frozen or its U or V is not orthonormal, and for a negative rate;
            TypeError for no module or names that are not in a tuple.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs a torch.nn.Module, got {model!r}; pass the model")
    if isinstance(dense, str):  # every name would hold one of its letters
        raise TypeError(f"dense needs a tuple of names, got {dense!r}; pass ({dense!r},)")
    rates = {"lr": lr, "euclidean_lr": euclidean_lr, "weight_decay": weight_decay}
    for name, value in rates.items():
        if value is not None:
            check_rate(name, value)
    layers = dict(lowrank_layers(model))
    trained = {name: layer for name, layer in layers.items() if trains(name, layer.point)}
    for layer in trained.values():
        layer.gradient = gradient
    triples = [p for layer in trained.values() for p in layer.point]
    factors = {id(p) for layer in layers.values() for p in layer.point}
    matrices = {
        id(module.weight)
        for name, module in model.named_modules()
        if is_matrix(module) and not any(part in name for part in dense)
    }
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in factors]
    matrix = [p for p in rest if id(p) in matrices]
    others = [p for p in rest if id(p) not in matrices]
    weights: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    euclidean: dict[str, Any] = {"lr": euclidean_lr, "weight_decay": weight_decay}
    vectors = {**euclidean, "weight_decay": 0.0}
    groups: list[dict[str, Any]] = [
        {"params": triples, "geometry": "fixed_rank", "layers": list(trained), **weights},
        {"params": matrix, "geometry": "matrix", **weights},
        {"params": [p for p in others if p.dim() > 1], "geometry": "euclidean", **euclidean},
        {"params": [p for p in others if p.dim() < 2], "geometry": "euclidean", **vectors},
    ]
    return [
        {key: value for key, value in group.items() if value is not None}
        for group in groups
        if group["params"]
    ]


def is_matrix(module: nn.Module) -> bool:
    """Whether the module's weight acts as one matrix: linear layers and ungrouped convolutions."""
    if type(module).__name__ == "Conv1D":  # Hugging Face's transposed linear layer
        return True
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def trains(name: str, point: Point) -> bool:
    """Whether a triple is trained.

    Raises: ValueError if only some of its factors are.
    """
    flags = [p.requires_grad for p in point]
    if any(flags) and not all(flags):
        frozen = [n for n, flag in zip("USV", flags, strict=True) if not flag]
        raise ValueError(
            f"param_groups needs U, S, V of {name!r} all trained or all frozen, got {', '.join(frozen)} "
            "frozen; freeze or train the whole layer"
        )
    return all(flags)


def triples(group: dict[str, Any]) -> list[Point]:
    """The (U, S, V) of a fixed-rank group, three consecutive parameters each.

    Raises: ValueError if they do not fit together or are not orthonormal.
    """
    params = group["params"]
    if len(params) % 3:
        raise ValueError(
            f"a fixed_rank group needs whole triples U, S, V, got {len(params)} parameters; "
            "keep the three factors of a layer in one group, as lowrank_geo.param_groups does"
        )
    points = [Point(*params[i : i + 3]) for i in range(0, len(params), 3)]
    for index, point in enumerate(points):
        shapes = [tuple(p.shape) for p in point]
        r = point.S.shape[-1]
        if (
            any(len(s) != 2 for s in shapes)
            or [s[1] for s in shapes] != [r, r, r]
            or shapes[1][0] != r
        ):
            raise ValueError(
                f"a fixed_rank group needs U (m, r), S (r, r), V (n, r), got {shapes} at position "
                f"{3 * index}; pass the factors of each layer in this order"
            )
        if not guard.in_place(*point):
            raise ValueError(
                f"a fixed_rank group needs U, S, V of one layer in this order, got factors of several layers or "
                f"another order at position {3 * index}, of shapes {shapes}; use lowrank_geo.param_groups"
            )
        check_orthonormal(point, "a fixed_rank group")
    return points


def points_of(group: dict[str, Any]) -> list[Point]:
    """The triples of a group that has been checked."""
    return [Point(*x) for x in zip(*[iter(group["params"])] * 3, strict=True)]


def by_shape(points: Iterable[Tensors]) -> Iterator[list[Tensors]]:
    """Points, or other tuples of tensors, of one shape, dtype and device together, in the order of the first."""
    buckets: dict[Any, list[Tensors]] = {}
    for point in points:
        key = tuple((p.shape, p.dtype, p.device) for p in point)
        buckets.setdefault(key, []).append(point)
    return iter(buckets.values())


def with_gradients(points: Iterable[Point]) -> list[Point]:
    """The triples that have gradients.

    Raises: RuntimeError if one has some of its three: there is no step for a part of a point.
    """
    found = []
    for point in points:
        missing = [n for n, p in zip("USV", point, strict=True) if p.grad is None]
        if 0 < len(missing) < 3:
            raise RuntimeError(
                f"a step needs gradients of all of U, S, V of a layer, got none of {', '.join(missing)} for a "
                f"{point.U.shape[0]}x{point.V.shape[0]} layer; freeze or train the whole layer"
            )
        if not missing:
            found.append(point)
    return found


def check_gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter.

    Raises: RuntimeError if it is sparse or complex.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse or gradient.dtype.is_complex:
        kind = "sparse" if gradient.is_sparse else "complex"
        raise RuntimeError(
            f"optimizers of lowrank_geo.optim need dense real gradients, got a {kind} one of shape "
            f"{tuple(parameter.shape)}; use nn.Embedding(sparse=False) or another optimizer"
        )
    return gradient


def gradients(group: dict[str, Any], params: Iterable[Tensor]) -> list[Tensor]:
    """What to descend along: the gradients, or their negatives."""
    grads = [check_gradient(p) for p in params]
    return list(torch._foreach_neg(grads)) if group["maximize"] else grads


def counts(lr: float | Tensor, gradients: list[Tensor] | Tangent) -> list[Tensor] | None:
    """Whether each step counts, as 0-d tensors; None if all do. Only lr = 0 with a zero gradient
    does not.

    A step with lr = 0 and no gradient is how torch.distributed.checkpoint makes an optimizer
    create its state.

    Shapes: gradients of L parameters, or a batch of L tangents -> L times ().
    """
    if not isinstance(lr, Tensor) and lr != 0:
        return None
    if isinstance(gradients, Tangent):
        sizes = torch.stack([magnitude(part)[..., 0, 0] for part in gradients]).amax(0)
    else:
        norms = torch._foreach_norm(gradients, float("inf"))
        sizes = torch.stack([x.float() for x in norms])  # one launch for all, whatever their dtypes
    active = sizes != 0
    return list((active | (lr != 0) if isinstance(lr, Tensor) else active).unbind())
