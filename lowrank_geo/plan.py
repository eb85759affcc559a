"""plan_ranks: which layer of a model gets which rank, and the exact number of parameters, before any change."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lowrank_geo.allocation import factored_size
from lowrank_geo.candidates import DEFAULT_SKIP, Candidate, all_names, find_candidates, matches
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.plan_format import Entry, Plan
from lowrank_geo.ranking import Choice, Wish, choose

__all__ = ["Entry", "Plan", "current_plan", "dense_size", "plan_ranks"]


def plan_ranks(
    model: nn.Module,
    ranks: Mapping[str, int] | None = None,
    *,
    budget: float | None = None,
    rank: int | None = None,
    ratio: float | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
    min_rank: int = 1,
    multiple_of: int = 1,
    init: str = "svd",
) -> Plan:
    """Which layer of `model` gets which rank; changes nothing and works on `meta`.

    Exactly one of: `budget`, the fraction of the parameters of the whole dense model to keep, met exactly or from
    below with one ratio r / min(m, n) for all layers; `ratio`, that number itself; `rank`, the same for all;
    `ranks`, by pattern: the first that matches a layer decides, a layer without one stays dense. Patterns, in `skip`
    too, are names of modules or their last parts, with * and ?, and mean everything inside. `min_rank` and
    `multiple_of` go with `budget` and `ratio`. A layer that its rank would not make smaller stays dense.

    Raises: ValueError for a value out of range, a pattern that matches nothing, a budget that `min_rank` puts out of
    reach; TypeError for a value of another type.

    >>> plan = plan_ranks(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), budget=0.5)
    >>> plan.ranks, plan.parameters, plan.slack
    ({'0': 15, '2': 1}, 2290, 50)
    """
    wish = Wish(budget, rank, ratio, ranks, min_rank, multiple_of, init)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    _check_model(model, [pattern for pattern in skip if pattern not in DEFAULT_SKIP])
    candidates = find_candidates(model, skip)
    total = dense_size(model)
    choices = choose(wish, candidates, total, count(model))
    entries = _entries(candidates, choices)
    size = total - sum(e.dense_parameters - e.parameters for e in entries)
    limit = size if budget is None else int(budget * total)
    return Plan(entries, init, total, size, None if budget is None else float(budget), limit - size)


def current_plan(model: nn.Module) -> Plan:
    """The plan of the model as it is now, with the reasons and errors of its `lowrank_plan` where they still hold."""
    kept = getattr(model, "lowrank_plan", None)
    kept = kept if isinstance(kept, Plan) else None
    notes = {} if kept is None else {entry.name: entry for entry in kept.entries}
    entries = []
    for entry in _entries(find_candidates(model), {}):
        note = notes.get(entry.name)
        if note is not None and note.rank == entry.rank:
            entry = replace(entry, reason=note.reason, error=note.error)
        entries.append(entry)
    total, size = dense_size(model), count(model)
    init = "svd" if kept is None else kept.init
    if kept is None or kept.budget is None:
        return Plan(tuple(entries), init, total, size, None, 0)
    return Plan(tuple(entries), init, total, size, kept.budget, int(kept.budget * total) - size)


def count(model: nn.Module) -> int:
    """The parameters of the model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def dense_size(model: nn.Module) -> int:
    """The parameters of the model if its low-rank layers were dense, tied ones once.

    >>> dense_size(nn.Linear(3, 2))
    8
    """
    return count(model) + sum(_saved(layer) for _, layer in lowrank_layers(model))


def _saved(layer: LowRankLayer) -> int:
    m, n = layer.U.shape[0], layer.V.shape[0]
    return m * n - factored_size(m, n, layer.rank)


def _entries(candidates: Sequence[Candidate], choices: Mapping[str, Choice]) -> tuple[Entry, ...]:
    """One entry for each candidate; a layer without a choice stays as it is."""
    counted: set[int] = set()
    entries = []
    for c in candidates:
        own = c.module.parameters(recurse=is_parametrized(c.module))
        fresh = [p for p in own if id(p) not in counted]
        counted.update(map(id, fresh))
        size = sum(p.numel() for p in fresh)
        if isinstance(c.module, LowRankLayer):
            choice, dense = Choice(c.module.rank, c.reason), size + _saved(c.module)
        else:
            choice, dense = choices.get(c.name, Choice(None, c.reason or "not converted")), size
            if choice.rank is not None:
                size += factored_size(c.m, c.n, choice.rank) - c.m * c.n
        entries.append(Entry(c.name, c.kind, c.m, c.n, *choice, dense, size))
    return tuple(entries)


def _check_model(model: nn.Module, patterns: Sequence[str]) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"plan_ranks needs parameters with a shape, got the uninitialised {name!r}; "
                "run one forward pass first"
            )
    names = [name for listed in all_names(model).values() for name in listed]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"plan_ranks needs patterns in skip that match a module, got {pattern!r}, which matches none; "
                "see model.named_modules() for the names"
            )
