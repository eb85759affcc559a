"""The state that later steps depend on, whatever is trained: taken, given back, and kept finite."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_geo.optim import ScheduleFree
from lowrank_geo.train.checkpoint import Checkpoint
from lowrank_geo.train.step import averaged
from lowrank_geo.train.stopped import Stopped


def check_finite(step: int, loss: float, norm: float, remedy: str) -> None:
    """Raise Stopped, saying what to start again with, unless the loss and the norm of the gradient are finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Stopped(
            f"step {step} needs a finite loss and gradient, got loss {loss} and gradient norm {norm}; "
            f"the last checkpoint is kept, start again with {remedy}",
            2,
        )


def capture(
    step: int, model: nn.Module, optimizer: Optimizer, device: torch.device, **more: Any
) -> Checkpoint:
    """A checkpoint of the model as it is to be used, its optimizer, the generators of random numbers and `more`.

    Raises: Stopped if a parameter is not finite: it must not replace a good checkpoint.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise Stopped(
                f"the checkpoint of step {step} needs finite parameters, got others in {name}; "
                "the checkpoint before is kept, start again with a lower --lr",
                2,
            )
    with averaged(optimizer):
        weights, state = copied(model), optimizer.state_dict()
    return Checkpoint(step, weights, {"optimizer": state, "random": random_states(device), **more})


def give_back(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, device: torch.device
) -> None:
    """What `capture` took, all but `more`.

    Raises: ValueError if the optimizer's state is that of another optimizer or model.
    """
    model.load_state_dict(checkpoint.model)
    training: dict[str, Any] = checkpoint.training
    optimizer.load_state_dict(training["optimizer"])
    if isinstance(optimizer, ScheduleFree):
        optimizer.train()
    torch.set_rng_state(training["random"]["cpu"])
    if device.type == "cuda" and "cuda" in training["random"]:
        torch.cuda.set_rng_state(training["random"]["cuda"])


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, on the CPU, apart from it."""
    return {name: x.detach().cpu().clone() for name, x in model.state_dict().items()}


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def precision_of(chosen: str, device: torch.device) -> AbstractContextManager:
    """Parameters are float32 always; this is the precision of forward and backward."""
    if chosen == "auto":
        chosen = (
            "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        )
    return nullcontext() if chosen == "float32" else torch.autocast(device.type, torch.bfloat16)
