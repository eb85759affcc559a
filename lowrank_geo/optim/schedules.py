"""Learning-rate schedules as plain `torch.optim.lr_scheduler.LambdaLR` objects."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowrank_geo.optim.values import check_count, check_number


def warmup_stable_decay(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05, decay: float = 0.5
) -> LambdaLR:
    """Linear warmup, a plateau, linear decay to zero.

    Units: warmup and decay are fractions of total_steps.
    Raises: ValueError if they are negative or add up to more than 1.
    """
    check_number("warmup", warmup, 0.05)
    check_number("decay", decay, 0.5)
    if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1):
        raise ValueError(
            f"warmup_stable_decay needs warmup, decay >= 0 with a sum <= 1, got {warmup} and {decay}; "
            "shorten one of them"
        )
    check_run("warmup_stable_decay", optimizer, total_steps)

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
    check_number("warmup", warmup, 0.05)
    check_number("floor", floor, 0.0)
    if not (0 <= warmup <= 1 and 0 <= floor <= 1):
        raise ValueError(
            f"cosine needs warmup and floor in [0, 1], got {warmup} and {floor}; pass fractions"
        )
    check_run("cosine", optimizer, total_steps)

    def factor(step: int) -> float:
        first = warmup * total_steps
        if step < first:
            return (step + 1) / max(first, 1)
        share = min(1.0, (step - first) / max(total_steps - first, 1))
        return floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer) -> LambdaLR:
    """The same learning rate throughout."""
    check_run("constant", optimizer, 1)
    return LambdaLR(optimizer, lambda step: 1.0)


def check_run(call: str, optimizer: Optimizer, total_steps: int) -> None:
    """Raise TypeError or ValueError unless there are an optimizer and at least one step."""
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"{call} needs an optimizer, got {optimizer!r}; pass the optimizer first")
    check_count(f"{call}'s total_steps", total_steps, 1000)
    if total_steps < 1:
        raise ValueError(
            f"{call} needs total_steps >= 1, got {total_steps}; pass the length of the run"
        )
