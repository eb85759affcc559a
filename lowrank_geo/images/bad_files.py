"""What happens to a file that cannot be used: it is named in one sentence, and passed over if that was asked for."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What Pillow, pydicom and nibabel raise for bytes that are not what a header promises.
DECODING_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class BadFile(ValueError):
    """A file that cannot be used; the message is one sentence that names it."""


class Tolerance:
    """Bad files among many: they end the reading, or are noted in `skipped` with what is wrong with them."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.skipped: list[str] = []

    @contextmanager
    def file(self) -> Iterator[None]:
        """Within, one file or pair of files is read.

        Raises: BadFile unless bad files are to be skipped.
        """
        try:
            yield
        except BadFile as bad:
            if not self.skip:
                raise BadFile(f"{bad}; repair or remove it, or pass over it by --skip-bad") from bad
            self.skipped.append(str(bad))


@contextmanager
def decoding(path: Path, kind: str, *own: type[Exception]) -> Iterator[None]:
    """Within, a library decodes a file; whatever it says of it, in errors of its `own` too, becomes a `BadFile`."""
    try:
        yield
    except BadFile:
        raise
    except DECODING_ERRORS + own as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadFile(f"a {kind} file needs to be whole and valid, got {path} ({said})") from error


def regular(path: Path) -> int:
    """The size of a file in bytes.

    Raises: BadFile for what is no regular file: opening a pipe could block for ever.
    """
    try:
        if path.is_file():
            return path.stat().st_size
        found = "nothing" if not path.exists() else "no regular file"
    except OSError as error:
        found = str(error.strerror)
    raise BadFile(f"an image needs to be a readable file, got {found} at {path}")
