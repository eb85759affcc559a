"""Polyak step sizes: how far the loss is above its lower bound, over how fast it falls."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_geo.optim.values import check_number


@dataclass(frozen=True)
class Polyak:
    """γ = [f(y) − lower_bound + ⟨g, z − y⟩]₊ / max(slope, floor), with slope = ⟨g, direction⟩, and 0 where slope is 0.

    With the exact f(x*) of every batch the average is within GD/√T of the optimum after every number T of steps. A
    bound that is too low only makes steps longer than they should be; one that is too high stops them.

    Args: lower_bound: of the loss of any batch; `step(lower_bound=…)` gives one for its batch, as the loss of a
        teacher. max_lr: cap of γ; "lr" takes the lr of each group, so that schedules act on the cap. floor: smallest
        denominator.
    Units: γ multiplies the direction of every group alike.
    Raises: ValueError for a floor or cap that is not positive, or a bound that is not finite.
    Source: arXiv 2511.07767 (schedule-free Polyak steps, v2 for the safeguards); Polyak, Introduction to Optimization,
        1987.
    """

    lower_bound: float = 0.0
    max_lr: float | Literal["lr"] | None = None
    floor: float = 1e-12

    def __post_init__(self) -> None:
        check_number("Polyak's lower_bound", self.lower_bound, 0.0)
        if not math.isfinite(self.lower_bound):
            raise ValueError(
                f"Polyak needs a finite lower_bound, got {self.lower_bound}; pass 0.0 for losses >= 0"
            )
        check_number("Polyak's floor", self.floor, 1e-12)
        if not 0 < self.floor < math.inf:
            raise ValueError(f"Polyak needs floor > 0, got {self.floor}; pass e.g. 1e-12")
        if isinstance(self.max_lr, str) and self.max_lr == "lr" or self.max_lr is None:
            return
        if (
            isinstance(self.max_lr, bool)
            or not isinstance(self.max_lr, Real)
            or not self.max_lr > 0
        ):
            raise ValueError(
                f"Polyak needs max_lr > 0, 'lr' or None, got {self.max_lr!r}; pass None for no cap"
            )

    def __call__(
        self, loss: Tensor, ahead: Tensor, slope: Tensor, lower_bound: float | Tensor | None = None
    ) -> Tensor:
        """The step size.

        Shapes: loss f(y), ahead = ⟨g, z − y⟩, slope, lower_bound, all () -> ().
        """
        bound = self.lower_bound if lower_bound is None else lower_bound
        gap = (loss - bound + ahead).clamp(min=0)
        # A step along nothing has no length; weight decay would still see one.
        return self.capped(torch.where(slope > 0, gap / slope.clamp(min=self.floor), 0.0))

    def capped(self, step_size: Tensor) -> Tensor:
        """The step size under a cap that is a number.

        Shapes: () -> ().
        """
        if isinstance(self.max_lr, str) or self.max_lr is None:
            return step_size
        return step_size.clamp(max=self.max_lr)

    def rate(self, step_size: Tensor, lr: float | Tensor) -> Tensor:
        """What a group with this lr takes.

        Shapes: () -> ().
        """
        if self.max_lr != "lr":
            return step_size
        return torch.minimum(step_size, torch.as_tensor(lr).to(step_size))


def scalars(loss: float | Tensor, bound: float | Tensor, ahead: list[Tensor]) -> Tensor:
    """What a step size is made of: the loss, its bound and the sum of `ahead`, over all processes.

    Shapes: all (), or one number in any shape for the first two -> (3,).
    """
    like = ahead[0] if ahead else torch.zeros(())
    kind = torch.promote_types(like.dtype, torch.float32)
    given = (torch.as_tensor(value).detach().reshape(()) for value in (loss, bound))
    first = [value.to(like.device, kind) for value in given]
    total = sum((term.to(like.device, kind) for term in ahead), torch.zeros_like(first[0]))
    return over_processes(torch.stack([*first, total]))


def over_processes(values: Tensor) -> Tensor:
    """The mean over the processes of data-parallel training, in one exchange; the values themselves outside of it.

    Replicas must take the same step, and what they average is the gradient of the mean loss.

    Shapes: (...) -> (...).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()
