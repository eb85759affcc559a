"""Adapters at equal rank: fixed rank with every optimizer against LoRA and its variants, on two tasks.

    python benchmarks/finetune.py digits --quick      # r = 4, 16, 32, five methods, one seed
    python benchmarks/finetune.py digits              # r = 4, 8, 16, 32, three seeds
    python benchmarks/finetune.py docstrings --quick  # r = 16; needs lowrank-geo[demo]; 15 to 30 s a run, 13 a method
    python benchmarks/finetune.py docstrings --ranks 16 --only "fixed-rank, muon|^lora"  # all of it: 12 hours a core

digits: a small ViT pre-trained on the digits 0 to 4 of scikit-learn, fine-tuned on 5 to 9 with a new head. docstrings:
the MiniLM encoder, which module of the standard library a docstring comes from. Every method has grids of ratio 2 for
two learning rates, its own and that of the new head, grown until the best is inside: a method that is compared at the
head's rate of another one looks worse by more than what adapters differ by. Runs are kept in results/ and skipped. Ends
with one JSON line.
"""

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from protocol import Row, Run, Store, environment, geometric, round_rate, sweep, table, window
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from lowrank_geo.finetune.config import FinetuneConfig
from lowrank_geo.finetune.memory import peak_bytes, reset_peak
from lowrank_geo.finetune.methods import METHODS, Method, lora, with_head
from lowrank_geo.optim import RiemannianAdam
from lowrank_geo.peft.training import BETAS, MAX_RMS


def bounded(model: nn.Module, config: FinetuneConfig, lr: float) -> RiemannianAdam:
    """AdamW whose directions of A and B are bounded as those of the fixed-rank adapter are."""
    adapters, *heads = with_head(model, config, lr)
    return RiemannianAdam([{**adapters, "max_rms": MAX_RMS}, *heads], betas=BETAS)


METHODS["lora-bounded"] = Method(lora(), bounded, None)
OPTIMIZERS = ("muon", "muon-product", "adam", "sgd", "lion", "qhadam")
BASELINES = tuple(name for name in METHODS if name != "fixed-rank")
FIRST = {
    "muon": 5e-3,
    "muon-product": 0.04,
    "adam": 6.25e-4,
    "qhadam": 6.25e-4,
    "sgd": 0.125,
    "lion": 1e-3,
    "full": 2.5e-4,
}  # first rate of the grid where 2.5e-3 is far off, or where nothing is learned from there on at large ranks
HEAD = {"digits": 4e-3, "docstrings": 0.032}  # where the search for the rate of new heads starts
SEARCH = {"digits": 3, "docstrings": 1}  # seeds of that search: what is noisier is quicker, too
RANKS = (4, 8, 16, 32)
QUICK_RANKS = {"digits": (4, 16, 32), "docstrings": (16,)}
QUICK = ("fixed-rank, muon", "lora", "lora-manifold", "pissa", "full")


