"""A network on images held out: its loss and its confusions."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_geo.images.epochs import Batch
from lowrank_geo.images.scores import confusion


class Judged(NamedTuple):
    """Shapes: counts (N, C, C), how often each true class (row) was taken for each class (column) in each image;
    sure (N), the probability of the true class, or (0) if every pixel has a class.
    """

    loss: float
    counts: np.ndarray
    sure: np.ndarray


@torch.no_grad()
def judge(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device,
    precision: AbstractContextManager | None = None,
) -> Judged:
    """The mean loss over images, and the confusions of each, in eval mode; the mode is restored."""
    training, total, number, counts = model.training, 0.0, 0, []
    sure = [torch.zeros(0)]
    model.eval()
    for batch in batches:
        images, targets = batch.to(device)
        with precision or nullcontext():
            logits = model(images)
            total += loss(logits, targets).item() * len(images)
        number += len(images)
        found, truth = logits.argmax(1), targets
        if truth.dim() == 1:
            found, truth = found[:, None], truth[:, None]
            sure.append(logits.float().softmax(1).gather(1, truth.long())[:, 0].cpu())
        counts.append(confusion(found, truth, logits.shape[1]).cpu())
    model.train(training)
    return Judged(total / number, torch.cat(counts).numpy(), torch.cat(sure).numpy())


@torch.no_grad()
def settle(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Give BatchNorm the statistics of these batches: averaged weights never saw any in training.

    Shapes: each batch (B, C, H, W).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    training = model.training
    model.train()
    for images in batches:
        model(images)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
