"""Optimizers whose state lives on the manifold, composed of metric, filter, direction and
retraction.
"""

from lowrank_geo.optim import schedules
from lowrank_geo.optim.adam import RiemannianAdam
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.groups import param_groups
from lowrank_geo.optim.muon import RiemannianMuon
from lowrank_geo.optim.named import OPTIMIZERS, build
from lowrank_geo.optim.sgd import RiemannianSGD

__all__ = [
    "OPTIMIZERS",
    "RiemannianAdam",
    "RiemannianMuon",
    "RiemannianOptimizer",
    "RiemannianSGD",
    "build",
    "param_groups",
    "schedules",
]
