"""What a run leaves on the disk while it trains and when it ends."""

import contextlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from lowrank_geo.generation import continue_text
from lowrank_geo.plan import Plan
from lowrank_geo.report import write_report
from lowrank_geo.train import checkpoint
from lowrank_geo.train.distributed import Workers
from lowrank_geo.train.metrics import Line, Listener, Metrics, TensorBoard
from lowrank_geo.train.run_folder import RunFolder
from lowrank_geo.train.trainer import Trainer

SAMPLE = 200  # tokens of the sample in the report


class Trained(Protocol):
    """What the recorder asks of a trainer."""

    step: int
    workers: Workers

    def checkpoint(self) -> checkpoint.Checkpoint: ...


class Recorder:
    """The pen of the main process; in the others, which have no folder, it writes nothing.

    `finish` uses the trained model, may emit lines, writes the report, and returns its path.
    """

    def __init__(
        self,
        trainer: Trained,
        folder: RunFolder | None,
        listeners: Sequence[Listener],
        finish: Callable[[RunFolder, Listener], Path],
        *,
        steps: int,
        tensorboard: bool = False,
    ) -> None:
        self.trainer, self.folder = trainer, folder
        self.finishing, self.steps = finish, steps
        self.callers = list(listeners) if folder else []
        self.listeners = list(self.callers)
        self.metrics: Metrics | None = None
        if folder:
            last = trainer.step or -1  # a run that begins measures step 0 again
            self.metrics = Metrics(folder.path / "metrics.jsonl", last=last)
            self.listeners.append(self.metrics)
            if tensorboard:
                self.listeners.append(TensorBoard(folder.path / "tensorboard", last=last))

    def begin(self, notes: list[str]) -> None:
        """Mark the run as running; `notes` is what was wrong with checkpoints passed over."""
        if not self.folder:
            return
        self.folder.update(status="running", environment=environment(self.trainer.workers))
        plan = Plan.from_json(self.folder.record["plan"])
        self._tell(
            {
                "kind": "start",
                "step": self.trainer.step,
                "steps": self.steps,
                "plan": plan,
                "notes": notes,
            }
        )

    def emit(self, line: Line) -> None:
        """Give a measured line to the file and to all listeners."""
        for listener in self.listeners:
            listener(line)

    def save(self) -> None:
        """Write a checkpoint; no process goes on before it is on the disk."""
        state = self.trainer.checkpoint()

        def write() -> None:
            assert self.folder and self.metrics
            self.metrics.sync()
            checkpoint.save(self.folder.path / "checkpoints", state)

        self.trainer.workers.on_main(write)

    def stop(self, status: str) -> None:
        """Mark a run that ended early; on a full disk the mark is lost, not the reason for the end."""
        with contextlib.suppress(OSError):
            if self.folder:
                self.folder.update(status=status)

    def finish(self) -> None:
        """Mark the run as finished, with what comes of it, and write its report."""
        self.trainer.workers.on_main(self._finish)

    def _finish(self) -> None:
        assert self.folder
        report = self.finishing(self.folder, self.emit)
        self._tell({"kind": "end", "step": self.trainer.step, "report": report})

    def _tell(self, event: Line) -> None:
        """Tell the caller's listeners, not the files."""
        for listener in self.callers:
            listener(event)

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()


def finish(trainer: Trainer, folder: RunFolder, emit: Listener) -> Path:
    """Mark a pre-training run as finished, with a sample of its text, and write its report."""
    config = trainer.config
    text = continue_text(
        trainer.model, trainer.data.tokenizer, config.prompt, count=SAMPLE, seed=config.seed
    )
    folder.update(status="finished", samples=[{"prompt": config.prompt, "text": text}])
    return write_report(folder.path)


def describe(trainer: Trainer) -> dict[str, Any]:
    """The run.json of a run that has not begun."""
    corpus, plan = trainer.data.corpus, cast(Plan, trainer.model.lowrank_plan)
    return {
        "status": "running",
        "config": trainer.config.to_json(),
        "plan": plan.to_json(),
        "model": asdict(trainer.model.config),
        "data": {
            "description": corpus.description,
            "fingerprint": corpus.fingerprint,
            "vocab_size": trainer.data.tokenizer.vocab_size,
        },
        "parameters": {"dense": plan.dense_parameters, "low_rank": plan.parameters},
        "samples": [],
        "environment": environment(trainer.workers),
    }


def environment(workers: Workers) -> dict[str, Any]:
    """What the bits of a run depend on beside its config."""
    return {
        "lowrank_geo": version("lowrank-geo"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": workers.device.type,
        "threads": torch.get_num_threads(),
        "processes": workers.world,
    }
