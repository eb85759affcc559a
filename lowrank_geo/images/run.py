"""Training on images from a config to a finished run folder, new or resumed."""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank_geo.images.collect import Images
from lowrank_geo.images.config import ImageConfig, filled
from lowrank_geo.images.finish import describe, finish
from lowrank_geo.images.tasks import TASKS, new_network, task_of
from lowrank_geo.images.trainer import ImageTrainer
from lowrank_geo.train import checkpoint
from lowrank_geo.train.distributed import Workers, joined
from lowrank_geo.train.loop import deterministic, obey
from lowrank_geo.train.metrics import Listener
from lowrank_geo.train.options import from_json
from lowrank_geo.train.recorder import Recorder
from lowrank_geo.train.run import changed, check_data, run
from lowrank_geo.train.run_folder import (
    RunFolder,
    check_out,
    kind_of,
    read_complete_record,
    read_record,
)
from lowrank_geo.train.signals import Wish


def train(
    config: ImageConfig,
    out: Path,
    *,
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> Path:
    """Train a new model into the folder `out`, which is returned.

    Nothing is written before all that can be checked is. Listeners get every line of metrics.jsonl, and before those
    one of kind "start".
    Raises: Stopped for a loss that is not finite and for signals; ValueError and OSError, in one sentence, for bad
        input.
    """
    config = filled(config)
    with joined(config.device) as workers, deterministic(compiled=False):
        check_alone(workers)
        check_out(out, overwrite=overwrite)
        images = task_of(config).read(config)
        trainer = new_trainer(config, images, workers)
        folder = RunFolder.create(
            out, describe(trainer), fill=lambda path: None, overwrite=overwrite
        )
        with closing(folder):
            train_to_the_end(trainer, folder, listeners, images.skipped)
    return out


def resume(
    out: Path,
    *,
    command: str | None = None,
    changes: dict[str, Any] | None = None,
    listeners: Sequence[Listener] = (),
) -> Path:
    """Go on with a run from its newest valid checkpoint, or from its start if it has none yet.

    On the same machine it ends with the same bits as a run that was never interrupted. `changes` may hold another
    device and tensorboard; `command` is the one that has to have made the run, by default any of this package.
    Raises: as `train`; ValueError if run.json, data and checkpoint do not belong together.
    """
    record, config = read_config(out, command)
    config = changed(config, changes or {})
    with joined(config.device) as workers, deterministic(compiled=False):
        check_alone(workers)
        folder = RunFolder.open(out)
        with closing(folder):
            images = task_of(config).read(config)
            check_data(record, images.fingerprint, images.description)
            trainer = new_trainer(config, images, workers)
            found = checkpoint.newest(out / "checkpoints")
            if found:
                checkpoint.check_fit(found.path, trainer.model.state_dict())
                trainer.restore(checkpoint.load(found))
            notes = images.skipped + (found.problems if found else [])
            train_to_the_end(trainer, folder, listeners, notes)
    return out


class Trained(NamedTuple):
    """A model to use, in eval mode, and what its outputs mean."""

    model: nn.Module
    classes: list[str]
    config: ImageConfig


def load_model(run: Path) -> Trained:
    """The model of a run's best epoch, or of its newest checkpoint before the first epoch ended, on the CPU.

    Raises: ValueError or OSError, in one sentence, if there is none, or it is not what run.json says.
    """
    record, config = read_config(run)
    found = checkpoint.newest(run / "checkpoints")
    if found is None:
        raise ValueError(f"a run needs a checkpoint to be used, got none in {run}; resume it")
    classes, channels = record["data"].get("classes"), record["data"].get("channels")
    if not isinstance(classes, list) or channels not in (1, 3):
        raise ValueError(
            f"{run / 'run.json'} needs the classes and channels of its images, got {classes!r} and {channels!r}; "
            "it is damaged"
        )
    with torch.device("meta"):
        model = new_network(config, channels, len(classes))
    checkpoint.check_fit(found.path, model.state_dict())
    state = checkpoint.load(found)
    model.load_state_dict(state.training["best"]["model"] or state.model, assign=True)
    return Trained(model.eval(), [str(name) for name in classes], config)


def read_config(run: Path, command: str | None = None) -> tuple[dict[str, Any], ImageConfig]:
    """The content of run.json and the config in it.

    Raises: ValueError if another command made the run, or it is damaged.
    """
    kind = command or kind_of(read_record(run))
    record = read_complete_record(run, kind if kind in TASKS else "segment")
    return record, from_json(TASKS[kind].config, record["config"])


def new_trainer(config: ImageConfig, images: Images, workers: Workers) -> ImageTrainer:
    """The model of a config and its seed, drawn on the CPU so that all devices agree."""
    torch.manual_seed(config.seed)
    model = new_network(config, images.channels, len(images.classes))
    return ImageTrainer(config, model, images, workers)


def check_alone(workers: Workers) -> None:
    """Raise ValueError for several processes: their BatchNorm would see different images."""
    if workers.world > 1:
        raise ValueError(
            f"training on images needs one process, got {workers.world}; start it without torchrun"
        )


def train_to_the_end(
    trainer: ImageTrainer, folder: RunFolder, listeners: Sequence[Listener], notes: list[str]
) -> None:
    """Train, or stop in order, and leave the folder saying which; `notes` is what was passed over."""
    recorder = Recorder(
        trainer,
        folder,
        listeners,
        partial(finish, trainer),
        steps=trainer.steps,
        tensorboard=trainer.config.tensorboard,
    )
    run(recorder, notes, partial(loop, trainer, recorder.emit, recorder.save))


def loop(trainer: ImageTrainer, emit: Listener, save: Callable[[], None], wish: Wish) -> None:
    """Train to the last epoch, or until none is better for long; saves after every epoch.

    Raises: Stopped for SIGINT and SIGTERM, after a checkpoint, with the exit code that shells expect.
    """
    while not trainer.done:
        obey(wish, trainer, save)
        emit(trainer.advance())
        if trainer.step % trainer.epochs.steps == 0:
            emit(trainer.validate())
            save()
