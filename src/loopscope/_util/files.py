"""Files that are whole or absent, and folders that one process writes to."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout

from loopscope._util.reading import open_file
from loopscope.errors import FolderBusyError, StorageError, StudyError

_LOCK = ".lock"
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.part")


_RECORDS = {
    "manifest.json": "a study",
    "comparison.json": "a comparison",
    "curve.json": "an evaluation",
    "patching.json": "a patching",
}
"""By its file what a folder holds; each has its page under the same name."""


def check_no_other(folder: Path, own: str) -> None:
    """Raises `StudyError` for a folder with a result of another kind than that of the record `own`, whose page would be
    replaced."""
    for record, what in _RECORDS.items():
        if record != own and (folder / record).exists():
            raise StudyError(f"{folder} holds {what}; choose another folder for this.")


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path`; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_over_own(path: Path, content: bytes, begins: int) -> None:
    """Likewise, but never in place of a file of another kind: one that begins with other bytes than `content` does.

    For files that a user names, of which a mistyped one may be part of a study. Raises `StorageError`.
    """
    try:
        found = b""
        if path.is_file() and not path.is_symlink():  # of a link, what it leads to stays
            with open_file(path) as file:
                found = file.read(begins)
    except (OSError, ValueError) as error:
        raise storage_error(path, error) from error
    if found and found != content[:begins]:
        raise StorageError(f"{path} is a file of another kind, which is not replaced; choose another name.")
    write_atomically(path, content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends without an error, so that a reader or a crash never
    meets half a file.

    Missing parent folders are made. Raises `StorageError`; what was at `path` before is then still there.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; a result is as readable as any other new file.
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        temporary = None
    except (OSError, ValueError) as error:
        raise storage_error(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # on a disk that cannot be written to any more, which has been said
                Path(temporary).unlink()


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes out of it.

    Raises `FolderBusyError` if one is in, `StorageError` if the folder cannot be made.
    """
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderBusyError(
            f"Another loopscope process is writing to {folder}; wait for it or choose another --out."
        ) from None
    except (OSError, ValueError) as error:
        raise storage_error(folder, error) from None
    try:
        yield
    finally:
        # While it is held: whoever opened the file before sees that it is gone, and makes a new one.
        with suppress(OSError):
            (folder / _LOCK).unlink()
        lock.release()


FolderT = TypeVar("FolderT", bound="ClaimedFolder")


class ClaimedFolder(ABC):
    """A folder that holds one thing and that one process writes to: a context manager that holds its lock.

    The file `first` says what the folder holds, and is the first that is written. Entering a folder that holds anything
    before that file is there raises `StudyError`. A process that was killed meanwhile leaves half of it under a
    temporary name, which is no other file.
    """

    def __init__(self, folder: Path, first: str) -> None:
        self.folder = folder
        self.first = folder / first

    @abstractmethod
    def check(self) -> None:
        """The file is there. Raises `StudyError` if it is of something else."""

    @abstractmethod
    def begin(self) -> None:
        """Write it, and what has to be there from the start."""

    def __enter__(self: FolderT) -> FolderT:
        with ExitStack() as stack:
            stack.enter_context(held_folder(self.folder))
            there = self.first.exists()
            (self.check if there else self._check_empty)()
            clear_leftovers(self.folder)
            if not there:
                self.begin()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _check_empty(self) -> None:
        own = (_LOCK, f".{self.first.name}.")
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(own))
        if others:
            raise StudyError(
                f"{self.folder} already holds other files ({others[0]}); choose a new or empty folder for --out."
            )


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote to a folder or to one below it, of which
    nobody else may be writing to."""
    for path in folder.rglob(".*"):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def storage_error(path: Path, error: OSError | ValueError) -> StorageError:
    """The sentence for a file that could not be written; `ValueError` is what a name that none can have gives."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"There is no room left to write {path}; free some space and run the same command again, what "
            f"was finished is kept."
        )
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{path} is a folder, and a file is written; give the name of a file.")
    reason = getattr(error, "strerror", None) or error
    return StorageError(f"{path} cannot be written ({reason}); choose a folder that can.")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
