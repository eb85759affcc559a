"""convert: dense layers become low-rank ones in place; to_dense and to_factors: the way back, to deploy."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from lowrank_geo.candidates import Candidate, find_candidates, hooked
from lowrank_geo.geometry import to_dense as matrix_of
from lowrank_geo.init import working_copy
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.plan import Entry, Plan, plan_ranks
from lowrank_geo.replacement import dense, low_rank, model_dtype, swap, two_factors, weight_matrix

# The root itself changes type if it is one layer; every other model is returned as it came.
Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, plan: Plan | Mapping[str, int] | None = None, **wishes: Any) -> Model:
    """Make the layers of a plan low-rank, in place, and return the model.

    `wishes` are those of `plan_ranks`, in place of a plan. Names, biases, devices, `training` and `requires_grad`
    stay; factors are float32 or better. Layers that are low-rank already are left alone. If anything fails, nothing is
    changed. The plan, with the relative errors of the weights, is kept as `model.lowrank_plan`. Make optimizers
    afterwards: the weights are new parameters.

    Raises: ValueError if the plan does not fit the model or a weight is not finite; TypeError for a plan and wishes.

    >>> model = convert(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), ratio=0.25)
    >>> model[0]
    LowRankLinear(in_features=32, out_features=32, rank=8, bias=True, gradient='factors')
    """
    if not isinstance(plan, Plan):
        plan = plan_ranks(model, plan, **wishes)
    elif wishes:
        raise TypeError(
            f"convert needs a plan or what plan_ranks takes, got a plan and {', '.join(wishes)}; leave one out"
        )
    _refuse_wrapped(model)
    new: dict[nn.Module, nn.Module] = {}
    errors = known_errors(model)
    for entry, candidate in layers_to_convert(model, plan):
        assert entry.rank is not None
        _check_finite(candidate)
        layer = low_rank(candidate.module, entry.rank, plan.init)
        new[candidate.module], errors[entry.name] = layer, relative_error(candidate.module, layer)
    converted: Any = swap(model, new)
    converted.lowrank_plan = with_errors(plan, errors)
    return converted


def to_dense(model: Model) -> Model:
    """Turn low-rank layers back into Linear, Conv1D and Conv2d with the weight U S Vᵀ, in place.

    The weights get the dtype of the bias, or of most other parameters. `lowrank_plan` is removed.
    Raises: ValueError for a layer with hooks, which would be lost.

    >>> to_dense(convert(nn.Sequential(nn.Linear(32, 32)), rank=4))
    Sequential(
      (0): Linear(in_features=32, out_features=32, bias=True)
    )
    """
    return _restore(model, "to_dense", dense)


def to_factors(model: Model) -> Model:
    """Turn low-rank layers into two plain layers in sequence, Vᵀ then U S, in place: nothing of lowrank_geo computes.

    Raises: ValueError for a layer with hooks, which would be lost.

    >>> to_factors(convert(nn.Sequential(nn.Linear(32, 32)), rank=4))[0][1]
    Linear(in_features=4, out_features=32, bias=True)
    """
    return _restore(model, "to_factors", two_factors)


def layers_to_convert(model: nn.Module, plan: Plan) -> list[tuple[Entry, Candidate]]:
    """The layers that the plan wants low-rank and that are dense now.

    Raises: ValueError if the plan does not fit the model.
    """
    found = {name: c for c in find_candidates(model) for name in c.names}
    pairs = []
    for entry in plan.entries:
        if entry.rank is None:
            continue
        candidate = found.get(entry.name)
        if candidate is None:
            _refuse_plan(entry, "a model without such a layer")
        here = (candidate.kind, candidate.m, candidate.n)
        if here != (entry.kind, entry.m, entry.n):
            _refuse_plan(entry, f"a {here[0]} of {here[1]}x{here[2]}")
        if isinstance(candidate.module, LowRankLayer):
            if candidate.module.rank != entry.rank:
                _refuse_plan(entry, f"a layer of rank {candidate.module.rank} already")
        elif candidate.reason:
            _refuse_plan(entry, f"a layer that must stay dense: {candidate.reason}")
        else:
            pairs.append((entry, candidate))
    return pairs


def known_errors(model: nn.Module) -> dict[str, float | None]:
    """The errors measured by an earlier conversion, of layers that still have its rank."""
    plan = getattr(model, "lowrank_plan", None)
    ranks = {name: layer.rank for name, layer in lowrank_layers(model)}
    entries = plan.entries if isinstance(plan, Plan) else ()
    return {e.name: e.error for e in entries if e.rank is not None and ranks.get(e.name) == e.rank}


def with_errors(plan: Plan, errors: Mapping[str, float | None]) -> Plan:
    """The plan with the errors of the layers named."""
    entries = [replace(e, error=errors.get(e.name, e.error)) for e in plan.entries]
    return replace(plan, entries=tuple(entries))


def relative_error(module: nn.Module, layer: LowRankLayer) -> float | None:
    """|W − U S Vᵀ| / |W| in the Frobenius norm; None on meta, 0 for W = 0 kept."""
    if layer.U.is_meta:
        return None
    W = working_copy(weight_matrix(module))
    lost = torch.linalg.vector_norm(W - matrix_of(layer.point).detach())
    return (lost / torch.linalg.vector_norm(W).clamp_min(torch.finfo(W.dtype).tiny)).item()


def _restore(
    model: Model, call: str, build: Callable[[LowRankLayer, torch.dtype], nn.Module]
) -> Model:
    new: dict[nn.Module, nn.Module] = {}
    common = model_dtype(model)
    for name, layer in lowrank_layers(model):
        if hooked(layer):
            raise ValueError(
                f"{call} needs layers without hooks, got some on {name!r}; remove them first"
            )
        dtype = layer.bias.dtype if layer.bias is not None else common or layer.U.dtype
        new[layer] = build(layer, dtype)
    restored: Any = swap(model, new)
    vars(restored).pop("lowrank_plan", None)
    return restored


def _check_finite(candidate: Candidate) -> None:
    weight = candidate.module.weight
    assert isinstance(weight, nn.Parameter)
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError(
            f"convert needs finite weights, got NaN or infinity in {candidate.name!r}; reload the model"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "convert needs a model that is not wrapped, got DistributedDataParallel; convert first, then wrap"
            )


def _refuse_plan(entry: Entry, found: str) -> NoReturn:
    raise ValueError(
        f"convert needs a model with a {entry.kind} of {entry.m}x{entry.n} at {entry.name!r} for rank {entry.rank}, "
        f"got {found}; make the plan from this model"
    )
