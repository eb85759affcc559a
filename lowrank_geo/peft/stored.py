"""What an adapter's folder must be before a model is touched: readable, and of the ranks that it claims."""

from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from lowrank_geo.peft.deltas import sizes_of

WEIGHTS = "adapter_model.safetensors"
DELTA = ".fixed_rank_delta."
PEFT = "base_model.model."
HEADING = "## How to load this adapter"
NOTE = """

## How to load this adapter

It is a fixed-rank adapter of the package `lowrank-geo`; PEFT knows the method after this import, and answers
`KeyError: 'LOWRANK_GEO'` without it:

```python
import {module}
```

`{module}.export_lora` turns it into a plain LoRA adapter that needs no import.
"""


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file, read from its header alone.

    Raises: ValueError for a damaged file.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"The adapter weights in '{file}' are damaged ({error}). Please save or download the adapter again."
        ) from error


def check_stored(folder: Path, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes in a local folder, none without a weight file: names on a hub are left to PEFT.

    Raises: ValueError if the file is damaged or its ranks are not those of the configuration.
    """
    file = folder / WEIGHTS
    shapes = shapes_in(file) if file.is_file() else {}
    for key, shape in shapes.items():
        if DELTA not in key:
            continue
        layer, _, factor = key.partition(DELTA)
        layer = layer.removeprefix(PEFT)
        pattern = get_pattern_key(list(config.rank_pattern), layer)
        rank = config.rank_pattern.get(pattern, config.r)
        if len(shape) != 2 or shape[1] != rank or (factor.endswith("S") and shape[0] != rank):
            raise ValueError(
                f"The adapter weight '{key}' in '{file}' has shape {shape}, but the configuration says `r` = {rank}. "
                "Please check `r` and `rank_pattern` in adapter_config.json."
            )
    return shapes


def check_base(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the layers of a model have room for the stored factors."""
    for key, shape in shapes.items():
        name, _, factor = key.removeprefix(PEFT).partition(DELTA)
        if not factor or factor not in ("U", "V"):
            continue
        try:
            base = model.get_submodule(name)
        except AttributeError:
            continue  # PEFT reports it
        base = base.get_base_layer() if isinstance(base, BaseTunerLayer) else base
        rows = sizes_of(base)["UV".index(factor)]
        if shape[0] != rows:
            raise ValueError(
                f"The adapter weight '{key}' has shape {shape}, which does not fit the base model: '{name}' needs "
                f"{rows} rows there. Please load the adapter on the model that it was trained on."
            )


def note_in_card(folder: Path, module: str) -> None:
    """Say in the model card which import loading needs."""
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else ""
    if HEADING not in text:
        card.write_text(text + NOTE.format(module=module), "utf-8")
