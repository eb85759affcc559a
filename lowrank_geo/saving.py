"""save_pretrained and load_pretrained: a low-rank model as safetensors and JSON, without pickle.

`model.safetensors` holds every tensor once; `lowrank_plan.json` holds the plan and how to build the dense model. The
header of the first has the digest of the second, so files of two different saves are never mixed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lowrank_geo.architecture import CONFIG, GENERATION, build_architecture, record_architecture
from lowrank_geo.geometry import Point
from lowrank_geo.layers import lowrank_layers
from lowrank_geo.lowrank_layer import check_orthonormal
from lowrank_geo.plan import current_plan
from lowrank_geo.saved_files import (
    DIGEST,
    FORMAT,
    PLAN,
    VERSION,
    WEIGHTS,
    check_header,
    read_saved,
    read_tensors,
)
from lowrank_geo.stored import DTYPES, expected, fill, key, make_room, tensors_of, writable


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write `model.safetensors`, `lowrank_plan.json` and, for a transformers model, its config.

    Every file is complete before it takes the place of an older one. The gradient mode, the optimizer and `training`
    are not saved.

    Raises: ValueError for a model with tensors on `meta`, or a folder that holds another library's model.
    """
    folder = Path(directory)
    _refuse_foreign(folder)
    tensors = writable(model)
    plan = current_plan(model).to_json()
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": record_architecture(model, workspace),
            "buffers": _buffer_dtypes(model),
            "plan": plan,
        }
        text = json.dumps(content, indent=1).encode()
        metadata = {"format": "pt", DIGEST: hashlib.sha256(text).hexdigest()}
        save_file(tensors, workspace / WEIGHTS, metadata)
        (workspace / PLAN).write_bytes(text)
        _publish(workspace, folder)
    finally:
        shutil.rmtree(workspace)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def load_pretrained(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save_pretrained` wrote, on the CPU and in evaluation mode, without running code from the folder.

    Models of transformers and our decoder are built from their config. For any other pass `model`, freshly built and
    dense (or low-rank with the same ranks): it is converted in place, on its device and in its mode, and returned.
    Everything is checked against the header of the file before anything is allocated or changed.

    Raises: ValueError, in one sentence, for files that are missing, foreign, corrupt or do not fit the model.
    """
    folder = Path(directory)
    saved = read_saved(folder)
    if model is None:
        if saved.architecture is None:
            raise ValueError(
                f"load_pretrained needs the dense model for {folder}, which records no class to build, got none; "
                "pass it freshly built as `model`"
            )
        model = build_architecture(saved.architecture, folder, len(saved.header))
        _cast_buffers(model, saved.buffers)
    check_header(saved.header, expected(model, saved.plan), folder, exact=True)
    _check_buffers(model)
    tensors = read_tensors(folder)
    for name, layer in lowrank_layers(model):
        if layer.gradient == "tangent":
            check_orthonormal(Point(*(tensors[key(name, x)] for x in "USV")), "load_pretrained")
    model, devices = make_room(model, saved.plan)
    fill(model, tensors, devices)
    model.lowrank_plan = saved.plan  # type: ignore[assignment]
    return model


def _publish(workspace: Path, folder: Path) -> None:
    """Move the finished files into place, each at once, and drop those of an older save that this one lacks."""
    names = [n for n in (CONFIG, GENERATION, WEIGHTS, PLAN) if (workspace / n).exists()]
    for name in names:
        with open(workspace / name, "rb+") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(workspace / name, folder / name)
    for name in {CONFIG, GENERATION} - set(names):
        (folder / name).unlink(missing_ok=True)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained needs a folder, got the file {folder}; choose another")
    taken = [name for name in (WEIGHTS, CONFIG) if (folder / name).exists()]
    if taken and not (folder / PLAN).exists():
        raise ValueError(
            f"save_pretrained needs a new folder or one that it wrote, got {folder} with another {taken[0]}; "
            "choose another folder"
        )


def _computed_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that the model computes when it is built and no file holds."""
    stored = {id(tensor) for tensor in tensors_of(model).values()}
    return {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in stored}


def _buffer_dtypes(model: nn.Module) -> dict[str, str]:
    buffers = _computed_buffers(model).items()
    return {n: DTYPES[b.dtype] for n, b in buffers if b.is_floating_point() and b.dtype in DTYPES}


def _cast_buffers(model: nn.Module, dtypes: dict[str, str]) -> None:
    """Give computed buffers the dtype they had: a bfloat16 model has bfloat16 rotary tables."""
    by_name: dict[str, Any] = {name: dtype for dtype, name in DTYPES.items()}
    for name, buffer in _computed_buffers(model).items():
        if buffer.is_floating_point() and name in dtypes:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer.to(by_name[dtypes[name]])


def _check_buffers(model: nn.Module) -> None:
    for name, buffer in _computed_buffers(model).items():
        if buffer.is_meta:
            raise ValueError(
                f"load_pretrained needs a model whose computed buffers have values, got {name!r} on meta; "
                "build the model on a real device"
            )
