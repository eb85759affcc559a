"""Optimizers by name, with the learning rates each one starts from."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_geo.gradients import Gradient
from lowrank_geo.optim.adam import RiemannianAdam
from lowrank_geo.optim.augmented import AugmentedAdam, AugmentedHeavyBall
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.filters import EMA, FSGDM, QHM, Filter
from lowrank_geo.optim.groups import param_groups
from lowrank_geo.optim.muon import RiemannianMuon
from lowrank_geo.optim.polyak import Polyak
from lowrank_geo.optim.schedule_free import ScheduleFree
from lowrank_geo.optim.sgd import RiemannianSGD
from lowrank_geo.optim.sign import RiemannianLion, RiemannianSignum

Groups = list[dict[str, Any]]


class Named(NamedTuple):
    """A constructor, from parameter groups and the length of the run, and its default learning rates."""

    make: Callable[[Groups, int | None], Optimizer]
    lr: float
    euclidean_lr: float
    gradient: Gradient = "tangent"  # what it reads
    takes_betas: bool = False  # whether its groups may name other betas than those of pre-training
    per_rank: bool = False  # whether the best rate of an adapter falls as 1/r
    bounded: bool = False  # whether fine-tuning bounds the direction of an adapter
    advances: bool = False  # whether it bounds the way of all adapters along the gradient


def of(cls: Callable[..., Optimizer], **settings: Any) -> Callable[[Groups, int | None], Optimizer]:
    """A constructor that does not care how long the run is."""
    return lambda groups, total_steps: cls(groups, **settings)


def momentum(filter: Filter, **settings: Any) -> Callable[[Groups, int | None], Optimizer]:
    """RiemannianSGD with a momentum rule."""
    return of(RiemannianSGD, filter=filter, **settings)


def adam(
    lr: float,
    euclidean_lr: float,
    *,
    takes_betas: bool = False,
    advances: bool = False,
    **settings: Any,
) -> Named:
    """RiemannianAdam with settings of its own."""
    return Named(
        of(RiemannianAdam, **settings),
        lr,
        euclidean_lr,
        takes_betas=takes_betas,
        per_rank=True,
        bounded=takes_betas,
        advances=advances,
    )


def fsgdm(groups: Groups, total_steps: int | None) -> Optimizer:
    """RiemannianSGD with the filter that follows the run.

    Raises: ValueError without total_steps.
    """
    if total_steps is None:
        raise ValueError(
            "optimizer 'fsgdm' needs total_steps, got None; pass the length of the run"
        )
    return RiemannianSGD(groups, filter=FSGDM(total_steps))


def schedule_free(
    cls: Callable[..., RiemannianOptimizer],
    polyak: Polyak | None = None,
    weights: str = "squared",
    **settings: Any,
) -> Callable[[Groups, int | None], Optimizer]:
    """`ScheduleFree` around an optimizer without momentum of its own."""
    return lambda groups, total_steps: ScheduleFree(
        cls(groups, **settings), step_size=polyak, weights=weights
    )


OPTIMIZERS: dict[str, Named] = {
    "adam": adam(5e-3, 2e-3, takes_betas=True),
    "adam-core": adam(5e-3, 2e-3, takes_betas=True, over="core"),
    "adam-scalar": adam(5e-3, 2e-3, takes_betas=True, over="matrix"),
    "adamw": Named(of(torch.optim.AdamW), 2e-3, 2e-3, gradient="factors"),
    "adavar": adam(5e-3, 2e-3, betas=(0.95, 0.975), gamma=0.975),
    "dlrt-adam": Named(of(AugmentedAdam), 2e-2, 2e-3),
    "dlrt-heavy-ball": Named(of(AugmentedHeavyBall), 0.1, 0.1),
    "fsgdm": Named(fsgdm, 0.4, 0.4),
    "lion": Named(of(RiemannianLion), 2e-3, 2e-3),
    "muon": Named(of(RiemannianMuon), 1e-2, 2e-3, takes_betas=True),
    "muon-product": Named(of(RiemannianMuon, metric="product"), 1e-2, 2e-3, takes_betas=True),
    "qhadam": adam(5e-3, 2e-3, takes_betas=True, betas=(0.95, 0.98), nus=(0.8, 1.0))._replace(
        advances=True
    ),
    "qhm": Named(momentum(QHM(0.7, 0.99)), 1.0, 1.0),
    "rmsprop": adam(2e-3, 1e-3, betas=(0.0, 0.95)),
    "schedule-free-adam": Named(
        schedule_free(RiemannianAdam, betas=(0.0, 0.95)), 5e-3, 5e-3, per_rank=True
    ),
    "schedule-free-muon": Named(
        schedule_free(RiemannianMuon, momentum=0.0, betas=(0.0, 0.95)), 8e-2, 2e-3
    ),
    "schedule-free-polyak": Named(
        schedule_free(RiemannianAdam, Polyak(max_lr="lr"), betas=(0.0, 0.95)), 2e-2, 2e-2
    ),
    "schedule-free-schedulet": Named(
        schedule_free(RiemannianMuon, weights="schedulet", momentum=0.0, betas=(0.0, 0.95)),
        8e-2,
        2e-3,
    ),
    "schedule-free-sgd": Named(schedule_free(RiemannianSGD, momentum=0.0), 1.0, 1.0),
    "sgd": Named(of(RiemannianSGD), 0.3, 0.3),
    "sgd-clipped": Named(momentum(EMA(0.9), clip=1.0), 1.0, 1.0),
    "sgd-ema": Named(momentum(EMA(0.9)), 1.0, 1.0),
    "sgd-nesterov": Named(of(RiemannianSGD, nesterov=True), 0.1, 0.1),
    "sgd-plain": Named(of(RiemannianSGD, momentum=0.0), 1.0, 1.0),
    "signsgd": Named(of(RiemannianSignum, momentum=0.0), 5e-4, 5e-4),
    "signum": Named(of(RiemannianSignum), 2e-3, 2e-3),
}


def optimizer_named(name: str) -> Named:
    """The optimizer called `name`.

    Raises: ValueError for an unknown name.
    """
    if name not in OPTIMIZERS:
        names = ", ".join(sorted(OPTIMIZERS))
        raise ValueError(f"optimizer needs to be one of {names}, got {name!r}; use one of them")
    return OPTIMIZERS[name]


def build(
    name: str,
    model: nn.Module,
    *,
    lr: float | None = None,
    euclidean_lr: float | None = None,
    weight_decay: float = 0.0,
    total_steps: int | None = None,
) -> Optimizer:
    """The optimizer called `name` on all parameters of a model; "adamw" is torch's, on U, S, V as
    they are.

    Args: lr, euclidean_lr: of the weight matrices, of the rest; None for the method's own. total_steps: length of the
        run, for methods that follow it.
    Raises: ValueError for an unknown name.
    """
    named = optimizer_named(name)
    groups = param_groups(
        model,
        lr=named.lr if lr is None else lr,
        euclidean_lr=named.euclidean_lr if euclidean_lr is None else euclidean_lr,
        weight_decay=weight_decay,
        gradient=named.gradient,
    )
    return named.make(groups, total_steps)
