"""Where a run is kept, as options that all commands which train share."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

Out = Annotated[Path | None, typer.Option(help="Folder of the new run.")]
Resume = Annotated[
    Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run in --out.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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
