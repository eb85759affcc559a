"""Pre-training from a config to a finished run folder, new or resumed."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lowrank_geo.data import load_tokenizer
from lowrank_geo.train import checkpoint
from lowrank_geo.train.config import PER_MACHINE, TrainConfig
from lowrank_geo.train.distributed import Workers, joined
from lowrank_geo.train.loop import deterministic, loop
from lowrank_geo.train.metrics import Listener
from lowrank_geo.train.parts import Data, check_described, described_model, new_model, read_data
from lowrank_geo.train.recorder import Recorder, describe, finish
from lowrank_geo.train.run_folder import RunFolder, check_out, read_complete_record
from lowrank_geo.train.signals import Wish, stop_signals
from lowrank_geo.train.stopped import Stopped
from lowrank_geo.train.trainer import Trainer

Config = TypeVar("Config")


def pretrain(
    config: TrainConfig,
    out: Path,
    *,
    overwrite: bool = False,
    listeners: Sequence[Listener] = (),
) -> Path:
    """Train a new model into the folder `out`, which is returned.

    Nothing is written before all that can be checked is. Listeners get every line of
    metrics.jsonl, and before those one of kind "start".

    Raises: Stopped for a loss that is not finite and for signals; ValueError and OSError, in one
        sentence, for bad input.
    """
    with joined(config.device) as workers, deterministic(compiled=config.compile):
        workers.on_main(lambda: check_out(out, overwrite=overwrite))
        data = read_data(config)
        trainer = Trainer(config, new_model(config, data.tokenizer.vocab_size), data, workers)
        folder = workers.on_main(
            lambda: RunFolder.create(
                out, describe(trainer), fill=data.tokenizer.save, overwrite=overwrite
            )
        )
        with closing(folder) if folder else nullcontext():
            train(trainer, folder, listeners, notes=[])
    return out


def resume(
    out: Path, *, changes: dict[str, Any] | None = None, listeners: Sequence[Listener] = ()
) -> Path:
    """Go on with a run from its newest valid checkpoint, or from its start if it has none yet.

    On the same machine it ends with the same bits as a run that was never interrupted. `changes`
    may hold another device, compile and tensorboard.

    Raises: as `pretrain`; ValueError if run.json, data and checkpoint do not belong together.
    """
    record = read_complete_record(out)
    config = changed(TrainConfig.from_json(record["config"]), changes or {})
    with joined(config.device) as workers, deterministic(compiled=config.compile):
        folder = workers.on_main(lambda: RunFolder.open(out))
        with closing(folder) if folder else nullcontext():
            data = read_data(config, load_tokenizer(out))
            check_data(record, data.corpus.fingerprint, data.corpus.description)
            trainer, notes = restored(config, record, out, data, workers)
            train(trainer, folder, listeners, notes)
    return out


def restored(
    config: TrainConfig, record: dict[str, Any], out: Path, data: Data, workers: Workers
) -> tuple[Trainer, list[str]]:
    """The trainer as the newest valid checkpoint left it, and what is wrong with newer ones."""
    found = checkpoint.newest(out / "checkpoints")
    if found:
        described_model(record, found.path)
    check_described(record, config, data.tokenizer.vocab_size)
    trainer = Trainer(config, new_model(config, data.tokenizer.vocab_size), data, workers)
    if found is None:
        return trainer, []
    checkpoint.check_fit(found.path, trainer.model.state_dict())
    trainer.restore(checkpoint.load(found))
    return trainer, found.problems


def train(
    trainer: Trainer, folder: RunFolder | None, listeners: Sequence[Listener], notes: list[str]
) -> None:
    """Train to the end, or to an orderly stop, and leave the folder saying which."""
    config = trainer.config
    recorder = Recorder(
        trainer,
        folder,
        listeners,
        partial(finish, trainer),
        steps=config.steps,
        tensorboard=config.tensorboard,
    )
    run(recorder, notes, partial(loop, trainer, recorder.emit, recorder.save))


def run(recorder: Recorder, notes: list[str], steps: Callable[[Wish], None]) -> None:
    """Make the `steps`, to the end or to an orderly stop, and leave the folder saying which."""
    with closing(recorder):
        status = "failed"
        try:
            recorder.begin(notes)
            with stop_signals() as wish:
                steps(wish)
            recorder.finish()
            status = "finished"
        except Stopped as stopped:
            status = "interrupted" if stopped.code > 128 else "failed"
            raise
        except (KeyboardInterrupt, SystemExit):  # a second signal does not wait for the step
            status = "interrupted"
            raise
        finally:
            if status != "finished":
                recorder.stop(status)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The config of a resumed run.

    Raises: ValueError for a change of anything that the result depends on.
    """
    for name, value in changes.items():
        kept = getattr(config, name)
        if name not in PER_MACHINE and value != kept:
            raise ValueError(
                f"--resume needs the options of the run, got --{name.replace('_', '-')} {value} "
                f"where it has {kept}; leave it out, or start a new run"
            )
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def check_data(record: dict[str, Any], fingerprint: str, description: str) -> None:
    """Raise ValueError unless the data is that which the run began with."""
    began = record["data"].get("fingerprint")
    if began != fingerprint:
        raise ValueError(
            f"--resume needs the data that the run began with, of fingerprint {began}, got {fingerprint} "
            f"from {description}; restore it, or start a new run"
        )
