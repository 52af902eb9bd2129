"""How much of a job is done and how long the rest will take: one estimate of time for phases of different kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """One kind of work of a job, in steps that take about as long as each other."""

    name: str
    steps: int
    done: int = 0
    """Of these, by an earlier run of the same command."""
    seconds: float | None = None
    """That a step may take, until one was done; None for as long as a step of the phases of which some were."""


@dataclass(slots=True)
class _Spent:
    steps: int = 0
    seconds: float = 0.0


class Estimate:
    """Of a job whose phases take turns, batch by batch. The time up to a step is its phase's.

    `clock` gives seconds. What is left rests on the mean step of each phase in this run, so that from the first
    batch on every kind of work of a batch is counted at its own cost.
    """

    def __init__(self, phases: Sequence[Phase], clock: Callable[[], float], started: float | None = None) -> None:
        """`started`: on the clock, when what is not counted in steps, such as loading, began."""
        self.phases = tuple(phases)
        self._clock = clock
        self._last = clock()
        self._started = self._last if started is None else started
        self._spent = {phase.name: _Spent() for phase in phases}

    def step(self, phase: str, count: int = 1) -> None:
        now = self._clock()
        spent = self._spent[phase]
        spent.steps += count
        spent.seconds += now - self._last
        self._last = now

    def done(self, phase: Phase) -> int:
        """Steps of a phase that are done, of more than one run."""
        return phase.done + self._spent[phase.name].steps

    @property
    def elapsed(self) -> float:
        return self._clock() - self._started

    @property
    def left(self) -> float | None:
        """Seconds; None where nothing is known of them yet."""
        whole = self._at_mean(lambda phase: phase.steps - self.done(phase))
        return None if whole is None else max(0.0, whole - (self._clock() - self._last))

    @property
    def share(self) -> float:
        """Of the time of the whole job, that of earlier runs included: 1 when every step is done, not before."""
        left, before = self.left, self._at_mean(lambda phase: phase.done)
        if left is None or before is None:
            return 0.0
        if all(self.done(phase) >= phase.steps for phase in self.phases):
            return 1.0
        spent = before + self.elapsed
        return min(0.99, spent / (spent + left)) if spent + left > 0 else 0.0

    def _at_mean(self, steps_of: Callable[[Phase], int]) -> float | None:
        """Seconds for some steps of each phase."""
        measured = [each for phase in self.phases if phase.seconds is None and (each := self._spent[phase.name]).steps]
        total = sum(each.steps for each in measured)
        common = sum(each.seconds for each in measured) / total if total else None
        seconds = 0.0
        for phase in self.phases:
            spent, steps = self._spent[phase.name], max(0, steps_of(phase))
            mean = spent.seconds / spent.steps if spent.steps else common if phase.seconds is None else phase.seconds
            if steps and mean is None:
                return None
            seconds += steps * (mean or 0.0)
        return seconds
