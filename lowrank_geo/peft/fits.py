"""Whether a saved adapter fits a model, by names and shapes alone."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lowrank_geo.peft.deltas import sizes_of
from lowrank_geo.peft.stored import DELTA, PEFT, START, plain_name

Shapes = dict[str, tuple[int, ...]]
ADVICE = "Please load the adapter on the model that it was trained on."


class Size(NamedTuple):
    """Changes of m × n: blocks of rows, or a stack of matrices."""

    blocks: int
    m: int
    n: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}" if self.blocks == 1 else f"{self.blocks} of {self.m}x{self.n}"


def check_base(model: nn.Module, shapes: Shapes) -> None:
    """Raise ValueError unless the layers of a model have room for stored factors, and its other weights their shapes.

    Args: shapes: by the names in an adapter's file.
    """
    stored = stored_sizes(shapes)
    missing = missing_layers(model, stored)
    # None found at all: names of another version of transformers, which PEFT translates, or another kind of model.
    if len(missing) < len(stored):
        refuse_missing(missing)
    for layer, size in stored.items():
        if layer not in missing:
            check_layer(layer, model.get_submodule(plain_name(layer)), size)
    for key, shape in shapes.items():
        if DELTA not in key and START not in key:
            check_parameter(model, key, shape)


def stored_sizes(shapes: Shapes) -> dict[str, Size]:
    """What the factors of each layer change."""
    rows: dict[str, dict[str, list[int]]] = {}
    for key, shape in shapes.items():
        layer, _, factor = key.removeprefix(PEFT).partition(DELTA)
        if factor.rpartition(".")[2] in ("U", "V"):
            rows.setdefault(layer, {"U": [], "V": []})[factor[-1]].append(shape[0])
    return {
        layer: Size(len(found["U"]), max(found["U"], default=0), max(found["V"], default=0))
        for layer, found in rows.items()
    }


def missing_layers(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The layers that a model does not have."""
    known = {plain_name(name) for name, _ in model.named_modules()}
    return [layer for layer in layers if plain_name(layer) not in known]


def refuse_missing(layers: list[str]) -> None:
    """Raise ValueError if there are any."""
    if layers:
        raise ValueError(f"Target modules {set(layers)} not found in the base model. {ADVICE}")


def check_layer(name: str, module: Any, stored: Size) -> None:
    """Raise ValueError unless a layer has a weight of this size."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    sizes = sizes_in(base, stored.blocks)
    if stored not in sizes:
        found = " or ".join(map(str, sizes)) or "none"
        raise ValueError(
            f"The adapter weights of '{name}' are for a weight of {stored}, which does not fit the base model: it has "
            f"{found} there. {ADVICE}"
        )


def sizes_in(base: nn.Module, count: int) -> list[Size]:
    """The sizes of a layer's weight as `count` blocks of rows; of a module without one, those of its parameters."""
    try:
        m, n = sizes_of(base)
    except TypeError:
        turned = getattr(base, "is_transposed", False)
        return [size_of(p, turned) for p in base.parameters(recurse=False) if p.dim() in (2, 3)]
    return [Size(count, m // count, n) if m % count == 0 else Size(1, m, n)]


def size_of(parameter: Tensor, turned: bool) -> Size:
    """The size of a matrix, or of a stack of them that may be stored transposed.

    Shapes: (m, n), (E, m, n), or (E, n, m) if `turned`.
    """
    if parameter.dim() == 2:
        return Size(1, *parameter.shape)
    count, m, n = parameter.shape
    return Size(count, n, m) if turned else Size(count, m, n)


def check_parameter(model: nn.Module, key: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError if a weight that is saved as a whole has another shape in the model."""
    name = key.removeprefix(PEFT)
    try:
        found = tuple(model.get_parameter(name).shape)
    except AttributeError:
        return  # PEFT reports it
    if found != shape:
        raise ValueError(
            f"The adapter weight '{key}' has shape {shape}, which does not fit the base model: '{name}' has {found} "
            f"there. {ADVICE}"
        )
