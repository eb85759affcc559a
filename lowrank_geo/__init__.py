"""Train PyTorch models whose weights stay on the manifold of rank-r matrices."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lowrank_geo import geometry, optim, retraction
from lowrank_geo.conv_layers import LowRankConv2d
from lowrank_geo.convert import convert, to_dense, to_factors
from lowrank_geo.dispatch import Backend, backend
from lowrank_geo.functional import lowrank_linear
from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.layers import LowRankLinear, lowrank_layers
from lowrank_geo.optim import param_groups
from lowrank_geo.plan import plan_ranks
from lowrank_geo.saving import load_pretrained, save_pretrained

if TYPE_CHECKING:
    from lowrank_geo.manifold import FixedRank

__version__ = version("lowrank-geo")

__all__ = [
    "Backend",
    "FixedRank",
    "LowRankConv2d",
    "LowRankLinear",
    "Point",
    "Tangent",
    "__version__",
    "backend",
    "convert",
    "geometry",
    "load_pretrained",
    "lowrank_layers",
    "lowrank_linear",
    "optim",
    "param_groups",
    "plan_ranks",
    "retraction",
    "save_pretrained",
    "to_dense",
    "to_factors",
]


def __getattr__(name: str) -> Any:
    # geoopt takes half a second to import and warns; only those who use FixedRank pay for it.
    if name == "FixedRank":
        from lowrank_geo.manifold import FixedRank

        return FixedRank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
