"""`lowrank-geo segment` and `lowrank-geo classify`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from lowrank_geo.cli.display import Display
from lowrank_geo.cli.options import config_options, given
from lowrank_geo.cli.refusals import refusals
from lowrank_geo.cli.runs import Debug, Out, Overwrite, Place, Resume, begin_or_resume
from lowrank_geo.images.config import ClassifyConfig, ImageConfig, SegmentConfig
from lowrank_geo.train.run_folder import kind_of, read_record


def segment_command(
    command: typer.Context,
    *,
    out: Out = None,
    resume_run: Resume = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a momentum network to segment images; without options, a demo on phantoms of a few minutes."""
    place = Place(out, resume_run, overwrite)
    train_images(SegmentConfig, place, options, given(command, options), debug=debug)


def classify_command(
    command: typer.Context,
    *,
    out: Out = None,
    resume_run: Resume = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Train a momentum network to classify images; without options, a demo on digits of a few minutes."""
    place = Place(out, resume_run, overwrite)
    train_images(ClassifyConfig, place, options, given(command, options), debug=debug)


def add_commands(app: typer.Typer) -> None:
    """The two commands with an option for each field of their configs."""
    app.command("segment")(config_options(of=SegmentConfig)(segment_command))
    app.command("classify")(config_options(of=ClassifyConfig)(classify_command))


def train_images(
    cls: type[ImageConfig],
    place: Place,
    options: dict[str, Any],
    changes: dict[str, Any],
    *,
    debug: bool,
) -> None:
    """Begin a run with all options, or go on with one by the `changes` among them."""
    with refusals(debug), Display() as display:
        # The readers of images need packages that the other commands do not.
        from lowrank_geo.images.run import resume, train

        begin_or_resume(
            lambda path: train(
                cls(**options), path, overwrite=place.overwrite, listeners=[display]
            ),
            lambda run: resume(run, command=cls.command, changes=changes, listeners=[display]),
            place,
        )


def report_writer(run: Path) -> Callable[[Path], Path]:
    """What writes the report of a run, whichever command made it."""
    if kind_of(read_record(run)) in (SegmentConfig.command, ClassifyConfig.command):
        from lowrank_geo.images.report import write_report as write_image_report

        return write_image_report
    from lowrank_geo.report import write_report

    return write_report
