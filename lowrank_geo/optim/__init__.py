"""Optimizers whose state lives on the manifold, composed of metric, filter, direction and
retraction.
"""

from lowrank_geo.optim import filters, schedules
from lowrank_geo.optim.adam import RiemannianAdam
from lowrank_geo.optim.augmented import AugmentedAdam, AugmentedHeavyBall
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.groups import param_groups
from lowrank_geo.optim.lora import LoRAPreconditioned
from lowrank_geo.optim.muon import RiemannianMuon
from lowrank_geo.optim.named import OPTIMIZERS, build
from lowrank_geo.optim.polyak import Polyak
from lowrank_geo.optim.scaled_lora import scaled_lora
from lowrank_geo.optim.schedule_free import ScheduleFree
from lowrank_geo.optim.sgd import RiemannianSGD
from lowrank_geo.optim.sign import RiemannianLion, RiemannianSignum
from lowrank_geo.optim.widths import compact, reserve

__all__ = [
    "OPTIMIZERS",
    "AugmentedAdam",
    "AugmentedHeavyBall",
    "LoRAPreconditioned",
    "Polyak",
    "RiemannianAdam",
    "RiemannianLion",
    "RiemannianMuon",
    "RiemannianOptimizer",
    "RiemannianSGD",
    "RiemannianSignum",
    "ScheduleFree",
    "build",
    "compact",
    "filters",
    "param_groups",
    "reserve",
    "scaled_lora",
    "schedules",
]
