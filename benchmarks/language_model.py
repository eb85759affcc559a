"""A small byte-level language model on Python's standard library, trained in one call: the task of the benchmarks."""

import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from lowrank_geo import convert, lowrank_layers, param_groups, plan_ranks, to_factors
from lowrank_geo.data import Batches, ByteTokenizer, encode_corpus, load_corpus, windows
from lowrank_geo.models.decoder import Decoder, DecoderConfig
from lowrank_geo.optim import RiemannianAdam, RiemannianMuon, ScheduleFree, schedules
from lowrank_geo.train.step import averaged, descend

EUCLIDEAN_LR = 2e-3  # of embeddings, norms and head, wherever matrices have a rule of their own
WEIGHT_DECAY = 0.1
EVALUATION = 256  # windows of held-out text


class Task(NamedTuple):
    """Model and budget of a run."""

    width: int
    hidden: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int

    def config(self) -> DecoderConfig:
        return DecoderConfig(257, self.width, self.layers, self.heads, self.hidden, self.context)


@cache
def tokens() -> Any:
    return encode_corpus(load_corpus(), ByteTokenizer())


def dense(task: Task, seed: int) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(task.config())


def lowrank(task: Task, seed: int, rank: int, init: str = "spectral") -> nn.Module:
    """The model with every linear layer but the head at one rank."""
    model = dense(task, seed)
    return convert(model, plan_ranks(model, rank=rank, init=init))


def factors(task: Task, seed: int, rank: int) -> nn.Module:
    """Two balanced factors per layer, W = (U √S)(V √S)ᵀ, from the same starting weights."""
    model = lowrank(task, seed, rank)
    for _, layer in lowrank_layers(model):
        root = layer.S.detach().diagonal().sqrt()  # the starting S is diagonal
        layer.U.data.mul_(root)
        layer.V.data.mul_(root)
        layer.S.data.copy_(torch.eye(layer.rank))
    return to_factors(model)


def narrow(task: Task, parameters: int) -> Task:
    """The widest dense task with at most that many parameters, at the same depth, heads and shape of the MLP."""
    fits = task
    for width in range(2 * task.heads, task.width, 2 * task.heads):
        hidden = round(width * task.hidden / task.width / 4) * 4
        candidate = task._replace(width=width, hidden=hidden)
        if size(candidate) <= parameters:
            fits = candidate
    # The MLP takes up what the coarse grid of widths left over.
    while size(wider := fits._replace(hidden=fits.hidden + 1)) <= parameters:
        fits = wider
    return fits


def size(task: Task) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(task.config()).parameters())


def adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """torch.optim.AdamW with its own betas: lr for the matrices, the common rate for embeddings, norms and head."""
    groups = split(model)
    return [
        torch.optim.AdamW(
            [
                {"params": groups[0], "lr": lr, "weight_decay": WEIGHT_DECAY},
                {"params": groups[1], "lr": EUCLIDEAN_LR, "weight_decay": WEIGHT_DECAY},
                {"params": groups[2], "lr": EUCLIDEAN_LR, "weight_decay": 0.0},
            ]
        )
    ]


def muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """torch.optim.Muon on the matrices, AdamW on the rest."""
    matrices, tables, vectors = split(model)
    return [
        torch.optim.Muon(
            matrices, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": WEIGHT_DECAY},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=EUCLIDEAN_LR,
            betas=(0.95, 0.95),
        ),
    ]


def riemannian(
    model: nn.Module, lr: float, cls: Any, **settings: Any
) -> list[torch.optim.Optimizer]:
    groups = param_groups(model, lr=lr, euclidean_lr=EUCLIDEAN_LR, weight_decay=WEIGHT_DECAY)
    return [cls(groups, **settings)]


def riemannian_muon(model: nn.Module, lr: float, **settings: Any) -> list[torch.optim.Optimizer]:
    return riemannian(model, lr, RiemannianMuon, **settings)


def riemannian_adam(model: nn.Module, lr: float, **settings: Any) -> list[torch.optim.Optimizer]:
    return riemannian(model, lr, RiemannianAdam, **settings)


def split(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights of the blocks; embedding and head; vectors."""
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        inside = name.startswith("blocks.") and p.dim() == 2
        (matrices if inside else tables if p.dim() == 2 else vectors).append(p)
    return matrices, tables, vectors


def decaying(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The schedule of every run that does not say otherwise: short warmup, linear decay to zero."""
    return schedules.warmup_stable_decay(optimizer, steps, warmup=0.05, decay=0.95)


def train(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    task: Task,
    seed: int,
    *,
    plan: Callable[[torch.optim.Optimizer, int], LambdaLR] = decaying,
    clip: float = 1.0,
    steps: range | None = None,
) -> dict[str, Any]:
    """Train for task.steps; the loss is on held-out text, infinite once it is not finite.

    A schedule-free optimizer is judged at its average. `steps` makes only these of task.steps, by the same schedule.

    Units: loss in nats per byte, ms_per_step the median.
    """
    batches = Batches(tokens().train, context=task.context, batch=task.batch, seed=seed)
    plans = [plan(o, task.steps) for o in optimizers]
    for optimizer in optimizers:
        if isinstance(optimizer, ScheduleFree):
            optimizer.train()
    times = []
    steps = steps or range(task.steps)
    for schedule in plans if steps.start else []:
        schedule.last_epoch = steps.start - 1
        with warnings.catch_warnings():  # no step of the optimizer comes before this one
            warnings.simplefilter("ignore")
            schedule.step()
    for step in steps:
        start = time.perf_counter()
        x, y = batches.at(step)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        if step % 10 == 0 and not torch.isfinite(loss):
            break
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer, schedule in zip(optimizers, plans, strict=True):
            descend(optimizer, loss.item())
            schedule.step()
        times.append(time.perf_counter() - start)
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(averaged(optimizer))
        held_out = evaluate(model, task)
    return {
        "loss": held_out,
        "parameters": sum(p.numel() for p in model.parameters()),
        "mflop_per_token": flops(model, task) / (task.batch * task.context) / 1e6,
        "ms_per_step": 1e3 * sorted(times)[len(times) // 2] if times else float("nan"),
    }


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """Held-out loss in nats per byte."""
    x, y = windows(tokens().held_out, task.context, EVALUATION)
    losses = [
        F.cross_entropy(model(a).flatten(0, 1), b.flatten())
        for a, b in zip(x.split(task.batch), y.split(task.batch), strict=True)
    ]
    return float(torch.stack(losses).mean())


def flops(model: nn.Module, task: Task) -> int:
    """Floating-point operations of a forward and backward pass over one batch."""
    x, y = Batches(tokens().train, context=task.context, batch=task.batch, seed=0).at(0)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()
