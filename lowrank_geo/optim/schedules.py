"""Learning-rate schedules as plain `torch.optim.lr_scheduler.LambdaLR` objects."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_stable_decay(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, decay: float = 0.5
) -> LambdaLR:
    """Linear warmup, a plateau, linear decay to zero.

    Units: warmup and decay are fractions of total_steps.
    Raises: ValueError if they are negative or add up to more than 1.
    """
    if warmup < 0 or decay < 0 or warmup + decay > 1:
        raise ValueError(
            f"warmup_stable_decay needs warmup, decay >= 0 with a sum <= 1, got {warmup} and {decay}; "
            "shorten one of them"
        )
    check_steps("warmup_stable_decay", total_steps)

    def factor(step: int) -> float:
        rise = (step + 1) / max(warmup * total_steps, 1)
        fall = (total_steps - step) / max(decay * total_steps, 1)
        return max(0.0, min(1.0, rise, fall))

    return LambdaLR(optimizer, factor)


def cosine(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, floor: float = 0.0
) -> LambdaLR:
    """Linear warmup, then half a cosine down to `floor` of the peak.

    Units: warmup is a fraction of total_steps, floor one of the peak.
    Raises: ValueError if either is out of [0, 1].
    """
    if not (0 <= warmup <= 1 and 0 <= floor <= 1):
        raise ValueError(
            f"cosine needs warmup and floor in [0, 1], got {warmup} and {floor}; pass fractions"
        )
    check_steps("cosine", total_steps)

    def factor(step: int) -> float:
        first = warmup * total_steps
        if step < first:
            return (step + 1) / max(first, 1)
        share = min(1.0, (step - first) / max(total_steps - first, 1))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer) -> LambdaLR:
    """The same learning rate throughout."""
    return LambdaLR(optimizer, lambda step: 1.0)


def check_steps(call: str, total_steps: int) -> None:
    """Raise ValueError unless there is at least one step."""
    if total_steps < 1:
        raise ValueError(
            f"{call} needs total_steps >= 1, got {total_steps}; pass the length of the run"
        )
