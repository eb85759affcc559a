"""Momentum as a filter of the gradients, frequency by frequency: the formula, and the gain over a run.

Source: Li et al., On the performance analysis of momentum method: a frequency domain perspective, ICLR 2025, arXiv
2411.19671, section 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lowrank_geo.analysis.two_step import at_step, constants
from lowrank_geo.optim.filters import Filter

Part = Literal["output", "momentum"]
Schedule = Literal["constant", "cosine", "linear"] | Callable[[float], float]
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda s: 1.0,
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
    "linear": lambda s: 1 - s,
}


def frequency_response(
    filter: Filter,
    omega: ArrayLike,
    *,
    step: int | None = None,
    of: Part = "output",
    contraction: float = 1.0,
) -> np.ndarray:
    """H(ω): what the filter makes of gradients e^{iωt}, in the end. Gain |H|, phase arg H.

    m = u m₋ + v g has v/(1 − u e^{−iω}), and the output a g + b m has a + b times that. u < 0 passes high frequencies.

    Args: omega: radians per update; π alternates in sign. step: at which a filter that changes along the run is frozen.
        contraction: τ = |Tm|/|m| of the transport, which moves the pole from u to uτ.
    Shapes: omega (...) -> (...), complex.
    Units: ω in radians per update, H in output per gradient.
    Raises: ValueError for a filter that changes when no step is named, or τ out of [0, 1].
    Source: Li et al., ICLR 2025, arXiv 2411.19671, section 3, H(ω) = v/(1 − u e^{−jω}); a, b and τ derived.

    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> abs(frequency_response(HeavyBall(0.9), [0.0, 0.1, 1.0, np.pi])).round(4).tolist()
    [10.0, 7.2562, 1.0927, 0.5263]
    """
    check_contraction("frequency_response", contraction)
    u, v, a, b = map(float, constants(filter, step))
    momentum = v / (1 - u * contraction * np.exp(-1j * np.asarray(omega, dtype=float)))
    return momentum if of == "momentum" else a + b * momentum


def dynamic_response(filter: Filter, omega: ArrayLike, steps: ArrayLike) -> np.ndarray:
    """H(ω) at some steps of a run, as if the filter of that step had been there for long.

    Shapes: omega (k), steps (n) -> (n, k), complex.
    Units: ω in radians per update, H in output per gradient.
    Source: Li et al., ICLR 2025, arXiv 2411.19671, section 3, H_k(ω) of the stages of a run.
    """
    return np.stack([frequency_response(filter, omega, step=int(n)) for n in np.ravel(steps)])


def gain(filter: Filter, step: int | None = None, *, contraction: float = 1.0) -> float:
    """H(0): how many times a constant gradient counts; lr·gain is the effective learning rate.

    Shapes: numbers.
    Units: output per gradient.
    Raises: as `frequency_response`.
    Source: Li et al., ICLR 2025, arXiv 2411.19671, section 3, H(0) = v/(1 − u).

    >>> from lowrank_geo.optim.filters import EMA, HeavyBall
    >>> round(gain(HeavyBall(0.9)), 6), round(gain(EMA(0.9)), 6)
    (10.0, 1.0)
    >>> round(gain(HeavyBall(0.968), contraction=0.99), 1)  # what transport leaves of 31.25
    24.0
    """
    return float(frequency_response(filter, 0.0, step=step, contraction=contraction).real)


def gradient_weights(filter: Filter, rates: Sequence[float]) -> np.ndarray:
    """By how much each gradient of a run moves the weights, all later steps together, for a filter that may change.

    Args: rates: the learning rate of each step.
    Shapes: rates (n) -> (n).
    Units: learning rate.
    Source: derived: Σ over later steps s of lr_s (a_s δ + b_s v Π u).

    >>> from lowrank_geo.optim.filters import HeavyBall
    >>> gradient_weights(HeavyBall(0.5), [1.0, 1.0, 1.0]).tolist()
    [1.75, 1.5, 1.0]
    """
    known = [at_step(filter, t) for t in range(1, len(rates) + 1)]
    ahead, found = 0.0, []  # ahead: by how much the momentum of this step moves the weights
    for t in reversed(range(len(rates))):
        _, v, a, b = map(float, known[t])
        decay = float(known[t + 1].u) if t + 1 < len(known) else 0.0
        ahead = rates[t] * b + decay * ahead
        found.append(rates[t] * a + v * ahead)
    return np.array(found[::-1])


def effective_gain(
    filter: Filter, total_steps: int, schedule: Schedule = "constant", *, contraction: float = 1.0
) -> float:
    """The mean over the run of gain × schedule: lr·total_steps·this is the whole way of a constant gradient.

    Quasi-stationary: each step has the gain that its filter ends with. For FSGDM it is v(1 + 1/(2c)) at a constant rate
    and v(1/2 + (1/4 − 1/π²)/c) with a cosine, in the limit of many stages.

    Shapes: numbers; a schedule takes the share of the run that has passed.
    Units: output per gradient.
    Raises: ValueError for an unknown schedule or no steps.
    Source: derived from H_k(0) of Li et al., ICLR 2025, arXiv 2411.19671, section 3.

    >>> from lowrank_geo.optim.filters import FSGDM, HeavyBall
    >>> round(effective_gain(FSGDM(9000, stages=9000), 9000, "cosine"), 2)
    5.01
    >>> round(effective_gain(HeavyBall(0.9), 9000, "cosine"), 2)
    5.0
    """
    if total_steps < 1:
        raise ValueError(
            f"effective_gain needs total_steps >= 1, got {total_steps}; pass the length of the run"
        )
    shape = schedule_named("effective_gain", schedule)
    gains = (gain(filter, n, contraction=contraction) for n in range(1, total_steps + 1))
    return sum(g * shape((k + 0.5) / total_steps) for k, g in enumerate(gains)) / total_steps


def matched_lr(
    lr: float,
    of: Filter,
    to: Filter,
    total_steps: int,
    schedule: Schedule = "constant",
    *,
    contraction: float = 1.0,
) -> float:
    """The learning rate at which filter `to` moves as far over a run as `of` does at `lr`, under one transport.

    Comparing filters at one learning rate compares gains: EMA(0.9) at heavy ball's rate takes a tenth of its steps.

    Shapes: numbers.
    Units: both rates in weights per output.
    Raises: as `effective_gain`.
    Source: derived: lr · `effective_gain` is the same for both.

    >>> from lowrank_geo.optim.filters import EMA, HeavyBall
    >>> round(matched_lr(0.1, HeavyBall(0.9), EMA(0.9), 100), 6)
    1.0
    """
    gains = [
        effective_gain(filter, total_steps, schedule, contraction=contraction)
        for filter in (of, to)
    ]
    return lr * gains[0] / gains[1]


def schedule_named(call: str, schedule: Schedule) -> Callable[[float], float]:
    """The factor of the learning rate as a function of the share of the run that has passed.

    Raises: ValueError, naming `call`, for an unknown name.
    """
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(
            f"{call} needs a schedule out of {', '.join(SCHEDULES)}, got {schedule!r}; or pass a function"
        )
    return SCHEDULES[schedule]


def check_contraction(call: str, contraction: float) -> None:
    """Raise ValueError, naming `call`, unless the contraction is in [0, 1]."""
    if not 0 <= contraction <= 1:
        raise ValueError(
            f"{call} needs a contraction in [0, 1], got {contraction}; pass τ = |Tm|/|m|"
        )
