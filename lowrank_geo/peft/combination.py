"""A weighted sum of adapters as an adapter."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lowrank_geo.geometry import Point
from lowrank_geo.lowrank_layer import LowRankLayer
from lowrank_geo.peft.layer import FixedRankLayer

COMBINATIONS = ("svd", "cat")


def weighted_sum(points: Sequence[Point], weights: Sequence[float], rank: int | None) -> Point:
    """Σ wᵢ Uᵢ Sᵢ Vᵢᵀ: the nearest matrix of rank `rank`, or exact with the sum of the ranks for None.

    Shapes: points of one (m, n) and any ranks, U and V need not be orthonormal -> `Point`.
    Error:  a few roundings of the largest term; ranks above min(m, n) are cut to it, which loses nothing.

    >>> from lowrank_geo.geometry import random, to_dense
    >>> a, b = random(8, 6, 2), random(8, 6, 1)
    >>> total = weighted_sum([a, b], [2.0, -1.0], None)
    >>> total.S.shape, torch.allclose(to_dense(total), 2 * to_dense(a) - to_dense(b), atol=1e-5)
    (torch.Size([3, 3]), True)
    """
    core = torch.block_diag(*(w * p.S for w, p in zip(weights, points, strict=True)))
    Q_u, R_u = torch.linalg.qr(torch.cat([p.U for p in points], 1))
    Q_v, R_v = torch.linalg.qr(torch.cat([p.V for p in points], 1))
    P, sigma, Qt = torch.linalg.svd(R_u @ core @ R_v.mT, full_matrices=False)
    r = len(sigma) if rank is None else rank
    return Point((Q_u @ P)[:, :r], torch.diag(sigma[:r]), (Q_v @ Qt.mT)[:, :r])


def combine_layers(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """See `FixedRankModel.add_weighted_adapter`."""
    check_combination(model, adapters, weights, adapter_name, combination_type)
    check_finite(model, adapters, weights, svd_rank)
    configs = [model.peft_config[name] for name in adapters]
    ranks = rank_pattern(model, adapters, combination_type, svd_rank)
    largest = max(config.r for config in configs)
    config = replace(
        configs[0],
        r=svd_rank or (sum(c.r for c in configs) if combination_type == "cat" else largest),
        rank_pattern=ranks,
        target_modules=set().union(*(names_of(model, name) for name in adapters)),
        scale=1.0,
        init="zero",
        dropout=0.0,
    )
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except BaseException:
        del model.peft_config[adapter_name]
        raise
    for _, layer in layers(model):
        if adapter_name in layer.fixed_rank_delta:
            fill(layer, adapters, weights, adapter_name)


def layers(model: Any) -> list[tuple[str, FixedRankLayer]]:
    return [(n, m) for n, m in model.model.named_modules() if isinstance(m, FixedRankLayer)]


def names_of(model: Any, adapter: str) -> set[str]:
    return {name for name, layer in layers(model) if adapter in layer.fixed_rank_delta}


def rank_pattern(
    model: Any, adapters: Sequence[str], combination: str, svd_rank: int | None
) -> dict[str, int]:
    """The rank of the sum at every layer, never above what the layer can have."""
    ranks = {}
    for name, layer in layers(model):
        mine = [layer.fixed_rank_r[a] for a in adapters if a in layer.fixed_rank_delta]
        if mine:
            wanted = sum(mine) if combination == "cat" else (svd_rank or max(mine))
            ranks[name] = min(wanted, *smallest(layer))
    return ranks


def smallest(layer: FixedRankLayer) -> tuple[int, int]:
    """(m, n) of the blocks of a layer."""
    (first, *_) = layer.fixed_rank_delta.values()
    triple = next(module for module in first.modules() if isinstance(module, LowRankLayer))
    return triple.U.shape[0], triple.V.shape[0]


@torch.no_grad()
def fill(
    layer: FixedRankLayer, adapters: Sequence[str], weights: Sequence[float], adapter_name: str
) -> None:
    """Write the weighted sum of the adapters at one layer."""
    present = [
        (a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.fixed_rank_delta
    ]
    sources = [layer.triples(a) for a, _ in present]
    factors = [w * layer.fixed_rank_scale[a] for a, w in present]
    for index, target in enumerate(layer.triples(adapter_name)):
        points = [Point(*(p.detach() for p in triples[index].point)) for triples in sources]
        total = weighted_sum(points, factors, target.rank)
        for parameter, value in zip(target.point, padded(total, target.rank), strict=True):
            parameter.copy_(value)


def padded(point: Point, rank: int) -> Point:
    """The point with a core of size `rank`; more columns of its frames and zeros where it is smaller.

    Shapes: U (m, s), S (s, s), V (n, s), s <= rank -> U (m, rank), S (rank, rank), V (n, rank).
    """
    U, S, V = point
    missing = rank - S.shape[0]
    if missing == 0:
        return point
    core = nn.functional.pad(S, (0, missing, 0, missing))
    return Point(completed(U, rank), core, completed(V, rank))


def completed(Q: torch.Tensor, rank: int) -> torch.Tensor:
    """An orthonormal frame with more columns.

    Shapes: (m, s), s <= rank <= m -> (m, rank).
    """
    extra = torch.randn(Q.shape[0], rank - Q.shape[1], dtype=Q.dtype, device=Q.device)
    for _ in range(2):  # once is not enough where a draw lies almost in the span
        extra = torch.linalg.qr(extra - Q @ (Q.mT @ extra))[0]
    return torch.cat([Q, extra], 1)


def check_finite(
    model: Any, adapters: Sequence[str], weights: Sequence[float], svd_rank: int | None
) -> None:
    """Raise ValueError for a rank below 1, and weights or factors that are not finite."""
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(
            f"`svd_rank` should be a positive integer value but the value passed is {svd_rank}."
        )
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"`weights` should be finite numbers but got {list(weights)}.")
    for _, layer in layers(model):
        for name in adapters:
            factors = [factor for triple in layer.triples(name) for factor in triple.point]
            if not all(torch.isfinite(factor).all() for factor in factors):
                raise ValueError(
                    f"NaNs detected in the weights to combine. The adapter {name} seems to be broken"
                )


def check_combination(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Raise ValueError for what cannot be combined."""
    if adapter_name in model.peft_config:
        raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
    if missing := [name for name in adapters if name not in model.peft_config]:
        raise ValueError(f"Adapter {missing[0]} does not exist")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"Length of `adapters` should be the same as that of `weights` and not 0, but got {len(adapters)} and "
            f"{len(weights)} respectively."
        )
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"Invalid combination_type: {combination_type}. Please use 'svd' or 'cat'."
        )
    configs = [model.peft_config[name] for name in adapters]
    if any(config.block_patterns != configs[0].block_patterns for config in configs):
        raise ValueError("Cannot combine adapters with different `block_patterns`.")
    if any(config.target_parameters for config in configs):
        raise ValueError("add_weighted_adapter does not support targeting nn.Parameter.")
    if any(config.init == "pissa" for config in configs):
        raise ValueError(
            "Cannot combine adapters with `init='pissa'`, of which a part is subtracted. Please export them with "
            "`export_lora` first."
        )
    if any(config.modules_to_save for config in configs):
        raise ValueError(
            "Cannot add weighted adapters targeting the same module with modules_to_save."
        )
