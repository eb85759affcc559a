"""The tasks that adapters are compared on: one run of a method each.

digits: a small ViT pre-trained on the digits 0 to 4 of scikit-learn, fine-tuned on 5 to 9 with a new head; swapped: the
other way round, for what was chosen on the first. docstrings: the MiniLM encoder, which module of the standard library
a docstring comes from; needs lowrank-geo[demo].
"""

import time
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from protocol import Run
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.finetune.memory import peak_bytes, reset_peak
from lowrank_geo.finetune.methods import METHODS


class Digits(NamedTuple):
    """Images (N, 1, 8, 8) and labels (N)."""

    x: Tensor
    y: Tensor


@cache
def digits(upper: bool) -> tuple[Digits, Digits]:
    """Training and held-out images of the digits 5 to 9, or 0 to 4; labels 0 to 4."""
    source = load_digits()
    x = torch.tensor(source.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(source.target)
    chosen = ((y >= 5) == upper).nonzero()[:, 0]
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    held_out, train = chosen[:300], chosen[300:]
    return Digits(x[train], y[train] % 5), Digits(x[held_out], y[held_out] % 5)


def small_vit(seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_hidden_layers=3,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


@cache
def pretrained(upper: bool) -> dict[str, Tensor]:
    """The weights after 300 steps of AdamW on the digits 5 to 9, or 0 to 4."""
    model, (train, _) = small_vit(0), digits(upper)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(300):
        rows = torch.randint(0, len(train.y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(train.x[rows]).logits, train.y[rows]).backward()
        optimizer.step()
    return model.state_dict()


def compute_digits(
    method: str, optimizer: str, r: int, head: float, run: Run, *, upper: bool = True
) -> dict[str, Any]:
    """Fine-tune for 60 steps of 32 on 100 images: with all of them every method is right on every image."""
    model = small_vit(run.seed)
    new_head = model.classifier.state_dict()
    model.load_state_dict(pretrained(not upper))
    model.classifier.load_state_dict(new_head)
    steps = 60
    config = FinetuneConfig(r=r, optimizer=optimizer, steps=steps, euclidean_lr=head, seed=run.seed)
    torch.manual_seed(run.seed)
    wrapped = METHODS[method].wrap(model, config, "SEQ_CLS")
    chosen = METHODS[method].make(wrapped, config, run.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
    (train, held_out), draw = digits(upper), torch.Generator().manual_seed(run.seed)
    reset_peak()
    start = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(0, 100, (32,), generator=draw)
        loss = F.cross_entropy(wrapped(pixel_values=train.x[rows]).logits, train.y[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        chosen.step()
        prune = getattr(getattr(wrapped, "base_model", None), "update_and_allocate", None)
        if prune is not None:
            prune(step)
        chosen.zero_grad()
        schedule.step()
    seconds, memory = time.perf_counter() - start, peak_bytes()
    with torch.no_grad():
        logits = wrapped.eval()(pixel_values=held_out.x).logits
    return {
        "loss": F.cross_entropy(logits, held_out.y).item(),
        "accuracy": (logits.argmax(1) == held_out.y).float().mean().item(),
        "trained": sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
        "samples_per_second": 32 * steps / seconds,
        "peak_memory": memory,
    }


def compute_docstrings(
    method: str, optimizer: str, r: int, head: float, run: Run
) -> dict[str, Any]:
    """Fine-tune MiniLM with Trainer for 60 steps of 16 texts of at most 32 tokens."""
    from lowrank_geo.finetune.run import finetune

    settings = dict(steps=60, length=32, euclidean_lr=head, seed=run.seed)
    return finetune(FinetuneConfig(r=r, optimizer=optimizer, lr=run.lr, **settings), method=method)


TASKS = {
    "digits": compute_digits,
    "docstrings": compute_docstrings,
    "swapped": partial(compute_digits, upper=False),
}
