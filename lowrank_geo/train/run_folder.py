"""The folder of one run: who may create, open and delete it, and who holds it."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowrank_geo.train.durable import read_json, sync, write_json

FORMAT, VERSION = "lowrank_geo run", 1
PRETRAIN = "pretrain"
PARTS = ("config", "plan", "model", "data")  # objects without which a run cannot go on


def read_record(path: Path) -> dict[str, Any]:
    """The content of a run's run.json.

    Raises: FileNotFoundError if there is none; ValueError if it is not ours.
    """
    marker = path / "run.json"
    if not marker.is_file():
        raise FileNotFoundError(
            f"a run needs a folder with a run.json, got {path}; name one that pretrain, segment or classify made"
        )
    try:
        record = read_json(marker)
    except ValueError as error:
        raise ValueError(f"{error}; restore it, or start a new run") from error
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(
            f"{marker} needs to be of format {FORMAT!r}, version {VERSION}, got {record.get('format')!r}, "
            f"version {record.get('version')!r}; name a run of this version of lowrank_geo"
        )
    return record


def read_complete_record(path: Path, kind: str = PRETRAIN) -> dict[str, Any]:
    """The content of a run.json from which a run of the command `kind` can go on.

    Raises: what `read_record` raises; ValueError if a part is missing or another command made the run.
    """
    record = read_record(path)
    found = kind_of(record)
    if found != kind:
        raise ValueError(
            f"lowrank-geo {kind} needs a run that it made, got {path}, which {found} made; use lowrank-geo {found}"
        )
    missing = [part for part in PARTS if not isinstance(record.get(part), dict)]
    if missing:
        raise ValueError(
            f"{path / 'run.json'} needs {', '.join(PARTS)}, got no {missing[0]}; it is damaged"
        )
    return record


def kind_of(record: dict[str, Any]) -> str:
    """The command that made a run."""
    return str(record.get("kind", PRETRAIN))


def check_out(path: Path, *, overwrite: bool) -> None:
    """Raise unless a new run may take this place: it is free, or holds a run that may be deleted.

    Raises: FileExistsError, or what `read_record` raises.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(
            f"a run needs a new folder for --out, got {path}, which exists; "
            f"go on with it by --resume {path}, or delete that run by --overwrite"
        )
    if path.is_symlink() or (path / "run.json").is_symlink():
        raise FileExistsError(
            f"--overwrite needs a folder of its own, got {path}, which is or holds a symlink; delete it by hand"
        )
    try:
        read_record(path)
    except (FileNotFoundError, ValueError) as error:
        raise FileExistsError(
            f"--overwrite needs a folder of a run, got {path}; delete it by hand ({error})"
        ) from error


class RunFolder:
    """A run's folder, held by this process through the lock on its file `lock` until `close`.

    `record` is what run.json holds; `update` changes both.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: int) -> None:
        self.path, self.record = path, record
        self._lock: int | None = lock

    @classmethod
    def create(
        cls,
        path: Path,
        record: dict[str, Any],
        *,
        fill: Callable[[Path], None],
        overwrite: bool = False,
    ) -> "RunFolder":
        """Make the folder at once with its run.json and what `fill` writes, or not at all.

        Raises: FileExistsError if the place is taken; BlockingIOError if a run to be deleted is in use.
        """
        check_out(path, overwrite=overwrite)
        new = path.with_name(f".{path.name}.new-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
        except OSError as error:
            raise OSError(
                f"a run needs a folder that can be made for --out, got {path} ({error.strerror}); choose another"
            ) from error
        folder = cls(new, {"format": FORMAT, "version": VERSION, **record}, _lock(new))
        try:
            fill(new)
            folder.update()
            if overwrite and path.exists():
                _delete(path)
            _move(new, path)
        except BaseException:
            folder.close()
            shutil.rmtree(new, ignore_errors=True)
            raise
        folder.path = path
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Take an existing run.

        Raises: BlockingIOError if another process holds it, and what `read_record` raises.
        """
        read_record(path)
        lock = _lock(path)
        return cls(path, read_record(path), lock)

    def update(self, **changes: Any) -> None:
        """Change entries of run.json, all at once for every reader."""
        self.record.update(changes)
        write_json(self.path / "run.json", self.record)

    def close(self) -> None:
        """Let others take the run; once is enough."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int:
    """A descriptor whose flock this process holds; the kernel frees it however the process ends."""
    path = folder / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        moved = not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat())
    except BlockingIOError:
        moved = True
    if moved:  # held by another, or deleted by --overwrite between our open and our lock
        os.close(descriptor)
        raise BlockingIOError(
            f"a run needs to be used by one process, got {folder}, which another one holds; "
            "wait for it, or choose another --out"
        )
    return descriptor


def _delete(path: Path) -> None:
    """Delete a run that nobody holds. Its name is freed first, at once, so that no half-deleted run is ever seen."""
    lock = _lock(path)
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    path.rename(old)
    os.close(lock)
    shutil.rmtree(old)


def _move(new: Path, path: Path) -> None:
    try:
        new.rename(path)
    except OSError as error:
        raise FileExistsError(
            f"a run needs a new folder for --out, got {path}, which another process just made; choose another"
        ) from error
    sync(path.parent)
