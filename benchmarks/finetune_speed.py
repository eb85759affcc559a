"""Cost of a step against PEFT's LoRA at the same rank: all methods take turns on the same batches, in random order.

    python benchmarks/finetune_speed.py      # about 2 minutes; needs lowrank-geo[demo]

MiniLM, all linear layers, r = 16, 16 docstrings of at most 64 tokens a step, on one thread; CPU time of the thread, so
that other processes count less. Prints medians, the throughput relative to LoRA, and one JSON line.
"""

import json
import random
import statistics
import time
from typing import Any, NamedTuple

import torch
from protocol import environment, table
from torch import nn
from torch.optim import Optimizer
from transformers.utils import logging

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.finetune.examples import load_examples
from lowrank_geo.finetune.methods import METHODS
from lowrank_geo.finetune.models import base_model
from lowrank_geo.finetune.tokens import Collator, Tokens

STEPS, WARMUP = 12, 2
CONTENDERS = {
    "lora, AdamW": ("lora", "muon"),
    "fixed-rank, qhadam": ("fixed-rank", "qhadam"),
    "fixed-rank, adam": ("fixed-rank", "adam"),
    "fixed-rank, muon": ("fixed-rank", "muon"),
    "fixed-rank, muon-product": ("fixed-rank", "muon-product"),
    "lora-manifold": ("lora-manifold", "muon"),
    "dora, AdamW": ("dora", "muon"),
}


class Contender(NamedTuple):
    """A model under training, and the seconds of its passes and of its optimizer."""

    model: nn.Module
    optimizer: Optimizer
    passes: list[float]
    updates: list[float]


def contender(method: str, config: FinetuneConfig, examples: Any) -> Contender:
    model, _ = base_model(config, examples)
    model = METHODS[method].wrap(model, config, "SEQ_CLS").train()
    return Contender(model, METHODS[method].make(model, config, 1e-3), [], [])


def step(entry: Contender, batch: Any) -> tuple[float, float]:
    start = time.thread_time()
    entry.model(**batch).loss.backward()
    middle = time.thread_time()
    entry.optimizer.step()
    entry.optimizer.zero_grad()
    return middle - start, time.thread_time() - middle


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    examples = load_examples(None, "seq-cls")
    entries = {
        name: contender(method, FinetuneConfig(optimizer=optimizer), examples)
        for name, (method, optimizer) in CONTENDERS.items()
    }
    config = FinetuneConfig()
    _, tokenizer = base_model(config, examples)
    data, collate = Tokens(examples.train, tokenizer, config), Collator(tokenizer, config.task)
    for index in range(STEPS):
        batch = collate([dict(data[index * config.batch + i]) for i in range(config.batch)])
        for entry in random.sample(list(entries.values()), len(entries)):
            passes, update = step(entry, batch)
            if index >= WARMUP:
                entry.passes.append(passes)
                entry.updates.append(update)
    whole = {
        name: statistics.median(a + b for a, b in zip(e.passes, e.updates, strict=True))
        for name, e in entries.items()
    }
    reference = whole["lora, AdamW"]
    rows = [
        [
            name,
            f"{statistics.median(entry.passes):.3f}",
            f"{statistics.median(entry.updates):.3f}",
            f"{reference / whole[name]:.3f}",
        ]
        for name, entry in entries.items()
    ]
    header = ["method", "forward and backward, s", "optimizer, s", "throughput / LoRA"]
    print(table(header, rows))
    records = [dict(zip(header, row, strict=True)) for row in rows]
    print(json.dumps({"benchmark": "finetune-speed", "rows": records, **environment()}))


if __name__ == "__main__":
    main()
