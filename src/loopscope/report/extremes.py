"""Figures: the most extreme orbit and slider that were found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopscope.answers.wording import percent, significant
from loopscope.drawing import visible
from loopscope.report.figure import Figure
from loopscope.report.kinds import KIND_LOOKS
from loopscope.report.style import base_figure
from loopscope.verdicts import Kind

__all__ = ["Extreme", "extremes"]


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """An orbit or a slider that may be the most extreme one."""

    label: str
    kind: Kind
    size: float
    """Amplitude of an orbit, speed of a slider, relative to the norm."""
    period: float
    path: NDArray[np.floating]
    """(time, 2), relative to the norm."""


def extremes(candidates: Sequence[Extreme]) -> list[Figure]:
    """The widest orbit and the fastest slider, as far as there are some."""
    figures = []
    for kind in (Kind.ORBIT, Kind.SLIDER):
        there = [each for each in candidates if each.kind is kind and math.isfinite(each.size)]
        if there:
            figures.append(_drawn(max(there, key=lambda each: each.size), len(there)))
    return figures


def _drawn(extreme: Extreme, among: int) -> Figure:
    x, y = extreme.path.astype(np.float32).T
    colour = KIND_LOOKS[extreme.kind].colour
    figure = base_figure("1st component / norm", "2nd component / norm", hovermode="closest", showlegend=False)
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": "#B9BDC4", "width": 1},
        marker={"color": colour, "size": 5},
        text=[f"{len(x) - 1 - time} before the end" for time in range(len(x))],
        hovertemplate="recurrence %{text}<extra></extra>",
    )
    figure.add_scatter(
        x=x[-1:], y=y[-1:], mode="markers", marker={"color": colour, "size": 12, "symbol": "star"}, hoverinfo="skip"
    )
    figure.update_yaxes(scaleanchor="x")
    orbit = extreme.kind is Kind.ORBIT
    if orbit:
        numbers = f"amplitude {percent(extreme.size)} of the norm, period {significant(extreme.period, 3)} recurrences"
    else:
        numbers = f"{percent(extreme.size)} of the norm per recurrence"
    rank = f"the most of {among:,}" if among > 1 else "the only one"
    return Figure(
        anchor=f"extreme-{extreme.kind}",
        title="The widest orbit" if orbit else "The fastest slider",
        caption=f"{visible(extreme.label, 80)}: {numbers}; {rank}. Each point is a state of the "
        "tail, in the plane in which it moves most; the star is the last one.",
        plot=figure,
    )
