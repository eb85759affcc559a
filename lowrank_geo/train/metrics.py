"""What a run measures, one JSON object a line, and TensorBoard events of the same lines."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_geo.train.durable import sync

Line = dict[str, Any]
Listener = Callable[[Line], None]


class Metrics:
    """The open metrics.jsonl of a run; lines of steps after `last` are dropped, as they will be measured again."""

    def __init__(self, path: Path, *, last: int) -> None:
        if path.exists():
            part = path.with_name(f".{path.name}.part")
            part.write_text("".join(_lines_until(path, last)), encoding="utf-8")
            sync(part)
            part.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, line: Line) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk: a checkpoint must not be newer than its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, last: int) -> list[str]:
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a line cut by a crash
            continue
        if isinstance(line, dict) and line.get("step", last + 1) <= last:
            kept.append(text + "\n")
    return kept


class TensorBoard:
    """Writes the single numbers of every line as scalars.

    Raises: ModuleNotFoundError, with the command to install it, if tensorboard is not there.
    """

    def __init__(self, folder: Path, *, last: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "--tensorboard needs the package tensorboard, got none; pip install tensorboard"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=last + 1)

    def __call__(self, line: Line) -> None:
        for name, value in line.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])
        self._writer.flush()
