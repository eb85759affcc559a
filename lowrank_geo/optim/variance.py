"""Second moments: what divides the filtered gradient in Adam and its relatives.

On the manifold a second moment belongs to rows of Up and Vp, which are output and input neurons: a change of gauge or a
retraction does not move them, so they need no transport. Off the manifold it belongs to elements.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_geo.geometry import Point, Tangent, norm
from lowrank_geo.optim.directions import FlatSignal, Signal, Slots, State
from lowrank_geo.optim.filters import unbias
from lowrank_geo.optim.values import check_number

Over = Literal["row", "matrix", "core"]


@dataclass(frozen=True)
class Variance:
    """output/(√second + ε), with mean squares over what shares one second moment, so that r = 1 is element-wise.

    `gamma` is None: second = EMA[g²]. A number: second = m² + σ², σ² ← β σ² + γ(1−β)|g − m|² with the old m, which for
    γ = β and a first moment of the same β is Adam with tied betas, without the cancellation of v − m². `nu` mixes the
    current square in, as QHAdam does. Both are divided by 1 − βᵗ.

    `over`: "row", one number for each row of Up and Vp and one for M; "matrix", one number for all; "core", rows of Up
    and Vp and every entry of M, carried along as (P∘P)ᵀ σ² (Q∘Q), which is exact for uncorrelated entries but not
    invariant to the gauge. An entry of M has an age of its own there: of the weight 1 − βᵗ of the gradients before, it
    has kept a part, since frames that turn away take some with them, and is divided by what it has kept.

    `max_rms`: directions are scaled down to a root mean square of at most this, over all coordinates of Up, M and Vp
    together, or of a flat parameter; None leaves them as they are. Without it, that of Adam is 1 in the first step and
    0.2 to 0.4 in the long run.

    Raises: ValueError for values out of range.
    Source: Orvieto & Gower, arXiv 2505.21829, proposition 1 and appendix C.4 (AdaVar); Ma & Yarats, arXiv 1810.06801
        (ν); Bécigneul & Ganea, arXiv 1810.00760 ("matrix"); Shazeer & Stern, arXiv 1804.04235, section 6 (update
        clipping), here over a whole triple; Liu et al., arXiv 2502.16982 (root mean squares of Adam's updates).
    """

    beta: float = 0.95
    eps: float = 1e-8
    gamma: float | None = 0.95
    nu: float = 1.0
    over: Over = "row"
    max_rms: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"Variance needs beta in [0, 1), got {self.beta}; pass e.g. 0.95")
        check_number("eps", self.eps, 1e-8)
        if not self.eps >= 0:
            raise ValueError(f"Variance needs eps >= 0, got {self.eps}; pass e.g. 1e-8")
        if self.gamma is not None:
            check_number("gamma", self.gamma, 0.95)
        if self.gamma is not None and not 0 <= self.gamma < float("inf"):
            raise ValueError(f"Variance needs gamma >= 0, got {self.gamma}; pass e.g. 0.95")
        if not 0 <= self.nu <= 1:
            raise ValueError(f"Variance needs nu in [0, 1], got {self.nu}; pass 1.0")
        if self.over not in ("row", "matrix", "core"):
            raise ValueError(
                f"Variance needs over 'row', 'matrix' or 'core', got {self.over!r}; use one of them"
            )
        if self.max_rms is not None:
            check_number("max_rms", self.max_rms, 0.2)
            if not self.max_rms > 0:
                raise ValueError(f"Variance needs max_rms > 0, got {self.max_rms}; pass e.g. 0.2")

    @property
    def flat_slots(self) -> tuple[str, ...]:
        return ("variance",)

    @property
    def watches_noise(self) -> bool:
        return self.gamma is not None

    @property
    def leaves_tangents(self) -> bool:
        return True

    def slots(self, point: Point) -> Slots:
        U, S, V = point
        core = S.shape if self.over == "core" else ()
        rows = self.over != "matrix"
        shapes = (U.shape[:1] if rows else (), core, V.shape[:1] if rows else ())
        found = {"variance": Tangent(*(U.new_zeros(shape) for shape in shapes))}
        if self.over == "core":
            found["kept"] = Tangent(U.new_ones(()), torch.ones_like(S), V.new_ones(()))
        return found

    def carry(self, slots: Slots, old: Point, new: Point) -> Slots:
        if self.over != "core":
            return slots
        # The squares of the old coordinates of the new frames, which are those of I only up to rounding if none moved.
        P, Q = (old.U.mT @ new.U).square(), (old.V.mT @ new.V).square()
        rest = (still(old.U, new.U) & still(old.V, new.V))[..., None, None]
        return {
            name: state._replace(M=torch.where(rest, state.M, P.mT @ state.M @ Q))
            for name, state in slots.items()
        }

    def __call__(self, signal: Signal, slots: Slots) -> tuple[Tangent, Slots]:
        noise = Tangent(
            *(g - m for g, m in zip(signal.gradient, signal.momentum, strict=True))
            if self.watches_noise
            else signal.gradient
        )
        sample, square, current = (self._means(x) for x in (noise, signal.mean, signal.gradient))
        variance = Tangent(
            *(self._average(v, s) for v, s in zip(slots["variance"], sample, strict=True))
        )
        found, weight = {**slots, "variance": variance}, unbias(self.beta, signal.step)
        weights = Tangent(weight, weight, weight)
        if self.over == "core":
            kept, newest = slots["kept"], (1 - self.beta) / weight[:, None, None]
            core = torch.lerp(kept.M, torch.ones_like(kept.M), newest.to(kept.M.dtype))
            found["kept"] = kept._replace(M=core)
            weights = weights._replace(M=weight[:, None, None] * core)
        direction = [
            output / expand((self._second(v, m, g, w).sqrt() + self.eps).to(output.dtype), output)
            for output, v, m, g, w in zip(
                signal.output, variance, square, current, weights, strict=True
            )
        ]
        return self._bounded(Tangent(*direction)), found

    def flat(self, signal: FlatSignal, states: list[State]) -> list[Tensor]:
        variances = [s["variance"] for s in states]
        sample = signal.noise if self.watches_noise else signal.gradients
        torch._foreach_mul_(variances, self.beta)
        torch._foreach_addcmul_(variances, sample, sample, value=self._weight)
        directions = []
        for output, v, m, g, step in zip(
            signal.outputs, variances, signal.means, signal.gradients, signal.steps, strict=True
        ):
            square = m.square() if self.watches_noise else m
            weight = unbias(self.beta, step)
            second = self._second(v, square, g.square() if self.nu < 1 else g, weight)
            directions.append(output / second.sqrt_().add_(self.eps))
        if self.max_rms is not None:
            norms = torch._foreach_norm(directions)
            pairs = zip(directions, norms, strict=True)
            torch._foreach_mul_(
                directions, [shrinkage(self.max_rms, d.numel(), n) for d, n in pairs]
            )
        return directions

    @property
    def _weight(self) -> float:
        return (1 if self.gamma is None else self.gamma) * (1 - self.beta)

    def _average(self, variance: Tensor, sample: Tensor) -> Tensor:
        return self.beta * variance + self._weight * sample

    def _second(self, variance: Tensor, mean: Tensor, current: Tensor, weight: Tensor) -> Tensor:
        """The unbiased second moment from σ² or v, m² and g², and the weight that it has gathered."""
        second = variance + mean if self.watches_noise else variance.clone()
        second = second / expand(weight, second).to(second.dtype)
        return second if self.nu == 1 else (1 - self.nu) * current + self.nu * second

    def _bounded(self, xi: Tangent) -> Tangent:
        if self.max_rms is None:
            return xi
        factor = shrinkage(self.max_rms, sum(x[0].numel() for x in xi), norm(xi))
        return Tangent(*(factor[:, None, None] * x for x in xi))

    def _means(self, xi: Tangent) -> Tangent:
        """Mean squares over what shares a second moment.

        Shapes: (L, m, r), (L, r, r), (L, n, r) -> (L, m), (L) or (L, r, r), (L, n); for "matrix" thrice (L).
        """
        up, core, vp = (x.square() for x in xi)
        if self.over == "matrix":
            count = up[0].numel() + core[0].numel() + vp[0].numel()
            one = (up.sum((-2, -1)) + core.sum((-2, -1)) + vp.sum((-2, -1))) / count
            return Tangent(one, one, one)
        return Tangent(
            up.mean(-1), core if self.over == "core" else core.mean((-2, -1)), vp.mean(-1)
        )


def shrinkage(limit: float, count: int, length: Tensor) -> Tensor:
    """What makes the root mean square of `count` numbers of this Euclidean length at most `limit`; 1 if it is.

    Shapes: (...) -> (...).
    """
    return (limit * count**0.5 / length).clamp(max=1)


def still(old: Tensor, new: Tensor) -> Tensor:
    """Whether a matrix has not moved by a bit.

    Shapes: twice (..., m, r) -> (...).
    """
    return (old == new).all(-1).all(-1)


def expand(scale: Tensor, like: Tensor) -> Tensor:
    """Trailing dimensions of 1 until `scale` broadcasts over `like`.

    Shapes: (L), (L, m) or (L, r, r) with (L, m, r) -> three dimensions.
    """
    return scale.reshape((*scale.shape, *(1,) * (like.dim() - scale.dim())))
