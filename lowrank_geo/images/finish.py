"""The end of a run on images: the best epoch on the test images, and what a report shows of it."""

import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from lowrank_geo.images.collect import group
from lowrank_geo.images.overlays import draw_cases, worst_first
from lowrank_geo.images.report import write_report
from lowrank_geo.images.scores import image_scores
from lowrank_geo.images.trainer import ImageTrainer
from lowrank_geo.plan import Plan
from lowrank_geo.train.metrics import Listener
from lowrank_geo.train.recorder import environment
from lowrank_geo.train.run_folder import RunFolder


def describe(trainer: ImageTrainer) -> dict[str, Any]:
    """The run.json of a run that has not begun. It holds no name of a file: those of scans are often a patient's."""
    images, plan = trainer.images, cast(Plan, trainer.model.lowrank_plan)
    return {
        "kind": trainer.config.command,
        "status": "running",
        "config": trainer.config.to_json(),
        "plan": plan.to_json(),
        "model": {"network": type(trainer.model).__name__},
        "data": {
            "description": images.description,
            "fingerprint": images.fingerprint,
            "channels": images.channels,
            "classes": images.classes,
        },
        "parameters": {"dense": plan.dense_parameters, "low_rank": plan.parameters},
        "environment": environment(trainer.workers),
    }


def finish(trainer: ImageTrainer, folder: RunFolder, emit: Listener) -> Path:
    """Judge the best epoch on the test images, draw its cases, mark the run as finished and write its report."""
    images, task = trainer.images, trainer.task
    trainer.model.load_state_dict(trainer.best.model)
    began = time.perf_counter()
    judged = trainer.judge(images.split.test)
    spent = time.perf_counter() - began
    groups = [group(images.samples[i]) for i in images.split.test]
    scores = task.intervals(judged.counts, groups)
    line: dict[str, Any] = {"kind": "test", "step": trainer.step, "epoch": trainer.best.epoch}
    line |= {"loss": judged.loss, "judged_on": images.split.judged_on, "scores": scores}
    line["milliseconds_per_image"] = 1000 * spent / len(images.split.test)
    emit(line)
    values = judged.sure if len(judged.sure) else image_scores(judged.counts).dice
    cases = draw_cases(trainer, worst_first(images.split.test, values), folder.path / "cases")
    folder.update(
        status="finished",
        result=line
        | {
            "images": len(images.split.test),
            "groups": len(set(groups)),
            "confusion": judged.counts.sum(0).tolist(),
            "per_image": np.sort(values).tolist(),
            "cases": cases,
        },
    )
    return write_report(folder.path)
