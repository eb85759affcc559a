"""Everything a pre-training run is told, with its defaults: those of the demo."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from lowrank_geo.optim.named import OPTIMIZERS
from lowrank_geo.train.options import check_options, check_size, from_json, option

CHOICES = {
    "tokenizer": ("bytes", "bpe"),
    "optimizer": tuple(sorted(OPTIMIZERS)),
    "schedule": ("wsd", "cosine", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
}
RULES = {
    "at least 1": ("steps", "batch", "context", "accumulate", "vocab_size"),
    "at least 0 and below 2^63": (
        "warmup",
        "seed",
        "eval_every",
        "checkpoint_every",
        "diagnose_every",
        "probes",
    ),
    "a positive number": ("lr", "euclidean_lr", "clip"),
    "a number from 0 on": ("weight_decay",),
}
PER_MACHINE = ("device", "compile", "tensorboard")  # what a resumed run may choose anew


@dataclass(frozen=True)
class TrainConfig:
    """The options of one run; checked when made, saved with the run as JSON.

    Units: `lr` is that of the chosen optimizer; `steps`, `warmup` and `..._every` count optimizer steps; `batch` counts
    the sequences of one step over all processes and micro-batches.
    Raises: ValueError, naming the option, for a value that no run can have; TypeError for one of another type.

    >>> TrainConfig(steps=10).steps
    10
    """

    data: str | None = option(None, "File, folder or hf:NAME; if not given, Python's own sources.")
    tokenizer: str = option("bytes", "bytes or bpe (trained on the data).")
    vocab_size: int | None = option(None, "Tokens of the bpe tokenizer; 4096 if not given.")
    model: str = option("2m", "Preset of the model.")
    budget: float | None = option(None, "Fraction of the model's parameters to keep; 0.5 if none.")
    rank: int | None = option(None, "One rank for all layers, instead of a budget.")
    ratio: float | None = option(None, "Rank over min(m, n) of each layer, instead of a budget.")
    init: str = option("spectral", "How factors are drawn: spectral, orthogonal or svd.")
    optimizer: str = option("muon", "One of " + ", ".join(CHOICES["optimizer"]) + ".")
    lr: float | None = option(None, "Learning rate of the factors; the method's own if not given.")
    euclidean_lr: float | None = option(None, "Learning rate of all other parameters.")
    weight_decay: float = option(0.1, "Decoupled weight decay.")
    schedule: str = option("wsd", "wsd (warmup, stable, decay), cosine or constant.")
    warmup: int | None = option(None, "Steps until the learning rate is reached; 5 % if not given.")
    steps: int = option(700, "Steps of the optimizer.")
    batch: int = option(16, "Sequences of a step, over all processes and micro-batches.")
    context: int | None = option(None, "Tokens of a sequence; those of the preset if not given.")
    accumulate: int = option(1, "Micro-batches that each process cuts its share of a step into.")
    clip: float | None = option(1.0, "Largest norm of the gradient.")
    seed: int = option(0, "Seed of the weights and of the order of the data.")
    eval_every: int = option(50, "Steps between evaluations; 0: only at the end.")
    checkpoint_every: int = option(100, "Steps between checkpoints; 0: only at the end.")
    diagnose_every: int = option(25, "Steps between measurements of spectra; 0: only at the end.")
    probes: int = option(0, "Numbers of gradient and weights each step, for analyze run.")
    device: str = option("auto", "auto, cpu or cuda.")
    dtype: str = option("auto", "Of the computation: auto, float32 or bfloat16.")
    compile: bool = option(False, "Compile model and optimizer with torch.compile.")
    tensorboard: bool = option(False, "Also write TensorBoard events into the run.")
    prompt: str = option("def ", "What the sample in the report continues.")

    def __post_init__(self) -> None:
        check_options("pretrain", self, CHOICES, RULES)
        if self.warmup is not None and self.warmup > self.steps:
            raise ValueError(
                f"pretrain needs --warmup to be at most --steps {self.steps}, got {self.warmup}; correct it"
            )
        check_size("pretrain", self)
        if self.batch % self.accumulate:
            raise ValueError(
                f"pretrain needs --accumulate to divide --batch {self.batch}, got {self.accumulate}; choose a divisor"
            )
        if self.vocab_size is not None and self.tokenizer == "bytes":
            raise ValueError(
                f"pretrain needs no --vocab-size with --tokenizer bytes, got {self.vocab_size}; "
                "leave it out, or use --tokenizer bpe"
            )

    @property
    def size(self) -> dict[str, Any]:
        """The one of budget, rank and ratio that was chosen, as `plan_ranks` takes it."""
        chosen = {name: getattr(self, name) for name in ("budget", "rank", "ratio")}
        return {k: v for k, v in chosen.items() if v is not None} or {"budget": 0.5}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "TrainConfig":
        """The config that `to_json` wrote.

        Raises: ValueError if options are missing or unknown, or hold what no run can have.
        """
        return from_json(cls, value)
