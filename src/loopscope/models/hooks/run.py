"""One forward pass of a hooked module as a run, which stands still between two recurrences."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope._util.shapes import Logits, States
from loopscope.errors import ConfigError, LoopscopeError
from loopscope.models.hooks.apart import SteppedForward
from loopscope.models.hooks.forward import Event, Injected, Ready
from loopscope.models.hooks.probe import Facts
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import LoopState, Observer, Visit

_Stop = TypeVar("_Stop", Ready, LoopState)


class HookedRun:
    """One forward pass of a hooked module, which stands still between two recurrences.

    What the module answers before the last recurrence is found by another forward pass with that many recurrences and
    the same seed.
    """

    def __init__(
        self,
        begin: Callable[[int], SteppedForward],
        info: SubjectInfo,
        facts: Facts,
        recurrences: int,
        observers: Iterable[Observer],
    ) -> None:
        """`begin` begins a forward pass of that many recurrences, of the same prompts with the same seed."""
        self._begin, self._info, self._facts = begin, info, facts
        self._recurrences = recurrences
        self._done = 0
        self._closed = False
        self._decoded: tuple[Logits, list[Visit]] | None = None
        self.state: States | None = None
        self._forward = begin(recurrences)
        ready = self._run_to(Ready, tuple(observers))
        if facts.carries or not info.is_looped:
            self.state = ready.state

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        self._check_open()
        if self._done == self._recurrences:
            raise ConfigError(
                f"This run was started for {self._recurrences} recurrences, which are done; start one for more."
            )
        self._decoded = None
        self.state = self._run_to(LoopState, tuple(observers)).state
        self._done += 1

    def nudge(self, factors: Float[Tensor, "batch token width"]) -> None:
        """What the model adds between two recurrences, such as the prompt, is nudged with the state."""
        self._forward.nudge(factors)

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        self._check_open()
        if state is not None:
            raise ConfigError(
                f"{self._info.name} is run through hooks, which cannot give its coda another state to decode; "
                "start a run of that many recurrences."
            )
        observers = tuple(observers)
        if self._decoded is None:
            self._decoded = self._decode()
        logits, coda = self._decoded
        for visit in coda:
            for observer in observers:
                observer.visit(visit)
        return logits

    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        return self.decode(observers)

    def close(self) -> None:
        self._closed = True
        self._decoded = None
        self._forward.close()

    def rounding_error(self) -> Float[Tensor, "layer batch token"] | None:
        """None: the module's arithmetic cannot be done in another dtype from outside."""
        return None

    def _run_to(self, kind: type[_Stop], observers: tuple[Observer, ...]) -> _Stop:
        """Go on to the next event of a kind. What fails, here or in an observer, ends the run."""
        self._forward.listening = bool(observers)
        try:
            while (event := self._next()) is not None:
                for observer in observers:
                    _tell(observer, event)
                if isinstance(event, kind):
                    return event
        except BaseException:
            self.close()
            raise
        raise AssertionError("the forward pass checks by itself that no recurrence is missing")

    def _next(self) -> Event | None:
        """The next event; where the model fails, when it did."""
        try:
            return self._forward.next()
        except (LoopscopeError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            info, at = self._info, self._done + 1
            if not info.is_looped:
                raise
            trained = info.trained_recurrences
            more = trained is not None and at > trained
            advice = (
                f"; its own number is {trained}, and it may have no weights for more: ask for fewer" if more else ""
            )
            if more:
                advice += ", where an analysis runs twice its horizon"
            raise ConfigError(
                f"{info.name} failed at recurrence {at} of {self._recurrences} ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}){advice}."
            ) from error

    def _decode(self) -> tuple[Logits, list[Visit]]:
        """The logits, and the coda's visits, which are kept for who asks again."""
        if self._done == self._recurrences:
            try:
                return _rest(self._forward)
            except BaseException:
                self.close()
                raise
        if self._done == 0:
            raise ConfigError(f"{self._info.name} answers after at least one recurrence; call advance before decode.")
        if self._facts.foresees:
            raise ConfigError(
                f"The loop of {self._info.name} depends on how often it will run, so that it has no answer "
                f"after {self._done} of {self._recurrences} recurrences; start a run of {self._done}."
            )
        forward = self._begin(self._done)
        forward.listening = False
        for event in forward:
            if isinstance(event, LoopState) and event.recurrence == self._done:
                break
        return _rest(forward)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("This run was closed; start another.")


def _rest(forward: SteppedForward) -> tuple[Logits, list[Visit]]:
    """Run to the end, after the last recurrence."""
    forward.listening = True
    coda = [event for event in forward if isinstance(event, Visit)]
    assert forward.logits is not None  # all its events came
    return forward.logits, coda


def _tell(observer: Observer, event: Event) -> None:
    match event:
        case Visit():
            observer.visit(event)
        case Injected(recurrence, state):
            observer.injected(recurrence, state)
        case LoopState():
            observer.loop_state(event)
        case Ready():
            pass
