"""`lowrank-geo analyze`: the laboratory from the command line. Every command prints numbers and can write a page."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_geo.cli.refusals import refusals
from lowrank_geo.cli.runs import Debug

if TYPE_CHECKING:
    from lowrank_geo.analysis.pages import Report

app = typer.Typer(
    no_args_is_help=True,
    help="Say what an optimizer's settings will do, show it, and confirm it on the optimizer.",
)

Out = Annotated[Path | None, typer.Option(help="Where to write a page with figures.")]
Low = Annotated[float, typer.Option(help="Smallest curvature, loss per squared weight.")]
High = Annotated[float, typer.Option(help="Largest curvature, loss per squared weight.")]
Noise = Annotated[float, typer.Option(help="Standard deviation of each gradient coordinate.")]
Steps = Annotated[int, typer.Option(help="Length of the run.")]


def show(make: "Callable[[], Report]", out: Path | None, debug: bool) -> None:
    """Print the numbers of a report, and write it where it is asked for."""
    with refusals(debug):
        if out is not None:
            from lowrank_geo.analysis.pages import check_place

            check_place(out)
        report = make()
        typer.echo(report.text())
        if out is not None:
            typer.echo(f"report: {report.write(out)}")


@app.command("flow")
def flow_command(
    *,
    mu: Annotated[float, typer.Option(help="Momentum, in [0, 1).")] = 0.9,
    eta: Annotated[float, typer.Option(help="Learning rate of torch.optim.SGD.")] = 1e-3,
    curvature: Annotated[float, typer.Option(help="Largest curvature of the loss.")] = 1.0,
    order: Annotated[int, typer.Option(help="Terms of the flow, 1 to 4.")] = 4,
    steps: Steps = 200,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Heavy ball as a flow with counter terms: where it is valid, and how near each order comes."""

    def make() -> "Report":
        from lowrank_geo.analysis.flow_report import flow_report

        return flow_report(mu, eta, curvature, order, steps)

    show(make, out, debug)


@app.command("qhm")
def qhm_command(
    *,
    alpha: Annotated[float, typer.Option(help="Effective learning rate lr·gain.")] = 0.1,
    beta: Annotated[float, typer.Option(help="Decay of the momentum, in [0, 1).")] = 0.9,
    nu: Annotated[float, typer.Option(help="Weight of the momentum, in [0, 1].")] = 0.7,
    curvature_max: High = 10.0,
    curvature_min: Low = 0.1,
    noise: Noise = 0.3,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Rate, stability and stationary loss of quasi-hyperbolic momentum."""

    def make() -> "Report":
        from lowrank_geo.analysis.advice import Problem
        from lowrank_geo.analysis.qhm_report import qhm_report

        return qhm_report(alpha, beta, nu, Problem(curvature_min, curvature_max, noise))

    show(make, out, debug)


@app.command("frequency")
def frequency_command(
    *,
    optimizer: Annotated[str, typer.Option(help="As in pretrain, e.g. sgd, qhm, fsgdm.")] = "fsgdm",
    steps: Steps = 1000,
    schedule: Annotated[str, typer.Option(help="constant, cosine or linear.")] = "cosine",
    contraction: Annotated[float, typer.Option(help="τ = |Tm|/|m| of the transport.")] = 1.0,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Gain and phase of an optimizer's momentum, by formula and measured on its state."""

    def make() -> "Report":
        from lowrank_geo.analysis.frequency_report import frequency_report

        return frequency_report(optimizer, steps, schedule, contraction)  # type: ignore[arg-type]

    show(make, out, debug)


@app.command("run")
def run_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    *,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Signal to noise, curvature, gradient spectrum and transport of a run recorded with --probes."""

    def make() -> "Report":
        from lowrank_geo.analysis.run_report import run_report

        return run_report(run)

    show(make, out, debug)


@app.command("advise")
def advise_command(
    *,
    curvature_max: High,
    curvature_min: Low,
    noise: Noise = 0.0,
    optimizer: Annotated[str, typer.Option(help="sgd, heavy-ball, nesterov or qhm.")] = "qhm",
    steps: Steps = 1000,
    start: Annotated[float, typer.Option(help="Loss above the minimum at the start.")] = 1.0,
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Learning rate, β and ν for a problem, with the reasons."""

    def make() -> "Report":
        from lowrank_geo.analysis.advice import Problem
        from lowrank_geo.analysis.qhm_report import advice_report

        return advice_report(Problem(curvature_min, curvature_max, noise, steps, start), optimizer)

    show(make, out, debug)
