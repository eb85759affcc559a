"""Momentum, rank and bottleneck of networks for images: phantoms of graded difficulty, and digits.

    python benchmarks/segmentation.py --quick              # phantoms of 64 x 64 and digits, 1.5 hours of one core
    python benchmarks/segmentation.py --full               # phantoms of 256 x 256 and digits: days on 2 cores
    python benchmarks/segmentation.py --full --images DIR  # a folder of images/ and masks/, e.g. Kvasir-SEG

Rows: γ of the residual blocks (0: the plain residual network) times share of the parameters (AdamW on all,
RiemannianAdam on low-rank ones), and γ with a residual transformer as bottleneck. Learning rates of the weight
matrices by `protocol.sweep`, judged by the validation loss of the best epoch; scores are those of the test images at
that rate, mean and standard deviation over seeds. Stop it at any time, finished runs are kept in results/ and
skipped. Memory is the peak of live bytes in a step's forward and backward pass, also with reversible blocks. Ends
with one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from protocol import Row, Run, Store, environment, geometric, sweep, table

from lowrank_geo.images.collect import Images
from lowrank_geo.images.config import ClassifyConfig, ImageConfig, SegmentConfig, filled
from lowrank_geo.images.run import new_trainer
from lowrank_geo.images.tasks import new_network, task_of
from lowrank_geo.images.trainer import ImageTrainer
from lowrank_geo.live_memory import peak_bytes
from lowrank_geo.train.distributed import Workers

GAMMAS = (0.0, 0.5, 0.9)
BUDGETS = (None, 0.5, 0.25)
FIRST, RATIO, RATES = 2e-3, 2.0, 4
OTHERS = 2e-3  # learning rate of norms, biases and heads, the same for all rows
CPU = Workers(torch.device("cpu"))
REPEATS = 3  # of the prediction that is timed, of which the fastest counts

Settings = dict[str, Any]
QUICK: Settings = {"size": 64, "width": 8, "depth": 3, "blocks": 2, "epochs": 8, "batch": 8}
FULL: Settings = {"size": 256, "width": 16, "depth": 4, "blocks": 3, "epochs": 40, "batch": 8}
DIGITS: Settings = {"width": 8, "depth": 2, "blocks": 2, "epochs": 4, "batch": 32}
TASKS = ("easy", "medium", "hard", "digits")


class Variant(NamedTuple):
    """What a row changes."""

    gamma: float
    budget: float | None
    transformer: bool = False

    @property
    def name(self) -> str:
        size = "dense" if self.budget is None else f"low-rank {self.budget:.0%}"
        return f"γ {self.gamma:g}, {size}" + ", transformer" * self.transformer


def variants(*, transformer: bool) -> Iterator[Variant]:
    for gamma in GAMMAS:
        for budget in BUDGETS:
            yield Variant(gamma, budget)
        if transformer:
            yield Variant(gamma, None, True)


def config_of(task: str, settings: Settings, images: Path | None, row: Variant) -> ImageConfig:
    """`task` is "digits", "folder" or a difficulty of the phantoms."""
    options = settings | {"gamma": row.gamma, "budget": row.budget, "euclidean_lr": OTHERS}
    if task == "digits":
        return ClassifyConfig(**options)
    bottleneck = "transformer" if row.transformer else "convolution"
    if task == "folder":
        return SegmentConfig(data=str(images), bottleneck=bottleneck, **options)
    return SegmentConfig(difficulty=task, bottleneck=bottleneck, **options)


@cache
def read(kind: type[ImageConfig], **options: Any) -> Images:
    config = filled(kind(**options))
    return task_of(config).read(config)


def images_of(config: ImageConfig) -> Images:
    """The data of a config, read once for all rows."""
    if isinstance(config, SegmentConfig):
        where = {"data": config.data, "size": config.size, "difficulty": config.difficulty}
        return read(SegmentConfig, **where)
    return read(ClassifyConfig)


def compute(config: ImageConfig, run: Run) -> dict[str, Any]:
    """One run: the validation loss of its best epoch, and the test scores, size, memory and time of that model."""
    config = filled(type(config)(**config.to_json() | {"lr": run.lr, "seed": run.seed}))
    trainer = new_trainer(config, images_of(config), CPU)
    losses = {}
    while not trainer.done:
        trainer.advance()
        if trainer.step % trainer.epochs.steps == 0:
            losses[trainer.epoch] = trainer.validate()["loss"]
    trainer.model.load_state_dict(trainer.best.model)
    test = trainer.images.split.test
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        judged = trainer.judge(test)
        times.append(time.perf_counter() - began)
    found = {
        "loss": losses[trainer.best.epoch],
        "scores": trainer.task.means(judged.counts),
        "epoch": trainer.best.epoch,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "ms": 1000 * min(times) / len(test),
    }
    return found | (memory(trainer) if run.seed == 0 else {})


def memory(trainer: ImageTrainer) -> dict[str, int | None]:
    """Peak live bytes of a forward and a backward pass on the first batch, backprop and reversible."""
    found: dict[str, int | None] = {}
    for mode in ("backprop", "reversible"):
        config = trainer.config
        if mode == "reversible" and config.gamma == 0:
            found["bytes_reversible"] = None  # its steps cannot be undone
            continue
        options = config.to_json() | {"mode": mode}
        images = trainer.images
        model = new_network(type(config)(**options), images.channels, len(images.classes))
        batch = trainer.epochs.at(0)

        def once(model: torch.nn.Module = model, batch: Any = batch) -> None:
            trainer.task.loss(model(batch.images), batch.targets).backward()

        found["bytes" if mode == "backprop" else "bytes_reversible"] = peak_bytes(once)
    return found


def cells(store: Store, row: Row) -> list[str]:
    """Validation loss, test scores, size, memory and time of a row."""
    records = [r for k, r in store.records.items() if (k.method, k.lr) == (row.method, row.lr)]
    first = row.record
    scores = [
        f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"
        for values in ([r["scores"][name] for r in records] for name in first["scores"])
    ]
    back = first["bytes_reversible"]
    return [
        f"{row.loss:.3f} ± {row.spread:.3f}",
        *scores,
        f"{first['parameters']:,}",
        f"{first['bytes'] / 2**20:.1f}",
        "" if back is None else f"{back / 2**20:.1f}",
        f"{first['ms']:.2f}",
        f"{row.lr:.3g}",
    ]


def table_of(
    store: Store, task: str, size: str, settings: Settings, images: Path | None, seeds: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one task."""
    rows, names = [], ["loss"]
    for variant in variants(transformer=task != "digits"):
        key = f"{size} | {images.name if images else task} | {variant.name}"
        config = config_of(task, settings, images, variant)
        run = partial(compute, config)
        row = sweep(store, key, geometric(FIRST, RATIO, RATES), run, seeds=seeds)
        names = list(row.record["scores"])
        rows.append([variant.name, *cells(store, row)])
    head = ["γ, weights", "validation loss", *names, "parameters", "MiB", "MiB, reversible"]
    return [*head, "ms/image", "best lr"], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--quick", action="store_true")
    how.add_argument("--full", action="store_true")
    parser.add_argument("--images", type=Path, help="folder of images/ and masks/")
    parser.add_argument("--only", nargs="*", choices=TASKS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = "quick" if arguments.quick else "full"
    settings = QUICK if arguments.quick else FULL
    store = Store(Path(__file__).parent / "results" / f"segmentation-{size}.jsonl")
    tasks = ["folder"] if arguments.images else arguments.only or TASKS
    found = {}
    for task in tasks:
        of = DIGITS if task == "digits" else settings
        head, rows = table_of(store, task, size, of, arguments.images, arguments.seeds)
        print(f"\n{task}\n{table(head, rows)}", flush=True)
        found[task] = {"header": head, "rows": rows}
    print(json.dumps({"benchmark": "segmentation", "size": size, "tasks": found, **environment()}))


if __name__ == "__main__":
    main()
