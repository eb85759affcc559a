"""Text files on disk: which are read, in which order, and how much of them."""

import codecs
import os
import platform
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_HEAD = 8192  # bytes that decide whether a large file is worth reading
_TEST_FOLDERS = {"test", "tests", "idle_test"}


class Source(NamedTuple):
    """The documents of one source in a fixed order, none of them empty, and a line about them."""

    documents: list[str]
    description: str


class _Text(NamedTuple):
    text: str
    size: int  # bytes read
    is_cut: bool  # the file goes on


def read_file(path: Path, max_bytes: int) -> Source:
    """One file as one document.

    Raises: ValueError if it cannot be read, is not UTF-8 text or is empty.
    """
    try:
        text, size, is_cut = _read_text(path, max_bytes)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"load_corpus needs a UTF-8 text file, got {str(path)!r} ({error}); "
            "convert or unpack it first"
        ) from error
    if not text:
        raise ValueError(
            f"load_corpus needs text, got the empty file {str(path)!r}; give another file"
        )
    return Source([text], _describe(f"file {str(path)!r}: {size:,} bytes", Counter(), is_cut))


def read_folder(root: Path, max_bytes: int) -> Source:
    """Every UTF-8 file below `root` that is not hidden, in the order of the relative paths.

    Raises: ValueError if there is none.
    """
    skipped: Counter[str] = Counter()
    paths = []
    # Links to folders are not followed: they can form loops and lead out of the folder.
    for folder, folders, files in os.walk(root, onerror=lambda _: skipped.update(["unreadable"])):
        here = Path(folder)
        folders[:] = [name for name in folders if not name.startswith(".")]
        skipped["linked folder"] += sum(os.path.islink(here / name) for name in folders)
        paths += [here / name for name in files if not name.startswith(".")]
    paths.sort(key=lambda path: path.relative_to(root).parts)
    return _read_files(f"folder {str(root)!r}", paths, max_bytes, skipped)


def read_standard_library(max_bytes: int) -> Source:
    """Python's own modules, without their tests and without anything that is not Python's own.

    Raises: ValueError if this Python ships without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, files in os.walk(root):
        if folder == str(root):
            # Leaves out installed packages, and build settings, which differ between machines.
            folders[:] = [name for name in folders if name in sys.stdlib_module_names]
            files = [name for name in files if Path(name).stem in sys.stdlib_module_names]
        folders[:] = [name for name in folders if name not in _TEST_FOLDERS]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    paths.sort(key=lambda path: path.relative_to(root).parts)
    name = f"Python {platform.python_version()} standard library"
    return _read_files(name, paths, max_bytes, Counter())


def _read_files(name: str, paths: Iterable[Path], max_bytes: int, skipped: Counter[str]) -> Source:
    documents: list[str] = []
    total = 0
    is_cut = False
    for path in paths:
        if is_cut := is_cut or total >= max_bytes:
            break
        try:
            text, size, is_cut = _read_text(path, max_bytes - total)
        except OSError:
            skipped["unreadable"] += 1
            continue
        except ValueError:
            skipped["not UTF-8 text"] += 1
            continue
        total += size
        if text:
            documents.append(text)
    if not documents:
        raise ValueError(
            f"load_corpus needs at least one UTF-8 text file, got "
            f"{_describe(f'{name} with none', skipped, is_cut)}; give a folder with text files"
        )
    return Source(
        documents, _describe(f"{name}: {len(documents)} files, {total:,} bytes", skipped, is_cut)
    )


def _read_text(path: Path, limit: int) -> _Text:
    """The first `limit` bytes of a file as text, without half a character at the end."""
    if not path.is_file():  # opening a pipe or a device could block for ever
        raise OSError("not a regular file")
    with path.open("rb") as file:
        if b"\0" in file.read(_HEAD):
            raise ValueError("binary data")
        file.seek(0)
        data = file.read(limit)
        is_cut = bool(file.read(1))
    if b"\0" in data:
        raise ValueError("binary data")
    text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=not is_cut)
    return _Text(text, len(data), is_cut)


def _describe(what: str, skipped: Counter[str], is_cut: bool) -> str:
    notes = [f"{count} skipped ({reason})" for reason, count in sorted(skipped.items()) if count]
    if is_cut:
        notes.append("stopped at max_bytes")
    return ", ".join([what, *notes])
