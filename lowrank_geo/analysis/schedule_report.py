"""The report of `lowrank-geo analyze schedule`: is a schedule of α, β, ν inside the theorems, and what it does."""

from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank_geo.analysis import figures, qhm
from lowrank_geo.analysis.checks import check_count, check_positive
from lowrank_geo.analysis.conditions import PowerSchedule, first_theorem, second_theorem
from lowrank_geo.analysis.pages import Report
from lowrank_geo.analysis.two_step import at_step
from lowrank_geo.canvas import STEP
from lowrank_geo.optim import RiemannianSGD

COPIES, SHOWN = 500, 120  # runs at once; points of a curve


def scheduled_losses(
    schedule: PowerSchedule, noise: float, steps: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of x²/2 over 500 runs of the real optimizer from x = 1, at about 120 steps.

    Shapes: -> steps (k), losses (k).
    """
    generator = torch.Generator().manual_seed(seed)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    x = nn.Parameter(torch.ones(COPIES, dtype=torch.float64))
    optimizer = RiemannianSGD([x], filter=schedule)
    shown = np.unique(np.geomspace(1, steps, SHOWN).round().astype(int))
    wanted, found = set(shown.tolist()), []
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        x.grad = x.detach() + noise * torch.randn(COPIES, **kind)
        optimizer.step()
        if step in wanted:
            found.append(float(x.detach().square().mean() / 2))
    return shown, np.array(found)


def schedule_report(schedule: PowerSchedule, noise: float, steps: int, seed: int) -> Report:
    """The conditions of both theorems, the schedules, and a run of them beside one of constant settings.

    Raises: ValueError for noise that is not positive or fewer than 10 steps.
    """
    check_positive("analyze schedule", "noise", noise)
    check_count("analyze schedule", "steps", steps, 10)
    still = PowerSchedule(schedule.alpha, beta=schedule.beta, nu=schedule.nu)
    lines = {
        "this schedule": scheduled_losses(schedule, noise, steps, seed),
        "constant settings": scheduled_losses(still, noise, steps, seed),
    }
    inside = {1: first_theorem(schedule), 2: second_theorem(schedule)}
    numbers = [
        (f"theorem {n}", "does not cover it" if failed else "holds", "; ".join(failed) or theorem)
        for (n, failed), theorem in zip(
            inside.items(), ("lim inf |∇L| = 0", "|∇L| → 0, β and ν → 1"), strict=True
        )
    ]
    (at, losses), (_, constant) = lines.values()
    numbers += [
        ("loss at the end", f"{losses[-1]:.3g}", f"mean of {COPIES} runs, above the minimum"),
        ("of constant settings", f"{constant[-1]:.3g}", "same α, β, ν without exponents"),
        (
            "their stationary loss",
            f"{qhm.stationary_loss(still.alpha, still.beta, still.nu, [1.0], noise**2):.3g}",
            "exact",
        ),
    ]
    settings = np.array([_settings(schedule, int(n)) for n in at]).T
    names = ("α", "1 − β", "1 − ν")
    shown = {n: (at, v) for n, v in zip(names, settings, strict=True) if (v > 0).any()}
    covered = any(not failed for failed in inside.values())
    return Report(
        "A schedule of momentum",
        "inside the theorems" if covered else "outside the theorems",
        "The noise dies out." if covered else "No theorem says that the noise dies out.",
        numbers,
        [
            (
                "Loss over the run",
                figures.curves(lines, STEP, "excess loss (loss)", logs="xy"),
                "QHM of RiemannianSGD on x²/2 with gradient noise.",
            ),
            (
                "The schedules",
                figures.curves(shown, STEP, "value (α: weight per gradient)", logs="xy"),
                "Straight lines are powers of the step.",
            ),
        ],
        settings={**vars(schedule), "noise": noise, "steps": steps, "seed": seed},
    )


def _settings(schedule: PowerSchedule, step: int) -> tuple[float, float, float]:
    u, _, a, _ = at_step(schedule, step)
    return schedule.rate(step), 1 - float(u), float(a)
