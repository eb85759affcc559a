"""What a run records about its low-rank layers: ranks, singular values, drift of the frames, transport.

Everything here reads parameters and changes nothing. It waits for the device, so it belongs between steps.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_geo.layers import lowrank_layers

DIGITS = 6  # of a recorded singular value: half the bytes of a full float64 in JSON


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of W = U S Vᵀ, layer by layer, which are those of S.

    Shapes: S (r, r) -> (r), float64 on the CPU, descending; all NaN where S is not finite.

    >>> from lowrank_geo.layers import LowRankLinear
    >>> layer = LowRankLinear.from_weight(torch.diag(torch.tensor([3.0, 2.0, 1.0])), None, rank=2)
    >>> spectra(nn.Sequential(layer))["0"].round(decimals=4)
    tensor([3., 2.], dtype=torch.float64)
    """
    return singular_values({name: layer.S.detach() for name, layer in lowrank_layers(model)})


def singular_values(cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The singular values of each matrix, one batched decomposition per shape.

    Shapes: (m, n) -> (min(m, n)), float64 on the CPU, descending; all NaN for a matrix that is not finite.
    """
    shapes: dict[torch.Size, list[str]] = {}
    for name, core in cores.items():
        shapes.setdefault(core.shape, []).append(name)
    found: dict[str, Tensor] = {}
    for names in shapes.values():
        batch = torch.stack([cores[name].to("cpu", torch.float64) for name in names])
        finite = batch.isfinite().all((-2, -1))[:, None]  # (layers, 1)
        # svdvals raises for the whole batch on one NaN, and a diverged run is when these numbers are wanted.
        values = torch.linalg.svdvals(batch.where(finite[..., None], 0.0))
        found |= zip(names, values.where(finite, torch.nan), strict=True)
    return {name: found[name] for name in cores}


def orthonormality(model: nn.Module) -> dict[str, float]:
    """The drift of the frames, layer by layer: the largest entry of |UᵀU − I| and |VᵀV − I|.

    Error:  measured in float64, so that what it reports is the drift and not the rounding of the measurement.

    >>> from lowrank_geo.layers import LowRankLinear
    >>> orthonormality(nn.Sequential(LowRankLinear(6, 4, rank=2)))["0"] < 1e-6
    True
    """
    names, drifts = [], []
    for name, layer in lowrank_layers(model):
        names.append(name)
        drifts.append(drift((layer.U, layer.V)).cpu())
    return dict(zip(names, torch.stack(drifts).tolist(), strict=True)) if drifts else {}


def drift(frames: Iterable[Tensor]) -> Tensor:
    """The largest entry of |QᵀQ − I| over the given frames; NaN if one of them holds a NaN.

    Shapes: Q (m, r) -> ().
    """
    return torch.stack([_deviation(Q.detach()) for Q in frames]).max()


def _deviation(Q: Tensor) -> Tensor:
    Q = Q if Q.device.type == "mps" else Q.double()  # mps has no float64
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return (Q.mT @ Q - identity).abs().max().float()


def snapshot(model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """The layers' part of a "diagnostics" line of `metrics.jsonl`: plain numbers, None where JSON has none.

    "ranks" are the widths of the factors, or what an optimizer that changes the rank has in use of them.
    "transport" holds |Tξ|/|ξ| of the last step for an optimizer that reports it, and is empty otherwise;
    "signal_to_noise", of the gradients, is there for optimizers that estimate it.

    >>> from lowrank_geo.layers import LowRankLinear
    >>> sorted(snapshot(nn.Sequential(LowRankLinear(6, 4, rank=2))))
    ['orthonormality', 'ranks', 'spectra', 'transport']
    """
    transports = getattr(optimizer, "transports", dict)
    noise = getattr(optimizer, "signal_to_noise", None)
    ranks = getattr(optimizer, "ranks", dict)
    known = {} if noise is None else {"signal_to_noise": _finite(float(noise()))}
    return known | {
        "ranks": {name: layer.rank for name, layer in lowrank_layers(model)} | ranks(),
        "spectra": {
            name: [_finite(float(f"{value:.{DIGITS}g}")) for value in values.tolist()]
            for name, values in spectra(model).items()
        },
        "orthonormality": {name: _finite(value) for name, value in orthonormality(model).items()},
        "transport": {name: _finite(float(value)) for name, value in transports().items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
