"""What an optimizer refuses when it is made or loaded."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_geo import guard
from lowrank_geo.optim.groups import GEOMETRIES, triples
from lowrank_geo.optim.polyak import Polyak
from lowrank_geo.optim.values import (
    check_count,
    check_number,
    check_pair,
    check_rate,
    check_scalar,
)


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
    """Raise ValueError or TypeError for numbers that are out of range, and for factors where they do not belong."""
    check_rate("lr", group["lr"])
    check_rate("weight_decay", group["weight_decay"])
    if (bound := group.get("max_advance")) is not None:
        check_number("max_advance", bound, 0.3)
        if not bound > 0:
            raise ValueError(f"max_advance needs to be > 0, got {bound}; pass e.g. 0.3")
    if "betas" in group:
        check_betas(group["betas"])
    if "nus" in group:
        check_nus(group["nus"])
    fixed = group["geometry"] == "fixed_rank"
    for parameter in group["params"]:
        if parameter.is_complex():
            raise TypeError(
                f"optimizers of lowrank_geo.optim need real parameters, got a complex one of shape "
                f"{tuple(parameter.shape)}; use torch.view_as_real or another optimizer"
            )
        if group["geometry"] == "matrix" and parameter.dim() < 2:
            raise ValueError(
                f"a matrix group needs parameters of two or more dimensions, got one of shape "
                f"{tuple(parameter.shape)}; put it in a group with geometry='euclidean'"
            )
        if not fixed and guard.is_factor(parameter) and not guard.is_marked(parameter):
            raise ValueError(
                f"optimizers of lowrank_geo.optim need low-rank layers by their triples, got a factor of shape "
                f"{tuple(parameter.shape)} in a {group['geometry']} group; pass lowrank_geo.param_groups(model)"
            )
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


def check_is_state(call: str, saved: Any) -> None:
    """Raise ValueError, naming `call`, unless this is the state of some optimizer."""
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        got = f"one of {list(saved)[:3]}" if isinstance(saved, dict) else repr(saved)
        raise ValueError(
            f"{call} needs a dict with state and param_groups, got {got}; pass optimizer.state_dict()"
        )


def check_state(call: str, fresh: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming `call`, unless a saved state has the tensors of a fresh one."""
    for name, value in fresh.items():
        if name not in saved or saved[name].shape != value.shape:
            got = tuple(saved[name].shape) if name in saved else "nothing"
            raise ValueError(
                f"{call} needs {name} of shape {tuple(value.shape)}, got {got}; "
                "load a state saved with the same optimizer, ranks and layers"
            )
    for name in saved:
        if name not in fresh:
            raise ValueError(
                f"{call} needs a state of {', '.join(fresh)}, got one that has {name}, too; load a state saved "
                "with the same optimizer"
            )


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ValueError or TypeError unless these are two decay rates in [0, 1)."""
    check_pair("betas", betas, (0.95, 0.95))
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(
            f"betas need to be two numbers in [0, 1), got {betas}; pass e.g. (0.95, 0.95)"
        )


def check_nus(nus: tuple[float, float]) -> None:
    """Raise ValueError or TypeError unless these are two weights of averages, in [0, 1]."""
    check_pair("nus", nus, (1.0, 1.0))
    if not all(0 <= nu <= 1 for nu in nus):
        raise ValueError(f"nus need to be two numbers in [0, 1], got {nus}; pass e.g. (0.7, 1.0)")


def check_cycle(group: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless the numbers of a cycle of augmentation and truncation can be."""
    for name, low in (("inner_steps", 1), ("min_rank", 1), ("max_rank", group["min_rank"])):
        value = group[name]
        if value is None and name == "max_rank":
            continue
        check_count(name, value, low)
        if value < low:
            also = " (min_rank)" if name == "max_rank" else ""
            raise ValueError(f"{name} needs to be >= {low}{also}, got {value}; pass e.g. {low}")
    check_number("tolerance", group["tolerance"], 0.1)
    if not 0 <= group["tolerance"] < 1:
        raise ValueError(
            f"tolerance needs to be in [0, 1), got {group['tolerance']}; pass e.g. 0.1, a relative error"
        )


def check_schedule_free(
    optimizer: Any, beta: float, step_size: Any, gradient_at: str, model: Any
) -> None:
    """Raise what the docstring of `ScheduleFree` says."""
    if isinstance(optimizer, type) or not hasattr(optimizer, "pending"):
        got = repr(optimizer) if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            f"ScheduleFree needs an optimizer of lowrank_geo.optim, got {got}; "
            "use e.g. RiemannianAdam(params, betas=(0.0, 0.99)), which off the manifold is AdamW"
        )
    if getattr(optimizer, "changes_rank", False):
        raise TypeError(
            f"ScheduleFree needs an optimizer that keeps the rank, got {type(optimizer).__name__}; "
            "use e.g. RiemannianSGD(params, momentum=0.0)"
        )
    check_number("ScheduleFree's beta", beta, 0.9)
    if not 0 <= beta <= 1:
        raise ValueError(f"ScheduleFree needs beta in [0, 1], got {beta}; pass e.g. 0.9")
    if gradient_at not in ("collapsed", "branches"):
        raise ValueError(
            f"gradient_at needs to be 'collapsed' or 'branches', got {gradient_at!r}; use one of them"
        )
    if gradient_at == "branches" and not isinstance(model, nn.Module):
        raise ValueError(
            f"ScheduleFree with gradient_at='branches' needs the model, got {model!r}; pass model=…"
        )
    if step_size is not None and not isinstance(step_size, Polyak):
        raise TypeError(f"step_size needs a Polyak or None, got {step_size!r}; pass Polyak()")
    if step_size is not None and any(group["maximize"] for group in optimizer.param_groups):
        raise ValueError(
            "Polyak needs maximize=False, got a group with True; it knows a bound from below, negate the loss"
        )


def check_loss(step_size: Polyak | None, loss: Any, lower_bound: float | Tensor | None) -> None:
    """Raise ValueError if Polyak gets no loss, or no Polyak a lower bound; TypeError or ValueError for what is not one
    number.
    """
    if step_size is None and lower_bound is not None:
        raise ValueError(
            f"ScheduleFree.step needs step_size=Polyak() for a lower bound, got {lower_bound} without; "
            "make the optimizer with a Polyak, or leave lower_bound out"
        )
    if step_size is not None and loss is None:
        raise ValueError(
            "ScheduleFree.step needs the loss of the batch for Polyak's step size, got None; "
            "call step(loss=loss) or step(closure)"
        )
    for name, value in (("loss", loss), ("lower_bound", lower_bound)):
        if step_size is not None and value is not None:
            check_scalar(name, value)
