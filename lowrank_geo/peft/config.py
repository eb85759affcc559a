"""The configuration of a fixed-rank adapter."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig

from lowrank_geo.peft.blocks import Blocks
from lowrank_geo.peft.initial import INITS
from lowrank_geo.peft.register import method_type
from lowrank_geo.peft.stored import check_stored, note_in_card

BIASES = ("none", "all", "fixed_rank_only")


@dataclass
class FixedRankConfig(PeftConfig):
    """An adapter ΔW = scale · U S Vᵀ of rank r with orthonormal U and V, for `peft.get_peft_model`.

    `scale` does not depend on r: the same change of the weights has the same size at every rank.

    Raises: ValueError for a rank below 1, a dropout out of [0, 1), and unknown names.

    >>> FixedRankConfig(r=16, target_modules="all-linear").init
    'zero'
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the layers, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of layers to leave out, or a regular expression."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters, e.g. fused weights of experts."}
    )
    scale: float = field(default=1.0, metadata={"help": "Factor of U S Vᵀ, for all ranks."})
    dropout: float = field(default=0.0, metadata={"help": "Of the inputs of the adapter."})
    bias: str = field(
        default="none", metadata={"help": "Biases to train: none, all or fixed_rank_only."}
    )
    init: str = field(
        default="zero", metadata={"help": "Where to start: zero, gradient, pissa or random."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank for layers whose name ends like this."}
    )
    block_patterns: dict[str, str] = field(
        default_factory=dict,
        metadata={"help": "An einops pattern 'rows n -> blocks rows n' for layers with this name."},
    )
    block_sizes: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Sizes of the axes named in the patterns."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save as a whole, e.g. a new head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks of the model to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the list that these indices count."}
    )
    import_first: str = field(
        default="lowrank_geo.peft", metadata={"help": "The module that teaches PEFT this method."}
    )

    def __post_init__(self) -> None:
        # Of the file that this was read with; no field, so that it is not saved.
        self.stored_shapes: dict[str, tuple[int, ...]] = {}
        super().__post_init__()
        self.peft_type = method_type()
        self.target_modules = as_set(self.target_modules)
        self.exclude_modules = as_set(self.exclude_modules)
        for where, rank in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(
                    f"`r` should be a positive integer value but the value passed for '{where}' is {rank!r}."
                )
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"`dropout` should be in [0, 1) but the value passed is {self.dropout!r}."
            )
        if not is_number(self.scale) or not 0 < self.scale < float("inf"):
            raise ValueError(
                f"`scale` should be a positive number but the value passed is {self.scale!r}."
            )
        for name, value, known in (("init", self.init, INITS), ("bias", self.bias, BIASES)):
            if value not in known:
                raise ValueError(
                    f"Unknown `{name}` {value!r}. Please use one of {', '.join(map(repr, known))}."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )

    def blocks_for(self, pattern: str | None) -> Blocks | None:
        """The blocks of layers that `pattern`, a key of `block_patterns`, names."""
        if pattern is None or pattern not in self.block_patterns:
            return None
        text = self.block_patterns[pattern]
        used = {name: size for name, size in self.block_sizes.items() if name in text}
        return Blocks(text, used)

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT, with the sets as sorted lists, so that the same configuration is the same file."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the model card which import loading needs.

        A start from gradients is written as "zero": the file holds its frames, and gradients are not needed again.
        """
        saved = replace(self, init="zero") if self.init == "gradient" else self
        super(FixedRankConfig, saved).save_pretrained(save_directory, **kwargs)
        note_in_card(Path(save_directory), self.import_first)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "FixedRankConfig":
        """Read a configuration, and check a local weight file against it before anything is allocated.

        Raises: ValueError if the file is damaged or its shapes are not those of the configuration.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        config.stored_shapes = check_stored(folder, config)
        return config


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_set(names: Any) -> Any:
    return set(names) if isinstance(names, list) else names
