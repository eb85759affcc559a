"""What an adapter's folder must be before a model is touched: readable, and of the ranks that it claims."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # read by PEFT where there is no safetensors
DELTA, START = ".fixed_rank_delta.", ".fixed_rank_start."
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
    """The names and shapes in a file of weights, without reading the weights themselves.

    Raises: ValueError for a damaged file, and for a pickle of anything but tensors, which is never run.
    """
    try:
        if file.suffix == ".bin":
            pickled = torch.load(file, map_location="meta", weights_only=True)
            return {key: tuple(value.shape) for key, value in pickled.items()}
        with safe_open(file, framework="pt") as stored:
            return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}
    except (UnpicklingError, AttributeError) as error:
        raise ValueError(
            f"The adapter weights in '{file}' are damaged or hold more than tensors. Please save or download the "
            "adapter again, as safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"The adapter weights in '{file}' are damaged ({error}). Please save or download the adapter again."
        ) from error


def check_stored(folder: Path, config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes in a local folder, none without a weight file: names on a hub are left to PEFT.

    Raises: ValueError if the file is damaged or its ranks are not those of the configuration.
    """
    file = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    shapes = {} if file is None else shapes_in(file)
    for key, shape in shapes.items():
        container = DELTA if DELTA in key else START
        layer, found, factor = key.partition(container)
        if not found:
            continue
        ranks = ranks_of(plain_name(layer.removeprefix(PEFT)), config)
        rank = shape[-1] if shape else 0
        if len(shape) != 2 or rank not in ranks or (factor.endswith("S") and shape[0] != rank):
            said = " or ".join(map(str, sorted(ranks)))
            raise ValueError(
                f"The adapter weight '{key}' in '{file}' has shape {shape}, but the configuration says `r` = {said}. "
                "Please check `r` and `rank_pattern` in adapter_config.json."
            )
    return shapes


def plain_name(layer: str) -> str:
    """The name in the plain model of a layer that may be wrapped, for parameters more than once."""
    return ".".join(part for part in layer.split(".") if part != "base_layer")


def ranks_of(layer: str, config: Any) -> set[int]:
    """The rank that the configuration gives a layer, or those of its parameters, which one name stands for."""
    parameters = [name.rpartition(".") for name in config.target_parameters or ()]
    mine = [last for module, _, last in parameters if f".{layer}".endswith(f".{module}")]
    patterns = list(config.rank_pattern)
    keys = [f"{layer}.{name}" for name in mine] + ([] if mine else [layer])
    return {config.rank_pattern.get(get_pattern_key(patterns, key), config.r) for key in keys}


def note_in_card(folder: Path, module: str) -> None:
    """Say in the model card which import loading needs."""
    card = folder / "README.md"
    text = card.read_text("utf-8") if card.is_file() else ""
    if HEADING not in text:
        card.write_text(text + NOTE.format(module=module), "utf-8")
