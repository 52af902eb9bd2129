"""A worker process: work comes on standard input, then items; results go to standard output."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import IO, Any

from loopscope.errors import LoopscopeError, WorkerError, last_resort

_LENGTH = struct.Struct("<Q")
"""Of the message that follows."""
_LOOK = 1.0
"""Seconds between looks at whether the parent is there."""


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


class _Stopped(BaseException):
    """The process that started this one wants it to end."""


def main() -> None:
    """Until standard input ends, or SIGTERM comes: then what the work holds, such as the lock of a folder, is given up
    first."""
    _end_with(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, _stop)
    try:
        _work()
    except _Stopped:
        os._exit(128 + signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: tidying up is not interrupted
    raise _Stopped


def _work() -> None:
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever a model's code prints must not get between the results.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    content = receive(sys.stdin.buffer)
    if content is None:
        return
    work: Any = None
    while (item := receive(sys.stdin.buffer)) is not None:
        try:
            if work is None:
                gc.disable()  # what is imported for it stays, and is not looked through for garbage
                work = unpack_work(content)
                gc.freeze()
                gc.enable()
            found = answer(work, pickle.loads(item))  # noqa: S301 - from the process that started this one
        except Exception as error:
            found = ("error", WorkerError(f"A worker could not read its work: {type(error).__name__}: {error}"))
        send(results, pickle.dumps(found))


def _end_with(parent: int) -> None:
    """End this process soon after the one that started it, however that ended: a worker in the middle of its item would
    go on for a long time without anybody to take its result."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK)
        os._exit(1)

    if os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


def answer(work: Any, item: Any) -> tuple[str, Any]:
    """(`result`, what the work makes of the item) or (`error`, what it raised)."""
    try:
        return "result", work(item)
    except LoopscopeError as error:
        return "error", error
    except _Stopped:
        raise
    except BaseException as error:
        try:
            with last_resort("at work in a worker"):
                raise
        except LoopscopeError as told:
            # A cause is not sent along.
            told.add_note(f"In the worker:\n{''.join(traceback.format_exception(error))}")
            return "error", told


if __name__ == "__main__":
    main()
