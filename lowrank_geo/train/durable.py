"""Files that are whole or absent after a crash, a full disk or a power cut."""

import json
import os
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 * 2**20  # bytes; what we write is far below, so more is not ours


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON; a reader sees the old text or the new one, never a part."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises: ValueError, in one sentence, if it is too large, not JSON or not an object.
    """
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} needs to be below {LARGEST_JSON} bytes, got {size}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} needs to be JSON, got {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} needs to hold a JSON object, got {type(value).__name__}")
    return value


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
