"""`lowrank-geo analyze diagonal`, `balance` and `schedule`: what momentum picks, balances and averages out."""

from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_geo.cli.analyze import Out, Steps, app, show
from lowrank_geo.cli.runs import Debug

if TYPE_CHECKING:
    from lowrank_geo.analysis.pages import Report

Mu = Annotated[float, typer.Option(help="Momentum, in [0, 1).")]
Lam = Annotated[float, typer.Option(help="η/(1 − μ)², the largest of three steps.")]
Seed = Annotated[int, typer.Option(help="Seed of the problem and of its noise.")]
Power = Annotated[float, typer.Option(help="Exponent of the step, 0 for a constant.")]


@app.command("diagonal")
def diagonal_command(
    *,
    mu: Mu = 0.5,
    lam: Lam = 0.04,
    start: Annotated[float, typer.Option(help="u = v at the start.")] = 0.3,
    seed: Seed = 0,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Which of the solutions momentum picks in a diagonal linear network."""

    def make() -> "Report":
        from lowrank_geo.analysis.diagonal_report import diagonal_report

        return diagonal_report(mu, lam, start, seed)

    show(make, out, debug)


@app.command("balance")
def balance_command(
    *, mu: Mu = 0.9, lam: Lam = 0.02, seed: Seed = 1, out: Out = None, debug: Debug = False
) -> None:
    """What momentum does to the balance UᵀU − VᵀV of two factors."""

    def make() -> "Report":
        from lowrank_geo.analysis.balance_report import balance_report

        return balance_report(mu, lam, seed)

    show(make, out, debug)


@app.command("schedule")
def schedule_command(
    *,
    alpha: Annotated[float, typer.Option(help="α at the first step.")] = 0.5,
    w: Power = 0.75,
    beta: Annotated[float, typer.Option(help="β at the first step, in [0, 1).")] = 0.9,
    c: Power = 0.0,
    d: Power = 0.5,
    nu: Annotated[float, typer.Option(help="ν at the first step, in [0, 1].")] = 0.7,
    e: Power = 0.0,
    noise: Annotated[float, typer.Option(help="Standard deviation of a gradient.")] = 1.0,
    steps: Steps = 4000,
    seed: Seed = 0,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """α k^−w, 1 − β ~ k^−c or β ~ k^−d, 1 − ν ~ k^−e: inside the theorems of QHM or not, and run."""

    def make() -> "Report":
        from lowrank_geo.analysis.conditions import PowerSchedule
        from lowrank_geo.analysis.schedule_report import schedule_report

        schedule = PowerSchedule(alpha, w, beta, c, d, nu, e)
        return schedule_report(schedule, noise, steps, seed)

    show(make, out, debug)
