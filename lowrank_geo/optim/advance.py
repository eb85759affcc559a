"""The bound of how far a step goes along the gradient, `max_advance`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_geo.optim.pending import Pending

LEAST_COSINE = (
    1 / 8
)  # of a direction with the gradient; one that has lost the gradient still has a length


def take_all(parts: Iterable[Pending]) -> None:
    """Take every part at the rate of its group, those of groups with the same `max_advance` at a share of it."""
    bounded: dict[float, list[Pending]] = {}
    for part in parts:
        bound = part.group.get("max_advance")  # not in states of before it was there
        if bound is None:
            part.take(part.group["lr"])
        else:
            bounded.setdefault(bound, []).append(part)
    for bound, held in bounded.items():
        for part in held:
            if not isinstance(largest := peak(part.group), Tensor):
                part.group["peak_lr"] = largest
        slopes = [part.slope() for part in held]
        fraction = share(held, slopes, bound)
        for part, slope in zip(held, slopes, strict=True):
            part.take(part.group["lr"] * fraction.to(slope.device))


def share(parts: list[Pending], slopes: list[Tensor], bound: float) -> Tensor:
    """What part of a step D = Σ peak·direction advances by at most the bound: min(1, bound / advance).

    advance = max(⟨g, D⟩/|g|, |D|/8), the way that D goes along the gradient g of all parts, in the metric, which is
    what a gradient of norm 1 promises of decrease. Rates are those of the peak of a schedule, which so shortens bounded
    steps as others. Gauge-free and free of the scale of the loss; no read-back to the host. 0 where it is not finite.

    Shapes: -> ().
    Source: the linear model that is trusted up to a bound is that of trust-region methods (Nocedal & Wright, Numerical
        Optimization, chapter 4); on the predicted change of a whole step, the clipping of K-FAC (Ba, Grosse & Martens,
        Distributed second-order optimization using Kronecker-factored approximations, ICLR 2017).
    """
    at = slopes[0]
    along, gradient, direction = (0 * at for _ in range(3))
    for part, slope in zip(parts, slopes, strict=True):
        rate = peak(part.group)
        rate = rate.to(at.device) if isinstance(rate, Tensor) else rate
        first, second = part.squares().to(at).sqrt()
        along = along + rate * slope.to(at)
        gradient, direction = gradient.hypot(first), direction.hypot(rate * second)
    along = along / gradient.clamp(min=torch.finfo(at.dtype).tiny)
    advance = torch.maximum(along, LEAST_COSINE * direction)
    fraction = torch.where(advance > bound, bound / advance, 1.0)
    return torch.where(advance.isfinite(), fraction, 0.0)


def peak(group: dict[str, Any]) -> float | Tensor:
    """The largest rate of a group under its schedule: the present one, the largest so far, which the group remembers
    unless it is a tensor, the one that torch's schedulers start from, and the largest of a cycle.

    Shapes: -> () where the rate is a tensor.
    """
    rates = [group[key] for key in ("lr", "initial_lr", "max_lr", "peak_lr") if key in group]
    if not any(isinstance(rate, Tensor) for rate in rates):
        return max(rates)
    device = next(rate.device for rate in rates if isinstance(rate, Tensor))
    return torch.stack([torch.as_tensor(rate, device=device) for rate in rates]).amax()
