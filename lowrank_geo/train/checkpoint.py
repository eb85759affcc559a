"""Checkpoints: safetensors and JSON, whole or absent, checked before anything is allocated."""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_geo.train.durable import read_json, sync, write_json
from lowrank_geo.train.flatten import flatten, on_cpu, unflatten

FORMAT, VERSION = "lowrank_geo checkpoint", 1
FILES = ("model.safetensors", "optimizer.safetensors")
KEEP = 2
FULL = (errno.ENOSPC, errno.EDQUOT)


class Checkpoint(NamedTuple):
    """What one step leaves behind: parameters, and all else that the next step depends on."""

    step: int
    model: dict[str, Tensor]
    training: dict[str, Any]  # nested as it likes


class Found(NamedTuple):
    """A valid checkpoint on the disk, and what is wrong with the newer ones that were passed over."""

    path: Path
    state: dict[str, Any]
    problems: list[str]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `folder` and drop all but the last two.

    Raises: OSError, in one sentence, if the disk is full; the older checkpoints are then untouched.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{checkpoint.step:08d}"
    part = folder / f".{path.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        _write(part, checkpoint)
        if path.exists():  # a corrupt one, or that of the same step before an interruption
            _drop(path)
        part.rename(path)
        sync(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if error.errno not in FULL:
            raise
        raise OSError(
            f"the checkpoint of step {checkpoint.step} needs more space than the disk of {folder} has; "
            "free some and resume from the last checkpoint, which is kept"
        ) from error
    for old in steps(folder)[KEEP:]:
        _drop(old)
    return path


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    tensors: dict[str, Tensor] = {}
    skeleton = flatten(checkpoint.training, tensors)
    files = {}
    for name, content in zip(FILES, (checkpoint.model, tensors), strict=True):
        file = folder / name
        try:
            save_file({key: on_cpu(x) for key, x in content.items()}, file)
        except SafetensorError as error:
            raise _as_os_error(error) from error
        sync(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    state = {
        "format": FORMAT,
        "version": VERSION,
        "step": checkpoint.step,
        "files": files,
        "training": skeleton,
    }
    write_json(folder / "state.json", state | {"sha256": _digest_json(state)})


def _as_os_error(error: SafetensorError) -> OSError:
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]) if found else errno.EIO, str(error))


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _drop(path: Path) -> None:
    """Delete a checkpoint so that a crash in between leaves none that looks like one."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first, valid or not."""
    found = (p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def newest(folder: Path) -> Found | None:
    """The newest valid checkpoint of a run; None if it has none yet.

    Raises: ValueError if there are checkpoints but none is valid.
    """
    problems: list[str] = []
    for path in steps(folder):
        try:
            return Found(path, verify(path), problems)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"{problems[0]}, and {folder} holds no valid one; start a new run")
    return None


def verify(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose files are those that were written.

    Raises: ValueError, in one sentence, if anything is missing, foreign or changed.
    """
    state = read_json(path / "state.json")
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"checkpoint {path} needs format {FORMAT!r}, version {VERSION}, got "
            f"{state.get('format')!r}, version {state.get('version')!r}: it is foreign"
        )
    written = state.pop("sha256", None)
    if written != _digest_json(state) or state["step"] != int(path.name[5:]):
        raise ValueError(f"checkpoint {path} needs the state.json of its step, got a changed one")
    for name, wanted in state["files"].items():
        size = (path / name).stat().st_size
        if size != wanted["bytes"]:
            raise ValueError(
                f"checkpoint file {path / name} needs {wanted['bytes']} bytes, got {size}"
            )
        if _digest(path / name) != wanted["sha256"]:
            raise ValueError(
                f"checkpoint file {path / name} needs to be unchanged, got other bytes"
            )
    return state


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in the header of a checkpoint's model; reads no tensor."""
    with safe_open(path / FILES[0], framework="np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def check_fit(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of a checkpoint's model with those `expected`; reads no tensor.

    Raises: ValueError, naming the first difference.
    """
    found = shapes(path)
    for name in sorted(expected.keys() | found.keys()):
        wanted = tuple(expected[name].shape) if name in expected else None
        if found.get(name) != wanted:
            raise ValueError(
                f"checkpoint {path} needs {name} of shape {wanted}, got {found.get(name)}; "
                "it belongs to another model or plan than its run.json"
            )


def load(found: Found) -> Checkpoint:
    """Read a checkpoint that was found valid and, by `check_fit`, that of the model."""
    # Sums can depend on the alignment of their operands: torch aligns its own memory, not that of a file.
    model, tensors = (
        {name: x.clone() for name, x in load_file(found.path / file).items()} for file in FILES
    )
    return Checkpoint(found.state["step"], model, unflatten(found.state["training"], tensors))
