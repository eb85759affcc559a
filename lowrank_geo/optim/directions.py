"""From filtered gradient to step direction: identity, sign, clip, spectral. The adaptive one is in `variance`.

A direction is called with what one step knows of a batch of matrices and returns a tangent of unit learning rate,
together with its own state. Most are invariant to the gauge (U, S, V) → (UQ, QᵀSP, VP); those that are not say so.
`flat` is the same rule for parameters that are not factors.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_geo import dispatch
from lowrank_geo.geometry import Point, Tangent
from lowrank_geo.msign import msign, polar_express
from lowrank_geo.optim.values import check_number

Slots = dict[str, Tangent]  # state by name: one tensor beside each of U, S, V
State = dict[str, Tensor]  # of one flat parameter, by name


class Signal(NamedTuple):
    """What a direction sees of one step: tangents at the current points, batched."""

    output: Tangent  # of the filter
    gradient: Tangent
    momentum: Tangent  # before this step
    mean: Tangent  # the momentum with this step's gradient in it
    step: Tensor  # (L,), counts from 1


class FlatSignal(NamedTuple):
    """The same for parameters off the manifold: one tensor each."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    noise: list[
        Tensor
    ]  # gradient − momentum before this step; empty unless the direction watches it
    steps: list[Tensor]  # 0-d, count from 1


class Direction(Protocol):
    """A rule for the step direction."""

    @property
    def flat_slots(self) -> tuple[str, ...]:
        """Names of the states of a flat parameter besides its momentum."""
        ...

    @property
    def watches_noise(self) -> bool:
        """Whether it reads gradient − momentum."""
        ...

    @property
    def leaves_tangents(self) -> bool:
        """Whether Up and Vp leave their spans, so that what lies in span(U), span(V) has to be removed again."""
        ...

    def slots(self, point: Point) -> Slots:
        """Fresh state for one matrix."""
        ...

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]: ...

    def carry(self, slots: Slots, old: Point, new: Point) -> Slots:
        """The state after the matrices have moved."""
        ...

    def flat(self, signal: FlatSignal, states: list[State]) -> list[Tensor]:
        """Directions of flat parameters; updates their states in place."""
        ...


class Stateless:
    """A direction without state of its own."""

    @property
    def flat_slots(self) -> tuple[str, ...]:
        return ()

    @property
    def watches_noise(self) -> bool:
        return False

    @property
    def leaves_tangents(self) -> bool:
        return False

    def slots(self, point: Point) -> Slots:
        return {}

    def carry(self, slots: Slots, old: Point, new: Point) -> Slots:
        return slots


@dataclass(frozen=True)
class Identity(Stateless):
    """Steepest descent: the filtered gradient itself."""

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        return signal.output, slots

    def flat(self, signal: FlatSignal, states: list[State]) -> list[Tensor]:
        return signal.outputs


@dataclass(frozen=True)
class Sign(Stateless):
    """The sign of every coordinate: Signum, Lion. Not gauge-invariant; `ProductSpectral` and `EmbeddedSpectral` are.

    Units: at lr 1, every coordinate moves by 1 before the projection to the tangent space.
    Source: Bernstein et al., ICML 2018; Chen et al., Lion, NeurIPS 2023.
    """

    @property
    def leaves_tangents(self) -> bool:
        return True

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        return Tangent(*(x.sign() for x in signal.output)), slots

    def flat(self, signal: FlatSignal, states: list[State]) -> list[Tensor]:
        return [x.sign() for x in signal.outputs]


@dataclass(frozen=True)
class Clip(Stateless):
    """Every coordinate of the filtered gradient clipped to ±limit. Not gauge-invariant.

    Raises: ValueError unless limit > 0.
    Source: Orvieto & Gower, arXiv 2505.21829 (coordinate clipping after the average).
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        check_number("clip", self.limit, 1.0)
        if not self.limit > 0:
            raise ValueError(f"Clip needs limit > 0, got {self.limit}; pass e.g. 1.0")

    @property
    def leaves_tangents(self) -> bool:
        return True

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        return Tangent(*(x.clamp(-self.limit, self.limit) for x in signal.output)), slots

    def flat(self, signal: FlatSignal, states: list[State]) -> list[Tensor]:
        return [x.clamp(-self.limit, self.limit) for x in signal.outputs]


@dataclass(frozen=True)
class Spectral(Stateless):
    """What the spectral directions do to dense matrices: their polar factor.

    Units: at lr 1, |ΔW|₂ = scale·√max(m, n), as torch.optim.Muon's "match_rms_adamw".
    Source: Jordan et al., Muon, 2024.
    """

    scale: float = 0.2

    def flat(self, signal: FlatSignal, states: list[State]) -> list[Tensor]:
        """A convolution counts as an out × (in·kh·kw) matrix."""
        directions = []
        for output in signal.outputs:
            matrix = output.flatten(1)
            size = self.scale * max(matrix.shape) ** 0.5
            directions.append((msign(matrix) * size).reshape(output.shape))
        return directions


@dataclass(frozen=True)
class ProductSpectral(Spectral):
    """Muon in the product metric: msign of the two rotations and of the core, each with its own
    scale.

    Units: at lr 1, |ΔU|₂ = rotation·√m, |ΔV|₂ = rotation·√n, |ΔS|₂ = spectrum.
    """

    rotation: float = 0.144
    spectrum: float = 0.7

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        Up, M, Vp = signal.output
        m, n = Up.shape[-2], Vp.shape[-2]
        return Tangent(
            dispatch.spectral(Up) * (self.rotation * m**0.5),
            dispatch.spectral(M) * self.spectrum,
            dispatch.spectral(Vp) * (self.rotation * n**0.5),
        ), slots


@dataclass(frozen=True)
class EmbeddedSpectral(Spectral):
    """Muon in the embedded metric: the projection to the tangent space of the polar factor of the embedded momentum.

    Units: at lr 1, |ξ|₂ ≤ scale·√max(m, n) before the projection, as torch.optim.Muon's
        "match_rms_adamw".
    """

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        Up, M, Vp = signal.output
        r = M.shape[-1]
        # ξ = [U Q_u] [[M, P_vᵀ], [P_u, 0]] [V Q_v]ᵀ with Up = Q_u P_u and Vp = Q_v P_v.
        (P_u, T_u, d_u), (P_v, T_v, d_v) = dispatch.damped_factor(Up), dispatch.damped_factor(Vp)
        core = torch.cat(
            [torch.cat([M, P_v.mT], -1), torch.cat([P_u, torch.zeros_like(M)], -1)], -2
        )
        Z = polar_express(core) * (self.scale * max(Up.shape[-2], Vp.shape[-2]) ** 0.5)
        return Tangent(
            dispatch.apply(Up, T_u @ Z[..., r:, :r], d_u),
            Z[..., :r, :r],
            dispatch.apply(Vp, T_v @ Z[..., :r, r:].mT, d_v),
        ), slots
