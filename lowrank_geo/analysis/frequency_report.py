"""The report of `lowrank-geo analyze frequency`: what an optimizer's momentum passes, by formula and by measurement."""

import numpy as np

from lowrank_geo.analysis import figures
from lowrank_geo.analysis.frequency import (
    Schedule,
    effective_gain,
    frequency_response,
    gain,
    matched_lr,
    schedule_named,
)
from lowrank_geo.analysis.measured import frequency_response_of
from lowrank_geo.analysis.momenta import example, keeps_filtered_gradients
from lowrank_geo.analysis.pages import Report
from lowrank_geo.canvas import STEP, Figure
from lowrank_geo.optim.base import RiemannianOptimizer
from lowrank_geo.optim.filters import Filter, HeavyBall
from lowrank_geo.optim.named import OPTIMIZERS

SHARES = (0.1, 0.25, 0.5, 1.0)  # of the run, at which a filter that changes is looked at
REFERENCE = HeavyBall(0.9)


def named_optimizer(name: str, total_steps: int) -> RiemannianOptimizer:
    """An optimizer by name, on two parameters of its own.

    Raises: ValueError for an unknown name, or one without a momentum of this family.
    """
    made = example(name, total_steps)
    if keeps_filtered_gradients(made):
        return made
    known = [n for n in sorted(OPTIMIZERS) if keeps_filtered_gradients(example(n, 1))]
    raise ValueError(
        f"analyze frequency needs an optimizer with a momentum filter out of {', '.join(known)}, got {name!r}; "
        "not one of torch, schedule-free or of augmented bases"
    )


def frequency_report(name: str, total_steps: int, schedule: Schedule, contraction: float) -> Report:
    """Gain and phase of the momentum of an optimizer, along the run where they change.

    Raises: ValueError for an unknown optimizer or schedule, τ out of [0, 1] or no steps.
    """
    optimizer = named_optimizer(name, total_steps)
    filter = optimizer.rule(optimizer.param_groups[0]).filter
    omega = np.geomspace(1e-3, np.pi, 300)
    changes = gain(filter, 1) != gain(filter, total_steps)
    places = [max(1, round(s * total_steps)) for s in SHARES] if changes else [total_steps]
    responses = {
        f"step {n:,}" if changes else name: frequency_response(
            filter, omega, step=n, contraction=contraction
        )
        for n in places
    }
    last, end = list(responses)[-1], places[-1]
    measured = {}
    if contraction == 1:
        at = np.geomspace(1e-3, np.pi, 12)
        measured[last] = (at, frequency_response_of(optimizer, at, step=end))
    whole = effective_gain(filter, total_steps, schedule, contraction=contraction)
    high = abs(frequency_response(filter, np.pi, step=end, contraction=contraction))
    numbers = [
        (
            "gain at ω = 0",
            f"{gain(filter, end, contraction=contraction):.4g}",
            "lr times this is the effective rate",
        ),
        ("gain at ω = π", f"{float(high):.4g}", "what is left of gradients that alternate"),
        ("mean gain of the run", f"{whole:.4g}", f"with the schedule {schedule}"),
        (
            "matched lr",
            f"{matched_lr(0.1, REFERENCE, filter, total_steps, schedule, contraction=contraction):.4g}",
            "moves as far as heavy ball 0.9 at 0.1",
        ),
    ]
    if measured:
        at, found = measured[last]
        expected = frequency_response(filter, at, step=end)
        error = float((abs(found - expected) / abs(expected)).max())
        numbers.append(
            ("measured − formula", f"{error:.1e}", "relative, on the optimizer's own state")
        )
    caption = (
        "Dots: a copy of the optimizer, driven with gradients of one frequency, its state read off. "
        "Below 1 a frequency is damped; early gradients of a step count in phase, late ones against it."
    )
    return Report(
        f"Frequency response: {name}",
        "changes along the run" if changes else "constant",
        f"The momentum of {name} is {filter}.",
        numbers,
        [
            ("Gain and phase", figures.bode(omega, responses, measured), caption),
            (
                "Effective gain over the run",
                _over_the_run(filter, total_steps, schedule, contraction),
                "Gain at ω = 0 times the schedule: "
                "two filters are compared fairly when the areas under their curves are equal.",
            ),
        ],
        settings={
            "optimizer": name,
            "steps": total_steps,
            "schedule": schedule,
            "contraction": contraction,
        },
    )


def _over_the_run(
    filter: Filter, total_steps: int, schedule: Schedule, contraction: float
) -> Figure:
    steps = np.unique(np.linspace(1, total_steps, 300).astype(int))
    shape = schedule_named("analyze frequency", schedule)
    lines = {
        label: (
            steps,
            [
                gain(rule, int(n), contraction=contraction) * shape((n - 0.5) / total_steps)
                for n in steps
            ],
        )
        for label, rule in (("this momentum", filter), ("heavy ball 0.9", REFERENCE))
    }
    return figures.curves(lines, STEP, "gain × schedule (no unit)", half=False)
