"""`lowrank-geo segment` and `lowrank-geo classify`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer

from lowrank_geo.cli.runs import Functions, training_command
from lowrank_geo.images.config import ClassifyConfig, SegmentConfig
from lowrank_geo.train.run_folder import kind_of, read_record


def add_commands(app: typer.Typer) -> None:
    """Give `app` the two commands."""
    for config, help in (
        (SegmentConfig, "segment images; without options, a demo on phantoms of a few minutes."),
        (ClassifyConfig, "classify images; without options, a demo on digits of a few minutes."),
    ):
        name, words = config.command, "Train a momentum network to " + help
        app.command(name, help=words)(training_command(config, partial(functions, name)))


def functions(command: str) -> Functions:
    """How runs of a command begin and go on; the readers of images need packages that other commands do not."""
    from lowrank_geo.images.run import resume, train

    return train, partial(resume, command=command)


def report_writer(run: Path) -> Callable[[Path], Path]:
    """What writes the report of a run, whichever command made it."""
    if kind_of(read_record(run)) in (SegmentConfig.command, ClassifyConfig.command):
        from lowrank_geo.images.report import write_report as write_image_report

        return write_image_report
    from lowrank_geo.report import write_report

    return write_report
