"""From filtered gradient to step direction: identity, row-wise variance, spectral.

A direction is called with the output of the filter and returns a tangent of unit learning rate,
together with its own state. Each is invariant to the gauge (U, S, V) → (UQ, QᵀSP, VP).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.optim.euclidean import unbias
from lowrank_geo.orthonormal import msign

Slots = dict[str, Tangent]  # state by name: one tensor beside each of U, S, V


class Signal(NamedTuple):
    """What a direction sees of one step."""

    output: Tangent  # of the filter
    gradient: Tangent
    momentum: Tangent  # before this step
    step: Tensor  # (L,), counts from 1


class Direction(Protocol):
    """A rule for the step direction."""

    def slots(self, point: Point) -> Slots:
        """Fresh state for one matrix."""
        ...

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]: ...


@dataclass(frozen=True)
class Identity:
    """Steepest descent: the filtered gradient itself."""

    def slots(self, point: Point) -> Slots:
        return {}

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        return signal.output, slots


@dataclass(frozen=True)
class RowVariance:
    """Adam with one second moment per row of Up and of Vp and one for M: mean squares, so r = 1
    is element-wise.

    Rows belong to output and input neurons, which a gauge change or a retraction does not move,
    so these need no transport. With tied betas σ² is stored, σ² ← β σ² + β(1−β)|g − m|², and the
    second moment is m² + σ²; otherwise the second moment itself.

    Source: Orvieto & Gower, arXiv 2505.21829, proposition 1 (the σ² recursion).
    """

    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8

    def slots(self, point: Point) -> Slots:
        U, S, V = point
        shapes = (U.shape[:1], (), V.shape[:1])
        return {"variance": Tangent(*(U.new_zeros(shape) for shape in shapes))}

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        over = ((-1,), (-2, -1), (-1,))  # what one row of Up, the core, one row of Vp average over
        state = slots["variance"]
        parts = [
            self._part(o, g, m, variance, axes, signal.step)
            for o, g, m, variance, axes in zip(
                signal.output, signal.gradient, signal.momentum, state, over, strict=True
            )
        ]
        return Tangent(*(p[0] for p in parts)), {"variance": Tangent(*(p[1] for p in parts))}

    def _part(
        self,
        mean: Tensor,
        gradient: Tensor,
        momentum: Tensor,
        variance: Tensor,
        over: tuple[int, ...],
        step: Tensor,
    ) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        t = step.reshape(-1, *(1,) * (variance.dim() - 1))
        if beta1 == beta2:
            noise = (gradient - momentum).square().mean(over)
            variance = beta2 * variance + beta2 * (1 - beta2) * noise
            second = mean.square().mean(over) + variance
        else:
            variance = beta2 * variance + (1 - beta2) * gradient.square().mean(over)
            second = variance
        second = second / unbias(beta2, t).to(second.dtype)
        scale = 1 / (unbias(beta1, t).to(second.dtype) * (second.sqrt() + self.eps))
        return mean * scale.reshape(*scale.shape, *(1,) * len(over)), variance


@dataclass(frozen=True)
class ProductSpectral:
    """Muon in the product metric: msign of the two rotations and of the core, each with its own
    scale.

    Units: at lr 1, |ΔU|₂ = rotation·√m, |ΔV|₂ = rotation·√n, |ΔS|₂ = spectrum.
    """

    rotation: float = 0.144
    spectrum: float = 0.7

    def slots(self, point: Point) -> Slots:
        return {}

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        Up, M, Vp = signal.output
        m, n = Up.shape[-2], Vp.shape[-2]
        return Tangent(
            msign(Up) * (self.rotation * m**0.5),
            msign(M) * self.spectrum,
            msign(Vp) * (self.rotation * n**0.5),
        ), slots


@dataclass(frozen=True)
class EmbeddedSpectral:
    """Muon in the embedded metric: the projection to the tangent space of msign of the embedded
    momentum.

    Units: at lr 1, |ξ|₂ ≤ scale·√max(m, n) before the projection, as torch.optim.Muon's
        "match_rms_adamw".
    """

    scale: float = 0.2

    def slots(self, point: Point) -> Slots:
        return {}

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        Up, M, Vp = signal.output
        r = M.shape[-1]
        # ξ = [U Q_u] [[M, P_v], [P_u, 0]] [V Q_v]ᵀ with Up = Q_u P_u and Vp = Q_v P_v polar.
        Q_u, Q_v = msign(Up), msign(Vp)
        P_u, P_v = Q_u.mT @ Up, Q_v.mT @ Vp
        core = torch.cat(
            [torch.cat([M, P_v.mT], -1), torch.cat([P_u, torch.zeros_like(M)], -1)], -2
        )
        Z = msign(core) * (self.scale * max(Up.shape[-2], Vp.shape[-2]) ** 0.5)
        return Tangent(Q_u @ Z[..., r:, :r], Z[..., :r, :r], Q_v @ Z[..., :r, r:].mT), slots
