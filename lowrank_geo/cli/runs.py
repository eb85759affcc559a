"""Commands that train: where a run is kept, and how it begins or goes on."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lowrank_geo.cli.display import Display
from lowrank_geo.cli.options import Command, config_options, given
from lowrank_geo.cli.refusals import refusals

Out = Annotated[Path | None, typer.Option(help="Folder of the new run.")]
Resume = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in --out.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


Functions = tuple[Callable[..., object], Callable[..., object]]


def training_command(of: Any, load: Callable[[], Functions]) -> Command:
    """A command, with an option for each field of the config `of`, that begins a run or goes on with one.

    `load` imports, not before the command runs, begin(config, path, overwrite=…, listeners=…) and
    resume(run, changes=…, listeners=…).
    """

    @config_options(of=of)
    def run(
        command: typer.Context,
        *,
        out: Out = None,
        resume_run: Resume = None,
        overwrite: Overwrite = False,
        debug: Debug = False,
        **options: Any,
    ) -> None:
        with refusals(debug), Display() as display:
            begin, resume = load()
            begin_or_resume(
                lambda path: begin(of(**options), path, overwrite=overwrite, listeners=[display]),
                lambda run: resume(run, changes=given(command, options), listeners=[display]),
                Place(out, resume_run, overwrite),
            )

    return run


class Place(NamedTuple):
    """What --out, --resume and --overwrite say."""

    out: Path | None
    resumed: Path | None
    overwrite: bool


def begin_or_resume(
    begin: Callable[[Path], object], resume: Callable[[Path], object], place: Place
) -> None:
    """Begin a run in a folder, or go on with one.

    Raises: ValueError for options that exclude each other.
    """
    if place.resumed is None:
        begin(place.out or free_folder())
        return
    if place.out is not None or place.overwrite:
        raise ValueError(
            f"--resume needs neither --out nor --overwrite, got {place.out or '--overwrite'}; "
            "leave it out: the run goes on in its folder"
        )
    resume(place.resumed)


def free_folder() -> Path:
    """The first of runs/1, runs/2, ... that does not exist."""
    return next(path for n in count(1) if not (path := Path("runs", str(n))).exists())
