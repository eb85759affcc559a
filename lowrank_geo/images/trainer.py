"""A run on images between two steps: model, optimizer, plateau schedule, and the best epoch so far."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lowrank_geo import optim
from lowrank_geo.images.collect import Images, group
from lowrank_geo.images.config import ImageConfig
from lowrank_geo.images.epochs import Epochs, in_order
from lowrank_geo.images.judging import Judged, judge, settle
from lowrank_geo.images.tasks import task_of
from lowrank_geo.train.checkpoint import Checkpoint
from lowrank_geo.train.distributed import Workers
from lowrank_geo.train.metrics import Line
from lowrank_geo.train.state import capture, check_finite, copied, give_back, precision_of
from lowrank_geo.train.step import averaged, clip, descend

REMEDY = "a lower --lr or a --clip"
SETTLED = 50  # batches that give averaged weights their statistics
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # what changes in it


class Best(NamedTuple):
    """The epoch with the best score on the validation images, of equal ones that with the least loss; 0: none yet."""

    epoch: int = 0
    score: float = -1.0
    loss: float = 0.0
    model: dict[str, Tensor] = {}


class ImageTrainer:
    """The state of training after `step` steps; all of it is in `checkpoint`, the batches are a function of the step.

    Raises: ValueError for an unknown optimizer or a learning rate that it refuses.
    """

    def __init__(
        self, config: ImageConfig, model: nn.Module, images: Images, workers: Workers
    ) -> None:
        assert config.epochs and config.batch and config.optimizer  # filled
        self.config, self.images, self.workers = config, images, workers
        self.task = task_of(config)
        self.step, self.seconds, self.best = 0, 0.0, Best()
        self.model = model.to(workers.device)
        self.batch = config.batch
        self.epochs = Epochs(images, config.batch, config.seed, augmented=bool(config.augment))
        self.steps = config.epochs * self.epochs.steps  # at most
        self.optimizer = optim.build(
            config.optimizer,
            self.model,
            lr=config.lr,
            euclidean_lr=config.euclidean_lr,
            weight_decay=config.weight_decay,
            total_steps=self.steps,
        )
        if isinstance(self.optimizer, optim.ScheduleFree):
            self.optimizer.train()
        self.plateau = ReduceLROnPlateau(self.optimizer, patience=config.patience)
        self.precision = precision_of(config.dtype, workers.device)
        self.groups = [group(images.samples[i]) for i in images.split.val]

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self.step // self.epochs.steps

    @property
    def done(self) -> bool:
        return self.step >= self.steps or self.epoch - self.best.epoch >= self.config.stop_after

    def advance(self) -> Line:
        """Make one step and return its "train" line.

        Raises: Stopped, before anything has changed, if the loss or the gradient is not finite.
        """
        began = time.perf_counter()
        images, targets = self.epochs.at(self.step).to(self.workers.device)
        self.optimizer.zero_grad()
        with self.precision:
            loss = self.task.loss(self.model(images), targets)
        loss.backward()
        norm = clip(self.model.parameters(), self.config.clip)
        mean, length = torch.stack([loss.detach(), norm]).tolist()
        check_finite(self.step + 1, mean, length, REMEDY)
        lr = float(self.optimizer.param_groups[0]["lr"])
        descend(self.optimizer, mean)
        self.step += 1
        spent = time.perf_counter() - began
        self.seconds += spent
        return {
            "kind": "train",
            "step": self.step,
            "loss": mean,
            "lr": lr,
            "grad_norm": length,
            "seconds": self.seconds,
            "images_per_second": len(images) / spent,
        }

    def validate(self) -> Line:
        """End an epoch: judge it on the validation images, remember it if it is the best, lower the rate on a plateau.

        Raises: Stopped if the loss is not finite.
        """
        with self.at_average():
            judged = self.judge(self.images.split.val)
            scores = self.task.means(judged.counts)
            score = scores[self.task.score]
            if (score, -judged.loss) > (self.best.score, -self.best.loss):
                self.best = Best(self.epoch, score, judged.loss, copied(self.model))
        check_finite(self.step + 1, judged.loss, 0.0, REMEDY)
        self.plateau.step(judged.loss)
        interval = self.task.intervals(judged.counts, self.groups)[self.task.score]
        return {
            "kind": "eval",
            "step": self.step,
            "epoch": self.epoch,
            "loss": judged.loss,
            **scores,
            "score": self.task.score,
            "low": interval.low,
            "high": interval.high,
            "best": self.best.epoch,
        }

    def judge(self, places: list[int]) -> Judged:
        """The model, as it is, on some of the images."""
        return judge(
            self.model,
            in_order(self.images, places, self.batch),
            self.task.loss,
            device=self.workers.device,
            precision=self.precision,
        )

    @contextmanager
    def at_average(self) -> Iterator[None]:
        """The model within is the one to use: with a schedule-free optimizer its average, and statistics for it."""
        if not isinstance(self.optimizer, optim.ScheduleFree):
            yield
            return
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with averaged(self.optimizer):
            batches = in_order(self.images, self.images.split.train, self.batch)
            device = self.workers.device
            settle(self.model, (b.images.to(device) for b in islice(batches, SETTLED)))
            yield
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])

    def checkpoint(self) -> Checkpoint:
        """Everything that later steps depend on.

        Raises: Stopped if a parameter is not finite: it must not replace a good checkpoint.
        """
        plateau = {key: getattr(self.plateau, key) for key in PLATEAU}
        if not math.isfinite(plateau["best"]):  # before the first epoch, and not to be had in JSON
            del plateau["best"]
        return capture(
            self.step,
            self.model,
            self.optimizer,
            self.workers.device,
            plateau=plateau,
            best=dict(self.best._asdict()),
            seconds=self.seconds,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises: ValueError if the optimizer's state is that of another optimizer or model.
        """
        give_back(checkpoint, self.model, self.optimizer, self.workers.device)
        training = checkpoint.training
        vars(self.plateau).update(training["plateau"])
        self.best = Best(**training["best"])
        self.step, self.seconds = checkpoint.step, training["seconds"]
