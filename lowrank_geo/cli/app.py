"""The commands."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_geo.cli.analyze_bias import app as analyze
from lowrank_geo.cli.images import add_commands
from lowrank_geo.cli.options import config_options
from lowrank_geo.cli.refusals import refusals
from lowrank_geo.cli.runs import Debug, Functions, training_command
from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.train.config import TrainConfig

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Train models whose weights stay on the manifold of rank-r matrices.",
)

app.add_typer(analyze, name="analyze")
add_commands(app)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]


def pretraining() -> Functions:
    # Models bring torch's compiler, reports matplotlib: seconds for which other commands and --help need not wait.
    from lowrank_geo.train.run import pretrain, resume

    return pretrain, resume


app.command(
    "pretrain",
    help="Pre-train a low-rank language model; without options, a demo of three minutes.",
)(training_command(TrainConfig, pretraining))


@app.command("plan")
@config_options("tokenizer", "vocab_size", "model", "budget", "rank", "ratio", "init", "context")
def plan_command(*, debug: Debug = False, **options: Any) -> None:
    """Show which layer pretrain would give which rank, and the exact number of parameters."""
    from lowrank_geo.train.parts import plan_of

    with refusals(debug):
        typer.echo(str(plan_of(TrainConfig(**options))))


@app.command("inspect")
def inspect_command(run: Run, *, debug: Debug = False) -> None:
    """Show ranks, singular values, orthonormality and size of a run, and write its report anew."""
    from rich.console import Console

    from lowrank_geo.cli.images import report_writer
    from lowrank_geo.inspection import inspect, render

    with refusals(debug):
        Console(markup=False).print(render(inspect(run)))
        write_report = report_writer(run)
        typer.echo(f"report: {write_report(run)}")


@app.command("generate")
def generate_command(
    run: Run,
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "def ",
    tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from this many most likely tokens.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    debug: Debug = False,
) -> None:
    """Continue a prompt with the model of a run."""
    from lowrank_geo.generation import continue_text
    from lowrank_geo.train.parts import load_model

    with refusals(debug):
        model, tokenizer = load_model(run)
        sampling = {"count": tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
        typer.echo(continue_text(model, tokenizer, prompt, **sampling))


@app.command("finetune")
@config_options(of=FinetuneConfig)
def finetune_command(
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for adapter and result.")] = None,
    method: Annotated[str, typer.Option(help="fixed-rank, lora, dora, ...")] = "fixed-rank",
    compare: Annotated[
        str | None, typer.Option(help="Methods to compare fixed-rank with, e.g. lora,dora,adalora.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each method compared.")] = 3,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Fine-tune a Hugging Face model with adapters of fixed rank, or compare methods in one table."""
    from lowrank_geo.cli.finetune import run_comparison, run_once

    with refusals(debug):
        config = FinetuneConfig(**options)
        if compare is None:
            run_once(config, out, method)
        else:
            run_comparison(config, out, [method, *compare.split(",")], seeds)
