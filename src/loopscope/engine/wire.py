"""What goes between a job and its workers: work and results as pickles, and messages on a pipe.

Both ends are loopscope's own processes; nothing that comes from a checkpoint or a user's file is unpickled.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Callable
from typing import IO, Any

from loopscope.errors import WorkerError

__all__ = ["pack_work", "receive", "send", "unpack_work"]

_LENGTH = struct.Struct("<Q")
"""Of the message that follows."""


def pack_work(work: Callable[[Any], Any]) -> bytes:
    """With the places that this process imports from, so that a model of the user's own code is found by a worker.

    Raises `WorkerError` for what cannot be sent.
    """
    try:
        return pickle.dumps((sys.path, pickle.dumps(work)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise WorkerError(
            f"The model cannot be sent to a worker ({error}); name a checkpoint, or run with the engine serial."
        ) from None


def unpack_work(content: bytes) -> Any:
    """In the worker."""
    places, work = pickle.loads(content)  # noqa: S301 - written by the job's own process
    sys.path.extend(place for place in places if place not in sys.path)
    return pickle.loads(work)  # noqa: S301 - likewise


def send(pipe: IO[bytes], content: bytes) -> None:
    """Raises `OSError` if nobody reads."""
    pipe.write(_LENGTH.pack(len(content)))
    pipe.write(content)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes | None:
    """None at the end of the pipe, even in the middle of a message."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    content = pipe.read(length)
    return content if len(content) == length else None
