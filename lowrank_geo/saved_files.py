"""The two files of a saved model, read with suspicion: nothing is allocated before JSON and header agree."""

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_geo.plan import Plan
from lowrank_geo.stored import FLOATING, Stored, factors

WEIGHTS, PLAN = "model.safetensors", "lowrank_plan.json"
FORMAT, VERSION = "lowrank_geo model", 1
DIGEST = "lowrank_plan_sha256"  # in the metadata of WEIGHTS
LARGEST_JSON = 64 * 2**20  # bytes; a model of ten thousand layers takes 3 MB


class Saved(NamedTuple):
    """A saved model whose files agree with each other."""

    plan: Plan
    architecture: dict[str, Any] | None
    buffers: dict[str, str]  # the dtypes of buffers that are computed, not stored
    header: dict[str, Stored]


def read_saved(folder: Path) -> Saved:
    """The plan and the header of a saved model.

    Raises: ValueError, in one sentence, if they are missing, foreign, corrupt or of different saves.
    """
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"load_pretrained needs {name} in {folder}, got a folder without it; "
                "give the folder that save_pretrained wrote"
            )
    content, text = _read_json(folder / PLAN)
    architecture, buffers = content.get("architecture"), content.get("buffers")
    if not isinstance(architecture, dict | None) or not isinstance(buffers, dict):
        _refuse(folder / PLAN, "architecture and buffers as objects", [architecture, buffers])
    if not set(map(repr, buffers.values())) <= set(map(repr, FLOATING)):
        _refuse(folder / PLAN, f"buffers of {', '.join(FLOATING)}", buffers)
    plan = Plan.from_json(content.get("plan"))
    header, metadata = _read_header(folder / WEIGHTS)
    check_header(header, factors(plan), folder, exact=False)
    if metadata.get(DIGEST) != hashlib.sha256(text).hexdigest():
        raise ValueError(
            f"load_pretrained needs {PLAN} and {WEIGHTS} of one save, got files that differ in {folder}; "
            "restore both from the same save"
        )
    return Saved(plan, architecture, buffers, header)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the weights file, on the CPU."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise _unreadable(folder / WEIGHTS, error) from None


def check_header(
    found: Mapping[str, Stored], wanted: Mapping[str, Stored], folder: Path, *, exact: bool
) -> None:
    """Raise ValueError, in one sentence, if a file does not hold what is wanted or, if `exact`, holds more."""
    for name, tensor in wanted.items():
        here = found.get(name)
        if here is None:
            _refuse(folder / WEIGHTS, f"a tensor {name!r}", "none")
        if here.shape != tensor.shape:
            _refuse(folder / WEIGHTS, f"{name!r} of shape {tensor.shape}", here.shape)
        if here.dtypes[0] not in tensor.dtypes:
            _refuse(folder / WEIGHTS, f"{name!r} in {' or '.join(tensor.dtypes)}", here.dtypes[0])
    surplus = [name for name in found if name not in wanted]
    if exact and surplus:
        _refuse(folder / WEIGHTS, "the tensors of the model only", surplus[0])


def _read_json(path: Path) -> tuple[dict[str, Any], bytes]:
    if os.path.getsize(path) > LARGEST_JSON:
        _refuse(path, f"at most {LARGEST_JSON} bytes", os.path.getsize(path))
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        _refuse(path, f"the format {FORMAT!r}", found)
    if content.get("version") != VERSION:
        raise ValueError(
            f"load_pretrained needs {path} of version {VERSION}, got {reprlib.repr(content.get('version'))}; "
            "install the lowrank_geo that wrote it"
        )
    return content, text


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
            header = {
                name: Stored(tuple(x.get_shape()), (x.get_dtype(),)) for name, x in slices.items()
            }
            return header, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"load_pretrained needs a readable {path}, got a file that is corrupt or not ours ({error}); "
        "restore it from another copy"
    )


def _refuse(path: Path, wanted: str, found: object) -> NoReturn:
    raise ValueError(
        f"load_pretrained needs {wanted} in {path}, got {reprlib.repr(found)}; the file is corrupt or belongs to "
        "another model, give the folder that save_pretrained wrote for this one"
    )
