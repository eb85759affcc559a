"""Optimizers by name, with the learning rates each one starts from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_geo.functional import Gradient
from lowrank_geo.optim.adam import RiemannianAdam
from lowrank_geo.optim.groups import param_groups
from lowrank_geo.optim.muon import RiemannianMuon
from lowrank_geo.optim.sgd import RiemannianSGD


class Named(NamedTuple):
    """A constructor of parameter groups and its default learning rates."""

    make: Callable[[list[dict[str, Any]]], Optimizer]
    lr: float
    euclidean_lr: float
    gradient: Gradient = "tangent"  # what it reads


OPTIMIZERS: dict[str, Named] = {
    "adam": Named(RiemannianAdam, 5e-3, 2e-3),
    "adamw": Named(torch.optim.AdamW, 2e-3, 2e-3, gradient="factors"),
    "muon": Named(RiemannianMuon, 1e-2, 2e-3),
    "muon-embedded": Named(partial(RiemannianMuon, metric="embedded"), 2e-2, 2e-3),
    "sgd": Named(RiemannianSGD, 0.1, 0.1),
}


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    euclidean_lr: float | None = None,
    weight_decay: float = 0.0,
) -> Optimizer:
    """The optimizer called `name` on all parameters of a model; "adamw" is torch's, on U, S, V as
    they are.

    Args: lr, euclidean_lr: of the weight matrices, of the rest; None for the method's own.
    Raises: ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        names = ", ".join(sorted(OPTIMIZERS))
        raise ValueError(f"optimizer needs to be one of {names}, got {name!r}; use one of them")
    named = OPTIMIZERS[name]
    groups = param_groups(
        model,
        lr=named.lr if lr is None else lr,
        euclidean_lr=named.euclidean_lr if euclidean_lr is None else euclidean_lr,
        weight_decay=weight_decay,
        gradient=named.gradient,
    )
    return named.make(groups)
