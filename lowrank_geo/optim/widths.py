"""Room for the rank to grow: factors wider than the matrix needs, and factors without the room."""

import math

import torch
from torch import Tensor, nn

from lowrank_geo.geometry import Point
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.optim.augmentation import used_rank
from lowrank_geo.optim.values import check_number


@torch.no_grad()
def reserve(model: nn.Module, factor: float = 2.0) -> nn.Module:
    """Widen the factors of the trained low-rank layers, in place; no weight changes, no parameter is replaced.

    For optimizers that change the rank, with a factor of 2: they augment to the whole width and truncate to half of
    it. To be called before such an optimizer is made, and before the weights of a widened model are loaded.

    Args: factor: width over rank, rounded up, at most min(m, n).
    Raises: ValueError for a factor below 1.

    >>> layer = reserve(LowRankLayer(Point(torch.eye(6, 2), torch.eye(2), torch.eye(5, 2)), None))
    >>> layer.U.shape, layer.S.shape, layer.V.shape
    (torch.Size([6, 4]), torch.Size([4, 4]), torch.Size([5, 4]))
    """
    check_number("reserve's factor", factor, 2.0)
    if not factor >= 1:
        raise ValueError(f"reserve needs a factor >= 1, got {factor}; pass e.g. 2.0")
    for _, layer in lowrank_layers(model):
        if layer.S.requires_grad:
            m, n, r = layer.U.shape[0], layer.V.shape[0], layer.rank
            width = min(math.ceil(factor * r), m, n)
            added = width - r
            S = torch.nn.functional.pad(layer.S, (0, added, 0, added))
            _replace(layer, Point(_completed(layer.U, width), S, _completed(layer.V, width)))
    return model


@torch.no_grad()
def compact(model: nn.Module) -> nn.Module:
    """Cut the factors of the low-rank layers down to the leading block of S that is not zero, in place.

    The inverse of `reserve`, after training and `optimizer.truncate()`: the weights are the same to the bit, the
    optimizer has to be made anew. Reads back to the host.
    """
    for _, layer in lowrank_layers(model):
        r = int(used_rank(layer.S))
        U, S, V = layer.point
        _replace(layer, Point(U[:, :r].clone(), S[:r, :r].clone(), V[:, :r].clone()))
    return model


def _completed(U: Tensor, width: int) -> Tensor:
    """U, and columns that are orthonormal to it.

    Shapes: U (m, r) -> (m, width).
    """
    Q, _ = torch.linalg.qr(torch.nn.functional.pad(U, (0, width - U.shape[1])))
    return torch.cat([U, Q[:, U.shape[1] :]], -1)


def _replace(layer: LowRankLayer, point: Point) -> None:
    for parameter, value in zip(layer.point, point, strict=True):
        parameter.data, parameter.grad = value, None
