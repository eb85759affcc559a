"""The arithmetic of one step: gradients of the mean loss, their norm, the update."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowrank_geo.optim import ScheduleFree


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of the next token, in nats, computed in float32 under autocast too.

    Shapes: inputs, targets (B, T) -> ().
    """
    return F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())


def backward(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    pieces: int,
    precision: AbstractContextManager,
) -> Tensor:
    """Add the gradient of the mean loss to `.grad`, one of `pieces` micro-batches at a time; returns that loss.

    Processes exchange gradients once, with the last micro-batch. A NaN in any micro-batch makes the returned loss NaN.

    Shapes: inputs, targets (B, T), B a multiple of pieces -> ().
    """
    total = torch.zeros((), device=inputs.device)
    for piece, (x, y) in enumerate(
        zip(inputs.chunk(pieces), targets.chunk(pieces), strict=True), 1
    ):
        with no_exchange(model) if piece < pieces else nullcontext():
            with precision:
                loss = cross_entropy(model, x, y) / pieces
            loss.backward()
        total += loss.detach()
    return total


def no_exchange(model: nn.Module) -> AbstractContextManager:
    """Backward passes within do not average gradients over processes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def clip(parameters: Iterable[Tensor], largest: float | None) -> Tensor:
    """Scale the gradient to norm `largest` if it is longer; returns the norm that it had."""
    bound = float("inf") if largest is None else largest
    return nn.utils.clip_grad_norm_(list(parameters), bound)


def descend(optimizer: Optimizer, loss: float) -> None:
    """A step of the optimizer; Polyak's is as long as the loss, the mean over all processes, says."""
    if isinstance(optimizer, ScheduleFree):
        optimizer.step(loss=loss)
    else:
        optimizer.step()


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """The parameters within are those to use: the average of a schedule-free optimizer, else what they are."""
    if not isinstance(optimizer, ScheduleFree):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


@torch.no_grad()
def evaluate(model: nn.Module, windows: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """The summed loss over batches of windows, and how many tokens that is.

    Shapes: each batch (B, T) twice.
    """
    model.eval()
    loss, count = 0.0, 0
    for inputs, targets in windows:
        if not targets.numel():  # more processes than windows
            continue
        loss += cross_entropy(model, inputs, targets).item() * targets.numel()
        count += targets.numel()
    model.train()
    return loss, count
