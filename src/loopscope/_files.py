"""Files that are whole or absent."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loopscope.errors import StorageError

__all__ = ["atomic_file", "storage_error", "write_atomically"]


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends without an error, so that a reader or a crash never
    meets half a file.

    Missing parent folders are made. Raises `StorageError`; what was at `path` before is then still there.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a result is as readable as any other new file.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The sentence for a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"There is no room left to write {path}; free some space and run the same command again, what "
            f"was finished is kept."
        )
    return StorageError(f"{path} cannot be written ({error.strerror or error}); choose a folder that can.")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
