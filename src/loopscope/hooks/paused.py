"""A function call that can be stopped in the middle, from anywhere down its stack, and gone on with."""

from __future__ import annotations

import contextvars
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

__all__ = ["Abandoned", "PausedCall", "Pauses", "Returned"]

Event = TypeVar("Event")
Result = TypeVar("Result")

# An abandoned call ends at its next pause. Waiting for that has a limit: a layer that hangs must not hang the caller.
_PATIENCE = 30.0


class Abandoned(BaseException):
    """Raised inside a call that nobody waits for any more. No `Exception`: a model's own handlers let it pass."""


@dataclass(frozen=True, slots=True)
class Returned(Generic[Result]):
    """The call is over."""

    value: Result


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


class Pauses(Generic[Event]):
    """The side of the call: what it holds to hand something over and wait until it is wanted again."""

    def __init__(self) -> None:
        # SimpleQueue, since a finalizer may put into it at any moment, also while this thread gets from it.
        self.orders: SimpleQueue[None] = SimpleQueue()
        self.told: SimpleQueue[Event | Returned[object] | _Raised] = SimpleQueue()
        self.abandoned = False

    def pause(self, event: Event) -> None:
        """Hand over an event; returns when the call is gone on with. Raises `Abandoned` if it never will be."""
        self.check()
        self.told.put(event)
        self.orders.get()
        self.check()

    def check(self) -> None:
        """Raises `Abandoned` if nobody waits for this call any more."""
        if self.abandoned:
            raise Abandoned


class PausedCall(Generic[Event, Result]):
    """`function(pauses)` in a thread of its own that runs only while `resume` waits for it: nothing is concurrent.

    A generator would do the same if every frame between were one; the frames here are a model's own `forward`.

    The call is abandoned by `close`, when this object is garbage, and at the interpreter's exit: `Abandoned` is raised
    where it stands, and what it has on its stack is unwound.
    """

    def __init__(self, function: Callable[[Pauses[Event]], Result]) -> None:
        self._pauses: Pauses[Event] = Pauses()
        context = contextvars.copy_context()
        # The thread knows nothing of this object, which could never become garbage otherwise. A daemon, since the
        # interpreter joins other threads before it calls finalizers.
        self._thread = threading.Thread(
            target=context.run, args=(_work, function, self._pauses), name="loopscope hooked forward", daemon=True
        )
        self._end = weakref.finalize(self, _abandon, self._pauses, self._thread)
        self._thread.start()

    def resume(self) -> Event | Returned[Result]:
        """Go on until the next event or the end. What the function raises is raised here.

        An exception that arrives while waiting, such as Ctrl-C, abandons the call. Raises `RuntimeError` for a call
        that was abandoned or has ended: nobody would ever answer.
        """
        if not self._end.alive:
            raise RuntimeError("The call is over; there is nothing to go on with.")
        try:
            self._pauses.orders.put(None)
            told = self._pauses.told.get()
        except BaseException:
            self.close()
            raise
        if isinstance(told, Returned | _Raised):
            self.close()
        if isinstance(told, _Raised):
            raise told.error
        return told  # type: ignore[return-value]  # Returned holds what `function` returned

    def close(self) -> None:
        """Abandon the call, if it is not over, and wait until it has unwound."""
        self._end()


def _work(function: Callable[[Pauses[Event]], Result], pauses: Pauses[Event]) -> None:
    outcome: Returned[object] | _Raised
    try:
        pauses.orders.get()
        pauses.check()
        outcome = Returned(function(pauses))
    except Abandoned:
        return
    except BaseException as error:
        outcome = _Raised(error)
    pauses.told.put(outcome)


def _abandon(pauses: Pauses[Event], thread: threading.Thread) -> None:
    pauses.abandoned = True
    pauses.orders.put(None)
    if thread is not threading.current_thread():
        thread.join(_PATIENCE)
