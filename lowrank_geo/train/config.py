"""Everything a pre-training run is told, with its defaults: those of the demo."""

import dataclasses
import math
import types
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

from lowrank_geo.optim.named import OPTIMIZERS

CHOICES = {
    "tokenizer": ("bytes", "bpe"),
    "optimizer": tuple(sorted(OPTIMIZERS)),
    "schedule": ("wsd", "cosine", "constant"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
}
AT_LEAST_ONE = ("steps", "batch", "context", "accumulate", "vocab_size")
NOT_NEGATIVE = ("warmup", "seed", "eval_every", "checkpoint_every", "diagnose_every", "probes")
POSITIVE = ("lr", "euclidean_lr", "clip")
PER_MACHINE = ("device", "compile", "tensorboard")  # what a resumed run may choose anew


def option(default: Any, help: str) -> Any:
    """A field that is also an option of the command line."""
    return field(default=default, metadata={"help": help})


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
    steps: int = option(900, "Steps of the optimizer.")
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
        for name, kind in get_type_hints(type(self)).items():
            _check_type(name, kind, getattr(self, name))
        for name, choices in CHOICES.items():
            _check(
                self, name, lambda x, allowed=choices: x in allowed, "one of " + ", ".join(choices)
            )
        for name in AT_LEAST_ONE:
            _check(self, name, lambda x: x >= 1, "at least 1")
        for name in NOT_NEGATIVE:
            _check(self, name, lambda x: 0 <= x < 2**63, "at least 0 and below 2^63")
        for name in POSITIVE:
            _check(self, name, lambda x: math.isfinite(x) and x > 0, "a positive number")
        _check(self, "weight_decay", lambda x: math.isfinite(x) and x >= 0, "a number from 0 on")
        _check(self, "warmup", lambda x: x <= self.steps, f"at most --steps {self.steps}")
        self._check_together()

    def _check_together(self) -> None:
        sizes = [name for name in ("budget", "rank", "ratio") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise ValueError(
                f"pretrain needs one of --budget, --rank and --ratio, got {' and '.join('--' + s for s in sizes)}; "
                "leave out all but one"
            )
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
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(value, dict) or set(value) != names:
            got = sorted(set(value) ^ names) if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"a run's config needs exactly the options of this version, got a difference in {got}; "
                "use the version of lowrank_geo that wrote the run"
            )
        try:
            return cls(**value)
        except TypeError as error:
            raise ValueError(str(error)) from error


def _check_type(name: str, kind: Any, value: Any) -> None:
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    allowed = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"pretrain needs {_flag(name)} to be {wanted}, got {value!r}; correct it")


def _check(config: TrainConfig, name: str, holds: Any, rule: str) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        raise ValueError(f"pretrain needs {_flag(name)} to be {rule}, got {value}; correct it")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
