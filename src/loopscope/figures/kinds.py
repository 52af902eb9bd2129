"""What a type of figure is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from matplotlib.figure import Figure

from loopscope.comparison import Comparison
from loopscope.drawing import Readings
from loopscope.figures.style import Width

__all__ = ["FigureType", "S"]

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