Compute = Callable[[float, Run], dict[str, Any]]  # of the rate of the head, and a run


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
    # 100 to learn from: with all of them every method is right on every image.
    train = train[:100] if upper else train
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
def pretrained() -> dict[str, Tensor]:
    """The weights after 300 steps of AdamW on the digits 0 to 4."""
    model, (train, _) = small_vit(0), digits(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(300):
        rows = torch.randint(0, len(train.y), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(train.x[rows]).logits, train.y[rows]).backward()
        optimizer.step()
    return model.state_dict()


def compute_digits(method: str, optimizer: str, r: int, head: float, run: Run) -> dict[str, Any]:
    """Fine-tune for 60 steps of 32; "loss" is that of held-out images."""
    model = small_vit(run.seed)
    new_head = model.classifier.state_dict()
    model.load_state_dict(pretrained())
    model.classifier.load_state_dict(new_head)
    steps = 60
    config = FinetuneConfig(r=r, optimizer=optimizer, steps=steps, euclidean_lr=head, seed=run.seed)
    torch.manual_seed(run.seed)
    wrapped = METHODS[method].wrap(model, config, "SEQ_CLS")
    chosen = METHODS[method].make(wrapped, config, run.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, steps)
    (train, held_out), draw = digits(True), torch.Generator().manual_seed(run.seed)
    reset_peak()
    start = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(0, len(train.y), (32,), generator=draw)
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


TASKS = {"digits": compute_digits, "docstrings": compute_docstrings}


def entries(r: int, quick: bool) -> list[tuple[str, str, str]]:
    """(name, method, optimizer) of what is compared at a rank; full fine-tuning has none and is there once."""
    found = [(f"fixed-rank, {name}", "fixed-rank", name) for name in OPTIMIZERS]
    found += [(name, name, "muon") for name in BASELINES if name != "full" or r == 16]
    return [entry for entry in found if not quick or entry[0] in QUICK]


def label(name: str, r: int, head: float) -> str:
    """What a run is kept under."""
    return f"{name} | r {r} | head {head:g}"


def first_rate(method: str, optimizer: str) -> float:
    return FIRST.get(optimizer if method == "fixed-rank" else method, 2.5e-3)


class Tuned(NamedTuple):
    """A method at the best of both learning rates."""

    name: str
    r: int
    head: float
    row: Row
    window: float  # of rates, see `window`


def around(lr: float) -> list[float]:
    """A rate and its two neighbours."""
    return geometric(lr / 2, 2.0, 3)


def sweep_both(
    store: Store,
    name: str,
    r: int,
    grid: list[float],
    compute: Compute,
    *,
    head: float,
    search: int,
    seeds: int,
) -> Tuned:
    """The protocol for one method, at the rate of the head, from `head` on, that is the best with `search` seeds."""
    rows: dict[float, Row] = {}

    def at(head: float, grid: list[float], seeds: int) -> Row:
        return sweep(store, label(name, r, head), grid, partial(compute, head), seeds=seeds)

    while True:
        for rate in (head, round_rate(head / 2), round_rate(head * 2)):
            if rate not in rows:
                rows[rate] = at(rate, grid, search)
                grid = around(rows[rate].lr)
        best = min(rows, key=lambda rate: rows[rate].loss)
        if best == head:
            break
        head = best
    row = at(head, around(rows[head].lr), seeds)
    found = partial(mean_loss, store, row.method, partial(compute, head), seeds)
    return Tuned(name, r, head, row, window(found, row.lr))


def mean_loss(
    store: Store, method: str, compute: Callable[[Run], dict[str, Any]], seeds: int, lr: float
) -> float:
    """Over all seeds, computed where it is not there: one seed of these tasks spreads by as much as a window's 5 %."""
    return statistics.fmean(
        store.get(Run(method, lr, seed), compute)["loss"] for seed in range(seeds)
    )


def means(store: Store, method: str) -> dict[float, float]:
    """The mean loss at each rate that was run; far from the best it is that of one seed."""
    losses: dict[float, list[float]] = {}
    for run, record in store.records.items():
        if run.method == method:
            losses.setdefault(run.lr, []).append(record["loss"])
    return {lr: statistics.fmean(found) for lr, found in losses.items()}


def as_good(store: Store, tuned: Tuned, bar: float) -> float:
    """The largest over the smallest rate at which a method is no worse than `bar`, the loss of LoRA at its best and the
    same rank; 0 if there is none, NaN without LoRA. A bar that is one for all: within 5 % of its own best, a method
    with a deep minimum looks sensitive at rates where it still beats the others.
    """
    good = [lr for lr, loss in means(store, tuned.row.method).items() if loss <= bar]
    return math.nan if math.isnan(bar) else max(good) / min(good) if good else 0.0


def one_rate(store: Store, ranks: list[Tuned]) -> tuple[float, float]:
    """The rate that serves all ranks of a method best, and its mean loss above that of each rank's own best rate.

    Of the rates that were run at every rank, with the head that is best at the rank; NaN if there is none.
    """
    found = [means(store, tuned.row.method) for tuned in ranks]
    shared = set.intersection(*(set(losses) for losses in found))
    excess = {
        lr: statistics.fmean(
            losses[lr] - tuned.row.loss for losses, tuned in zip(found, ranks, strict=True)
        )
        for lr in shared
    }
    return min(excess.items(), key=lambda item: item[1], default=(math.nan, math.nan))


def transfer(store: Store, found: list[Tuned]) -> list[list[str]]:
    """How far one learning rate for all ranks goes, a line for each method that was tuned at several."""
    by_name = {t.name: [x for x in found if x.name == t.name] for t in found}
    lines = []
    for name, ranks in by_name.items():
        if len(ranks) > 1:
            lr, excess = one_rate(store, ranks)
            own = ", ".join(f"{x.row.lr:.3g} (r {x.r})" for x in ranks)
            lines.append([name, own, f"{lr:.3g}", f"{excess:.3f}"])
    return lines


def line(tuned: Tuned, store: Store, bar: float) -> list[str]:
    row = tuned.row
    records = [store.records[Run(row.method, row.lr, seed)] for seed in range(row.seeds)]
    accuracy = statistics.fmean(r["accuracy"] for r in records)
    speed = statistics.fmean(r["samples_per_second"] for r in records)
    return [
        f"{tuned.name}, r {tuned.r}",
        f"{accuracy:.3f}",
        f"{row.loss:.3f} ± {row.spread:.3f}",
        f"{row.lr:.3g}",
        f"{tuned.head:.3g}",
        f"{tuned.window:.1f}",
        f"{as_good(store, tuned, bar):.0f}",
        f"{row.record['trained']:,}",
        f"{speed:.0f}",
        f"{row.record['peak_memory'] / 2**20:,.0f}",
    ]


HEADER = [
    "method",
    "accuracy",
    "held-out loss",
    "best lr",
    "of the head",
    "lr window",
    "as LoRA",
    "trained",
    "samples/s",
    "MiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument(
        "--quick", action="store_true", help="five methods at r = 4, 16, 32, one seed"
    )
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument(
        "--only", default="", help="methods whose name matches this regular expression"
    )
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task, quick = arguments.task, arguments.quick
    name = f"finetune-{task}" + ("-quick" if quick else "")
    store = Store(Path(__file__).parent / "results" / f"{name}.jsonl")
    found = []
    for r in arguments.ranks or (QUICK_RANKS[task] if quick else RANKS):
        for entry, method, optimizer in entries(r, quick):
            if re.search(arguments.only, entry):
                compute = partial(TASKS[task], method, optimizer, r)
                grid = geometric(first_rate(method, optimizer), 2.0, 4)
                search, seeds = (1, 1) if quick else (SEARCH[task], 3)
                start = HEAD[task]
                found.append(
                    sweep_both(
                        store, entry, r, grid, compute, head=start, search=search, seeds=seeds
                    )
                )
    bars = {tuned.r: tuned.row.loss for tuned in found if tuned.name == "lora"}
    print(table(HEADER, [line(tuned, store, bars.get(tuned.r, math.nan)) for tuned in found]))
    if shared := transfer(store, found):
        print(table(["method", "best lr of each rank", "one lr", "mean excess loss"], shared))
    records = [
        {**tuned.row._asdict(), "window": tuned.window, "head": tuned.head} for tuned in found
    ]
    print(json.dumps({"benchmark": name, "rows": records, **environment()}))


if __name__ == "__main__":
    main()
