"""What commands and training show of how far they are: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from loopscope._util.estimate import Estimate, Phase
from loopscope._util.wording import duration

_EVERY = 30.0
"""Seconds between two lines where there is no terminal; and what a job must take for its time to be worth a line."""
_LOOK = 0.5
"""Seconds between two looks at the clock while nothing is reported."""


def in_notebook() -> bool:
    """Whether this is a kernel, whose standard error is shown under a cell."""
    return "ipykernel" in sys.modules


class ProgressBar:
    """The phases of one job and the time that they take, on standard error unless another console is given.

    A context manager. `unit` is what is going on until a job says more; `last` are phases that come after those of
    the job. A job that never starts has its steps counted, without an end. `clock` gives seconds.
    """

    def __init__(
        self,
        unit: str,
        console: Console | None = None,
        *,
        last: Sequence[Phase] = (),
        transient: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # A cell shows a line that is written over as a terminal does, and needs no widgets for it.
        self._console = console or (
            Console(file=sys.stderr, force_terminal=True, force_jupyter=False, width=100)
            if in_notebook()
            else Console(stderr=True)
        )
        self._now, self._last = unit, tuple(last)
        self._clock = clock
        self._began = self._said = clock()
        self._estimate: Estimate | None = None
        self._counted, self._figures = 0, ""
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._bar = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=transient,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(unit, total=None)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._bar.stop()

    def start(self, phases: Sequence[Phase]) -> None:
        """The phases of the job, in the order in which they begin."""
        with self._lock:
            self._estimate = Estimate((*phases, *self._last), self._clock, self._began)
        self.refresh()

    def step(self, phase: str, count: int = 1, figures: str = "") -> None:
        """So many steps of a phase are over; and what they gave, behind the count."""
        with self._lock:
            self._now, self._figures = phase, figures
            if self._estimate is None:
                self._counted += count
            else:
                self._estimate.step(phase, count)
        self.refresh()

    def first_batch(self, memory: int | None) -> None:
        """A batch is through all that batches go through: say what the whole will take, if that is long. `memory` is
        the most that was in use, in bytes."""
        with self._lock:
            left = None if self._estimate is None else self._estimate.left
            if self._estimate is None or left is None or self._estimate.elapsed + left < _EVERY:
                return
            whole = duration(self._estimate.elapsed + left)
        peak = "" if memory is None else f", {memory / 2**20:,.0f} MiB of memory at the most so far"
        self.note(f"Expected after the first batch: {whole} in all{peak}.")

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._bar.console.print(escape(message), soft_wrap=True, highlight=False)

    def refresh(self) -> None:
        """Draw the bar again, or say a line if there was none for half a minute."""
        with self._lock:
            share = None if self._estimate is None else self._estimate.share
            if self._console.is_terminal:
                total = None if share is None else 1.0
                self._bar.update(self._task, description=escape(self._text()), total=total, completed=share or 0.0)
            elif self._clock() - self._said >= _EVERY:
                self._said = self._clock()
                self.note(self._text())

    def _text(self) -> str:
        """Such as `eigenvalues, 35 %, 40 s of about 2 min`."""
        found = self._estimate
        passed = duration(self._clock() - self._began)
        figures = f"  {self._figures}" if self._figures else ""
        if found is None:
            return f"{self._now}{f' {self._counted:,}' if self._counted else ''}, {passed}"
        phase, left = found.phases[0], found.left
        counted = f" {found.done(phase):,} of {phase.steps:,}" if len(found.phases) == 1 else f", {found.share:.0%}"
        whole = "" if left is None else f" of about {duration(found.elapsed + left)}"
        return f"{self._now}{counted}, {passed}{whole}{figures}"

    def _look(self) -> None:
        while not self._over.wait(_LOOK):
            self.refresh()
