"""Everything that `segment` and `classify` are told, with their defaults: published ones, or those of the demo."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lowrank_geo.images.phantoms import DIFFICULTIES
from lowrank_geo.images.windows import AUTOMATIC, WINDOWS
from lowrank_geo.optim.named import OPTIMIZERS
from lowrank_geo.train.options import check_options, check_size, option

CHOICES = {
    "mode": ("backprop", "reversible"),
    "optimizer": tuple(sorted(OPTIMIZERS)),
    "window": (*WINDOWS, AUTOMATIC),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "difficulty": tuple(DIFFICULTIES),
    "bottleneck": ("convolution", "transformer"),
}
SETS = {
    "at least 1": ("size", "width", "depth", "blocks", "epochs", "batch", "stop_after"),
    "at least 0 and below 2^63": ("seed", "patience"),
    "a positive number": ("lr", "euclidean_lr", "clip"),
    "at least 0 and below 1": ("gamma",),
    "a number from 0 on": ("weight_decay",),
}
LARGEST = {"size": 4096, "width": 4096, "depth": 10, "blocks": 1000, "classes": 255}
# Of the code of TransNetR and PVTFormer, but for the network, whose sizes are not published.
PUBLISHED = {
    "size": 256, "augment": True, "width": 32, "depth": 4, "blocks": 3, "epochs": 500, "batch": 8, "lr": 1e-4,
}  # fmt: skip

Config = TypeVar("Config", bound="ImageConfig")


@dataclass(frozen=True)
class ImageConfig:
    """What both commands are told; checked when made, saved with the run as JSON.

    Raises: ValueError, naming the option, for a value that no run can have; TypeError for one of another type.
    """

    command: ClassVar[str]
    demo: ClassVar[dict[str, Any]]

    data: str | None = option(None, "")
    size: int | None = option(None, "Side of the images in pixels; 256, but 8 for the digits.")
    window: str = option("abdomen", "Of CT: " + ", ".join(CHOICES["window"]) + ".")
    skip_bad: bool = option(False, "Pass over files that cannot be used, instead of stopping.")
    augment: bool | None = option(None, "Turn, mirror, black out; yes but for the digits.")
    width: int | None = option(None, "Channels at the full size; 32, in the demo fewer.")
    depth: int | None = option(None, "How often the size is halved; 4, for digits 2.")
    blocks: int | None = option(None, "Momentum steps of a stage; 3, in the demo fewer.")
    gamma: float = option(0.9, "Momentum of the residual blocks, in [0, 1); 0: plain ones.")
    mode: str = option("backprop", "backprop, or reversible: constant memory, more time.")
    budget: float | None = option(None, "Fraction of the parameters to keep; all if not given.")
    rank: int | None = option(None, "One rank for all layers, instead of a budget.")
    ratio: float | None = option(None, "Rank over min(m, n) of each layer, instead of a budget.")
    init: str = option("spectral", "How factors are drawn: spectral, orthogonal or svd.")
    optimizer: str | None = option(
        None,
        f"One of {', '.join(CHOICES['optimizer'])}; adamw, or adam on the manifold with a budget.",
    )
    lr: float | None = option(None, "Learning rate; of adamw 1e-4 (demo 2e-3), else the method's.")
    euclidean_lr: float | None = option(None, "Learning rate of all that is no weight matrix.")
    weight_decay: float = option(0.0, "Decoupled weight decay.")
    clip: float | None = option(None, "Largest norm of the gradient; no limit if not given.")
    epochs: int | None = option(None, "Most passes over the images; 500, in the demo fewer.")
    batch: int | None = option(None, "Images of a step, at most; 8, of digits 32.")
    patience: int = option(5, "Epochs without a lower loss before a tenth of the learning rate.")
    stop_after: int = option(50, "Epochs without a better score before the end.")
    seed: int = option(0, "Of the weights, the order and the augmentation.")
    device: str = option("auto", "auto, cpu or cuda.")
    dtype: str = option("auto", "Of the computation: auto, float32 or bfloat16.")
    tensorboard: bool = option(False, "Also write TensorBoard events into the run.")

    def __post_init__(self) -> None:
        names = {field.name for field in dataclasses.fields(self)}
        check_options(self.command, self, {k: v for k, v in CHOICES.items() if k in names}, SETS)
        check_size(self.command, self)
        for name, most in LARGEST.items():
            value = getattr(self, name, None)
            self._check(value is None or value <= most, f"--{name}", f"at most {most}", value)
        if self.gamma == 0 and self.mode == "reversible":
            raise ValueError(
                f"{self.command} needs --gamma above 0 with --mode reversible, got 0, whose steps cannot be undone; "
                "use --mode backprop"
            )
        if self.size is not None and self.depth is not None:
            least = 2**self.depth
            self._check(self.size >= least, "--size", f"at least 2^depth = {least}", self.size)

    def _check(self, holds: bool, flag: str, rule: str, value: Any) -> None:
        if not holds:
            raise ValueError(f"{self.command} needs {flag} to be {rule}, got {value}; correct it")

    @property
    def sizes(self) -> dict[str, Any]:
        """The one of budget, rank and ratio that was chosen, if any, as `plan_ranks` takes it."""
        chosen = {name: getattr(self, name) for name in ("budget", "rank", "ratio")}
        return {k: v for k, v in chosen.items() if v is not None}

    @property
    def is_demo(self) -> bool:
        """Whether the data is what comes with the library."""
        return self.data is None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SegmentConfig(ImageConfig):
    """The options of `lowrank-geo segment`.

    >>> SegmentConfig(gamma=0.5).gamma
    0.5
    """

    command: ClassVar[str] = "segment"
    demo: ClassVar[dict[str, Any]] = {"size": 256, "width": 8, "blocks": 1, "epochs": 8, "lr": 2e-3}

    data: str | None = option(None, "Folder of images/ and masks/; phantoms if not given.")
    classes: int = option(2, "Classes of the masks, background included.")
    empty: bool = option(False, "Also use slices of volumes without any organ.")
    bottleneck: str = option("convolution", "convolution, or transformer as in TransNetR.")
    difficulty: str = option("medium", "Of the phantoms: easy, medium or hard.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.classes >= 2, "--classes", "at least 2", self.classes)


@dataclass(frozen=True)
class ClassifyConfig(ImageConfig):
    """The options of `lowrank-geo classify`.

    >>> ClassifyConfig(data="digits").is_demo
    True
    """

    command: ClassVar[str] = "classify"
    demo: ClassVar[dict[str, Any]] = {
        "size": 8, "augment": False, "width": 16, "depth": 2, "blocks": 2, "epochs": 12, "batch": 32, "lr": 2e-3,
    }  # fmt: skip

    data: str | None = option(None, "Folder of class folders; scikit-learn's digits if not given.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_demo and self.size not in (None, 8):
            raise ValueError(
                f"classify needs no --size for the digits, which are 8 x 8, got {self.size}; leave it out"
            )

    @property
    def is_demo(self) -> bool:
        return self.data in (None, "digits")


def filled(config: Config) -> Config:
    """The config with a value wherever it depends on the data.

    >>> filled(SegmentConfig()).epochs, filled(SegmentConfig(data="folder")).epochs
    (8, 500)
    """
    if config.optimizer is None:
        config = dataclasses.replace(config, optimizer="adam" if config.sizes else "adamw")
    usual = PUBLISHED | (config.demo if config.is_demo else {})
    if config.optimizer != "adamw":
        del usual["lr"]
    missing = {k: v for k, v in usual.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **missing)
    if config.optimizer == "adamw" and config.euclidean_lr is None:
        config = dataclasses.replace(config, euclidean_lr=config.lr)
    if config.data is not None and not config.is_demo:
        config = dataclasses.replace(config, data=os.path.abspath(config.data))
    return config
