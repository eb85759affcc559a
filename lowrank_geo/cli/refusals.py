"""Errors of the user as one sentence and an exit code; errors of ours keep their traceback."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import typer

from lowrank_geo.train.stopped import Stopped

OURS_TO_SAY = (ValueError, OSError, ImportError, torch.OutOfMemoryError)


@contextmanager
def refusals(debug: bool) -> Iterator[None]:
    """Within, bad input ends the command with a sentence and code 2, signals with 128 + their number."""
    usual = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    except Stopped as stopped:
        typer.echo(str(stopped) if stopped.code > 128 else f"error: {stopped}", err=True)
        raise typer.Exit(stopped.code) from None
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except BrokenPipeError:
        raise  # whoever read along, `head` say, has enough: the command line ends without a word
    except OURS_TO_SAY as error:
        if debug:
            raise
        typer.echo(f"error: {sentence(error)}", err=True)
        raise typer.Exit(2) from None
    finally:
        signal.signal(signal.SIGTERM, usual)


def sentence(error: BaseException) -> str:
    """What an error says, on one line.

    >>> sentence(FileNotFoundError(2, "No such file or directory", "a"))
    'No such file or directory: a'
    """
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the model needs more memory than the device has; lower --batch or raise --accumulate"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
