"""A run between two steps: model, optimizer, schedule, and what can be asked of them."""

import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowrank_geo import optim
from lowrank_geo.diagnostics import snapshot
from lowrank_geo.models.decoder import Decoder
from lowrank_geo.optim import schedules
from lowrank_geo.sketch import Sketch
from lowrank_geo.train.checkpoint import Checkpoint
from lowrank_geo.train.config import TrainConfig
from lowrank_geo.train.distributed import Workers
from lowrank_geo.train.metrics import Line
from lowrank_geo.train.parts import Data
from lowrank_geo.train.state import capture, check_finite, give_back, precision_of
from lowrank_geo.train.step import averaged, backward, clip, descend, evaluate

REMEDY = "a lower --lr, a longer --warmup or --dtype float32"


class Trainer:
    """The state of training after `step` steps; all of it is in `checkpoint`, the data is a function of the step.

    Raises: ValueError for an unknown optimizer or a learning rate that it refuses.
    """

    def __init__(self, config: TrainConfig, model: Decoder, data: Data, workers: Workers) -> None:
        check_share(config, workers)
        self.config, self.data, self.workers = config, data, workers
        self.step, self.seconds = 0, 0.0
        self.model = model.to(workers.device)
        self.optimizer = optim.build(
            config.optimizer,
            self.model,
            lr=config.lr,
            euclidean_lr=config.euclidean_lr,
            weight_decay=config.weight_decay,
            total_steps=config.steps,
        )
        if isinstance(self.optimizer, optim.ScheduleFree):
            self.optimizer.train()
        self.schedule = schedule_of(config, self.optimizer)
        self.precision = precision_of(config.dtype, workers.device)
        if config.compile:
            self.model.compile()
            if isinstance(self.optimizer, optim.RiemannianOptimizer):
                self.optimizer.compile()
        self.sketch = Sketch(self.model, config.probes, config.seed) if config.probes else None
        self.parallel: nn.Module = self.model
        if workers.world > 1:
            self.parallel = DistributedDataParallel(self.model)

    def advance(self) -> Line:
        """Make one step and return its "train" line.

        Raises: Stopped, before anything has changed, if the loss or the gradient is not finite.
        """
        began = time.perf_counter()
        workers = self.workers
        inputs, targets = self.data.batches.at(self.step, rank=workers.rank, world=workers.world)
        self.optimizer.zero_grad()
        loss = backward(
            self.parallel,
            inputs.to(workers.device),
            targets.to(workers.device),
            pieces=self.config.accumulate,
            precision=self.precision,
        )
        sketches = self._sketches()  # before clipping
        norm = clip(self.model.parameters(), self.config.clip)
        # One wait for the device a step: a step on a gradient that is not finite could not be undone.
        mean, length = (
            x / workers.world for x in workers.total(*torch.stack([loss, norm]).tolist())
        )
        check_finite(self.step + 1, mean, length, REMEDY)
        lr = self.schedule.get_last_lr()[0]
        descend(self.optimizer, mean)
        self.schedule.step()
        self.step += 1
        spent = time.perf_counter() - began
        self.seconds += spent
        tokens = self.config.batch * self.model.config.context
        return {
            "kind": "train",
            "step": self.step,
            "loss": mean,
            "lr": float(lr),
            "grad_norm": length,
            "tokens": self.step * tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens / spent,
            **sketches,
        }

    def _sketches(self) -> Line:
        if self.sketch is None:
            return {}
        found = torch.stack([self.sketch.gradients(), self.sketch.weights()])
        if not found.isfinite().all():  # what stops the run says so; JSON could not
            return {}
        gradient, weight = found.tolist()
        return {"gradient_sketch": gradient, "weight_sketch": weight}

    def evaluate(self) -> Line:
        """The mean loss on the held-out windows, shared out over the processes.

        Raises: Stopped if it is not finite.
        """
        rank, world, device = self.workers.rank, self.workers.world, self.workers.device
        share = max(1, self.config.batch // self.config.accumulate // world)
        parts = [x[rank::world].to(device).split(share) for x in self.data.windows]
        with averaged(self.optimizer), self.precision:
            found = evaluate(self.model, zip(*parts, strict=True))
        loss, count = self.workers.total(*found)
        check_finite(self.step + 1, loss / count, 0.0, REMEDY)
        return {"kind": "eval", "step": self.step, "loss": loss / count}

    def diagnose(self) -> Line:
        """Ranks, spectra and drift of the layers."""
        with averaged(self.optimizer):
            return {
                "kind": "diagnostics",
                "step": self.step,
                **snapshot(self.model, self.optimizer),
            }

    def checkpoint(self) -> Checkpoint:
        """Everything that later steps depend on.

        Raises: Stopped if a parameter is not finite: it must not replace a good checkpoint.
        """
        return capture(
            self.step,
            self.model,
            self.optimizer,
            self.workers.device,
            schedule=self.schedule.state_dict(),
            seconds=self.seconds,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises: ValueError if the optimizer's state is that of another optimizer or model.
        """
        give_back(checkpoint, self.model, self.optimizer, self.workers.device)
        self.schedule.load_state_dict(checkpoint.training["schedule"])
        self.step, self.seconds = checkpoint.step, checkpoint.training["seconds"]


def check_share(config: TrainConfig, workers: Workers) -> None:
    """Raise ValueError unless every process gets the same whole number of sequences in every micro-batch."""
    pieces = config.accumulate * workers.world
    if config.batch % pieces:
        raise ValueError(
            f"pretrain needs --batch to be a multiple of --accumulate times the number of processes, {pieces}, "
            f"got {config.batch}; choose such a batch"
        )


def schedule_of(config: TrainConfig, optimizer: Optimizer) -> LambdaLR:
    """The learning-rate schedule that a config names."""
    warmup = 0.05 if config.warmup is None else config.warmup / config.steps
    if config.schedule == "constant":
        return schedules.constant(optimizer)
    make = schedules.cosine if config.schedule == "cosine" else schedules.warmup_stable_decay
    return make(optimizer, config.steps, warmup=warmup)
