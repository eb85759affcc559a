"""What an optimizer refuses when it is made or loaded."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lowrank_geo import guard
from lowrank_geo.optim.groups import GEOMETRIES, triples


def geometry_of(group: dict[str, Any]) -> str:
    """The geometry of a group, "euclidean" if it says none.

    Raises: ValueError for an unknown one.
    """
    geometry = group.setdefault("geometry", "euclidean")
    if geometry not in GEOMETRIES:
        raise ValueError(
            f"a parameter group needs geometry out of {', '.join(GEOMETRIES)}, got {geometry!r}; "
            "use lowrank_geo.param_groups"
        )
    return geometry


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for rates that are none, and for factors where they do not belong."""
    check_rate("lr", group["lr"])
    check_rate("weight_decay", group["weight_decay"])
    fixed = group["geometry"] == "fixed_rank"
    for parameter in group["params"]:
        if fixed != guard.is_marked(parameter):
            shape = tuple(parameter.shape)
            raise ValueError(
                f"a fixed_rank group needs layers with gradient='tangent', got a factor of shape {shape} "
                "without; use lowrank_geo.param_groups"
                if fixed
                else f"a {group['geometry']} group needs ordinary gradients, got a factor of a low-rank "
                f"layer, of shape {shape}; keep U, S, V together in a fixed_rank group, as "
                "lowrank_geo.param_groups does"
            )
    if fixed:
        triples(group)


def check_state(call: str, fresh: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming `call`, unless a saved state has the tensors of a fresh one."""
    for name, value in fresh.items():
        if name not in saved or saved[name].shape != value.shape:
            got = tuple(saved[name].shape) if name in saved else "nothing"
            raise ValueError(
                f"{call} needs {name} of shape {tuple(value.shape)}, got {got}; "
                "load a state saved with the same optimizer, ranks and layers"
            )


def check_rate(name: str, value: float | Tensor) -> None:
    """Raise ValueError unless a learning rate or weight decay is finite and not negative.

    A tensor on an accelerator is trusted: reading it would wait for the device.
    """
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} needs to be a finite number >= 0, got {number}; pass e.g. 1e-3")


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError unless both decay rates are in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"betas need to be two numbers in [0, 1), got {betas}; pass e.g. (0.95, 0.95)"
        )
