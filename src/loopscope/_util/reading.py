"""Files from outside: opened only if they are files, read only if they are small enough, parsed within limits.

All of it raises nothing but `OSError`, whose `strerror` goes on with "it", and `ValueError`, whatever is wrong.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from loopscope.errors import LoopscopeError, one_line

_DEEPEST = 64
"""Objects and lists within each other. Our own files have ten; what walks through them may recurse."""
_LARGEST = 2**28
"""Bytes of a file that is read whole: a tokenizer of a million words has a tenth of that."""
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""In JSON; two of them may make a character."""


def open_file(path: Path) -> BufferedReader:
    """A file to read bytes from; pipes, devices and folders are refused, rather than waited for."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody who writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, f"its name is none of a file: {error}") from None
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is a pipe or a device, and no file")
    return os.fdopen(handle, "rb")


def is_there(path: Path) -> bool:
    """Something has this name, which may be none that a file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, most: int = _LARGEST) -> bytes:
    """All of a file, if it has at most so many bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read")
        # Files of the system say that they have nothing. Room for what is asked for is made before anything is read.
        return file.read(size or 2**20)


def read_text(path: Path, most: int = _LARGEST) -> str:
    """All of a file that is UTF-8."""
    return read_bytes(path, most).decode()


def read_json(path: Path, most: int = _LARGEST) -> Any:
    """The JSON value in a file."""
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """A JSON value that is not nested too deeply and whose text can be written again."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > _DEEPEST:
        _check_depth(found)
    if _HALF_CHARACTER.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a character (a lone surrogate)") from None
    return found


_TOO_DEEP = f"more than {_DEEPEST} lists and objects lie within each other"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


@contextmanager
def foreign() -> Iterator[None]:
    """Another library reads something here, and raises what it likes: all of it becomes `ValueError`, with the original
    as its cause, but for `OSError` and what loopscope itself raises."""
    try:
        yield
    except (LoopscopeError, OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(one_line(error)) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise ValueError(one_line(error)) from error


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust failed an assertion, which Python has no public name for."""
    return type(error).__name__ == "PanicException"


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
