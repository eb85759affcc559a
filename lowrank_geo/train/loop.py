"""The loop: steps, and what is due between them."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lowrank_geo.train.metrics import Listener
from lowrank_geo.train.recorder import Trained
from lowrank_geo.train.signals import Wish
from lowrank_geo.train.stopped import Stopped
from lowrank_geo.train.trainer import Trainer


def loop(trainer: Trainer, emit: Listener, save: Callable[[], None], wish: Wish) -> None:
    """Train to the last step; `emit` gets every line that is measured, `save` writes a checkpoint.

    Both are called by all processes alike. Whatever happens at a step follows from the config and the step alone, so
    that a run that was killed does the same again.
    Raises: Stopped for SIGINT and SIGTERM, after a checkpoint, with the exit code that shells expect.
    """
    config = trainer.config
    if trainer.step == 0:
        emit(trainer.diagnose())
    while trainer.step < config.steps:
        obey(wish, trainer, save)
        emit(trainer.advance())
        if due(trainer, config.eval_every):
            emit(trainer.evaluate())
        if due(trainer, config.diagnose_every):
            emit(trainer.diagnose())
        if due(trainer, config.checkpoint_every):
            save()


def obey(wish: Wish, trainer: Trained, save: Callable[[], None]) -> None:
    """Save and leave if a signal asked for it.

    Raises: Stopped.
    """
    number = wish.agreed(trainer.workers)
    if number:
        save()
        raise Stopped(
            f"stopped by {signal.Signals(number).name} at step {trainer.step}, which is saved; "
            "go on with --resume",
            128 + number,
        )


def due(trainer: Trainer, every: int) -> bool:
    """Whether something is done after this step: every so many, and after the last."""
    return trainer.step == trainer.config.steps or bool(every) and trainer.step % every == 0


@contextmanager
def deterministic(*, compiled: bool) -> Iterator[None]:
    """Within, the same steps on the same machine give the same bits."""
    mode = torch.get_deterministic_debug_mode()
    if compiled:
        torch.use_deterministic_algorithms(True)  # tells the compiler too
    else:
        torch.set_deterministic_debug_mode("error")  # the same without two seconds of imports
    try:
        yield
    finally:
        if compiled:
            torch.use_deterministic_algorithms(False)
        torch.set_deterministic_debug_mode(mode)
