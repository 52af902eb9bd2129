"""The loop that hands items to workers, whatever they are."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from loopscope.errors import WorkerError

_ATTEMPTS = 3
"""A worker may die of something else than its item (a machine that goes, a kill, memory that another process took); an
item with which three have died is taken to be the reason."""

_PATIENCE = 10.0
"""Seconds for a thread whose worker was closed."""

Done = Callable[[int, Any], None]


class WorkerDiedError(Exception):
    """A worker ended without an answer; the message says how."""


@runtime_checkable
class Worker(Protocol):
    """Does one item after the other, somewhere."""

    def call(self, item: Any) -> Any:
        """What the work makes of an item. Raises what the work raises, and `WorkerDiedError`."""

    def close(self) -> None:
        """End it at once, whatever it is doing. Closing twice is fine."""


@runtime_checkable
class Engine(Protocol):
    """Starts workers."""

    workers: int
    """How many work side by side; 0 for this process."""

    def start(self, work: Callable[[Any], Any]) -> Worker:
        """A worker that has its own copy of the work. Raises `WorkerDiedError`, and `WorkerError` for work that cannot
        be sent."""

    def close(self) -> None:
        """No worker is needed any more."""


def run_items(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    done: Done,
    engine: Engine | None = None,
    lost: Callable[[str], None] = lambda message: None,
) -> None:
    """Do every item, and tell `done(index, result)` of each, here and one at a time, as it is finished.

    `lost` is notified, in a sentence, of workers that died. Raises what the work raises for an item, after which no
    other is begun, and `WorkerError` for an item with which three workers have died.
    """
    if engine is None or not engine.workers:
        for index, item in enumerate(items):
            done(index, work(item))
        return
    if not items:
        return
    todo: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
    found: queue.SimpleQueue[_Finding] = queue.SimpleQueue()
    for index in range(len(items)):
        todo.put((index, 1))
    hands = [_Hand(engine, work, items, todo, found) for _ in range(min(engine.workers, len(items)))]
    try:
        for hand in hands:
            hand.start()
        left = len(items)
        while left:
            kind, index, attempt, value = _next(found)
            if kind == "result":
                done(index, value)
                left -= 1
            elif kind == "died" and attempt < _ATTEMPTS:
                lost(f"A worker died ({value}); its item {index + 1} of {len(items)} is done again.")
                todo.put((index, attempt + 1))
            elif kind == "died":
                raise WorkerError(
                    f"Item {index + 1} of {len(items)} ended {_ATTEMPTS} workers, the last time so: {value}. Try fewer "
                    "--workers if memory ran out; what was finished is kept."
                )
            else:
                raise value
    finally:
        # All at once: each waits for its worker to give up what it holds.
        stops = [threading.Thread(target=hand.stop) for hand in hands]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()
        engine.close()
        for hand in hands:
            hand.join(timeout=_PATIENCE)


_Finding = tuple[str, int, int, Any]
"""(`result`, `died` or `error`; index; attempt; result, message or exception)."""


def _next(found: queue.SimpleQueue[_Finding]) -> _Finding:
    while True:
        try:
            # A wait without end would not be interrupted by Ctrl-C on every system.
            return found.get(timeout=1.0)
        except queue.Empty:
            continue


class _Hand(threading.Thread):
    """Keeps one worker busy."""

    def __init__(
        self,
        engine: Engine,
        work: Callable[[Any], Any],
        items: Sequence[Any],
        todo: queue.SimpleQueue[tuple[int, int] | None],
        found: queue.SimpleQueue[_Finding],
    ) -> None:
        super().__init__(daemon=True)
        self._engine, self._work, self._items = engine, work, items
        self._todo, self._found = todo, found
        self._worker: Worker | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        while (entry := self._todo.get()) is not None and not self._stopped.is_set():
            index, attempt = entry
            try:
                if self._worker is None:
                    self._worker = self._engine.start(self._work)
                    if self._stopped.is_set():
                        self._end()
                        return
                value = self._worker.call(self._items[index])
            except WorkerDiedError as error:
                self._end()
                self._found.put(("died", index, attempt, str(error)))
            except BaseException as error:
                self._found.put(("error", index, attempt, error))
                return
            else:
                self._found.put(("result", index, attempt, value))

    def stop(self) -> None:
        """From another thread: end what it is doing."""
        self._stopped.set()
        self._todo.put(None)
        self._end()

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
