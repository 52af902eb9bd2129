"""What a type of figure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from matplotlib.figure import Figure

from loopscope.answers.comparison.result import Comparison
from loopscope.report.paper.absence import why_absent
from loopscope.report.paper.style import Width
from loopscope.study import Readings

S = TypeVar("S", Readings, Comparison)
"""What a figure is drawn from."""


@dataclass(frozen=True, kw_only=True)
class FigureType(Generic[S]):
    """A type of figure, of one study or of studies side by side."""

    name: str
    """Of its files."""
    draw: Callable[[S, Width], Figure]
    words: Callable[[S], str]
    """What is drawn, in sentences that begin its caption."""
    variables: tuple[str, ...]
    """Of the study or the comparison, from which it is drawn."""
    absent: Callable[[S], str | None]
    """Why it cannot be drawn; None if it can."""
    paper: tuple[int, ...] = ()
    """Figures of arXiv 2604.11791 that show the same, by what its running text says of them."""


def never(_: Readings) -> str | None:
    """No other reason than missing variables."""
    return None


def study_type(
    name: str,
    draw: Callable[[Readings, Width], Figure],
    words: str | Callable[[Readings], str],
    variables: tuple[str, ...],
    paper: tuple[int, ...] = (),
    *,
    loops: bool = True,
    unless: Callable[[Readings], str | None] = never,
) -> FigureType[Readings]:
    """Of a looped model, unless `loops` is false; `unless` gives another reason for which it cannot be drawn."""

    def absent(readings: Readings) -> str | None:
        return why_absent(readings, variables, loops=loops) or unless(readings)

    said = words if callable(words) else lambda _: str(words)
    return FigureType(name=name, draw=draw, words=said, variables=variables, absent=absent, paper=paper)


def one_recurrence(readings: Readings) -> str | None:
    return None if readings.view.recurrences > 1 else "one recurrence was measured, so there is no change"
