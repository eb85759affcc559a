"""The two factors of LoRA adapters, found in a model, and the point of the manifold that they are."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_geo.geometry import Point
from lowrank_geo.orthonormal import orthonormalize
from lowrank_geo.precision import full_precision


class Factors(NamedTuple):
    """The factors of one adapter, W = scaling · B A."""

    name: str
    B: nn.Parameter  # (m, r)
    A: nn.Parameter  # (r, n)
    scaling: float
    is_dora: bool


class Pair(NamedTuple):
    """The factors of one adapter and the point that they are."""

    B: nn.Parameter  # (m, r)
    A: nn.Parameter  # (r, n)
    scaling: float
    point: Point


def lora_factors(model: nn.Module) -> Iterator[Factors]:
    """The trained pairs of matrices of PEFT's LoRA layers, found by their names: PEFT need not be installed."""
    for name, module in model.named_modules():
        layer: Any = module
        downs, ups = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if not isinstance(downs, nn.ModuleDict) or not isinstance(ups, nn.ModuleDict):
            continue
        for adapter in downs:
            A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            if A.dim() == 2 and A.requires_grad and B.requires_grad:
                is_dora = getattr(layer, "use_dora", {}).get(adapter, False)
                yield Factors(name, B, A, float(layer.scaling[adapter]), is_dora)


def lora_pairs(model: nn.Module) -> Iterator[Pair]:
    """The pairs of a model with their points.

    Raises: ValueError for DoRA.
    """
    for name, B, A, scaling, is_dora in lora_factors(model):
        if is_dora:
            raise ValueError(
                f"LoRAPreconditioned needs plain LoRA, got DoRA at {name!r}; train DoRA with torch.optim.AdamW"
            )
        yield Pair(B, A, scaling, point_of(B, A, scaling))


@torch.no_grad()
@full_precision()
def point_of(B: Tensor, A: Tensor, scaling: float) -> Point:
    """s B A as a point of parameters of its own.

    Shapes: B (m, r), A (r, n) -> `Point`.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    B, A = B.detach().to(dtype) * scaling, A.detach().to(dtype)
    V, R = torch.linalg.qr(A.mT)  # A = Rᵀ Vᵀ
    K = B @ R.mT  # s B A = K Vᵀ
    # The same on every process: where B = 0 this is what U starts as.
    drawn = torch.randn(K.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U = orthonormalize(K, torch.linalg.qr(drawn)[0].to(K))
    return Point(*(nn.Parameter(x.contiguous()) for x in (U, U.mT @ K, V)))


def written(pair: Pair) -> Pair:
    """The pair after `write`."""
    write(pair)
    return pair


@torch.no_grad()
@full_precision()
def write(pair: Pair) -> None:
    """Make the factors those of the point: A = Vᵀ, B = U S / s."""
    pair.A.copy_(pair.point.V.mT)
    pair.B.copy_(pair.point.U @ pair.point.S / pair.scaling)
