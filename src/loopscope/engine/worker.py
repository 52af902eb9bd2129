"""A worker process: work comes on standard input, then items; results go to standard output."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from typing import Any

from loopscope.engine.wire import receive, send, unpack_work
from loopscope.errors import LoopscopeError, WorkerError

__all__ = ["answer", "main"]


def main() -> None:
    """Until standard input ends."""
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
                work = unpack_work(content)
            found = answer(work, pickle.loads(item))  # noqa: S301 - from the process that started this one
        except Exception as error:
            found = ("error", WorkerError(f"A worker could not read its work: {type(error).__name__}: {error}"))
        send(results, pickle.dumps(found))


def answer(work: Any, item: Any) -> tuple[str, Any]:
    """(`result`, what the work makes of the item) or (`error`, what it raised)."""
    try:
        return "result", work(item)
    except LoopscopeError as error:
        return "error", error
    except Exception:
        return "error", WorkerError(f"A worker failed:\n{traceback.format_exc()}")


if __name__ == "__main__":
    main()
