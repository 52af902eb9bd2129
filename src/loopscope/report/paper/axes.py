"""Panels, and what is put on their axes: scales that fit the values, names, marks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from string import ascii_lowercase

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from loopscope.report.figures.look import MUTED
from loopscope.report.paper.style import Width, inches
from loopscope.report.paper.texts import SMALL_SIZE, decade, decade_ticks, fitted, number
from loopscope.study import Readings

_PANEL = 2.0
"""Inches: the width below which panels go under each other rather than beside."""
_SIDES = 0.7
"""Inches beside a title that its panel's y axis and letter take."""
_Y_CHARACTERS = 26
"""Of a name along the lowest y axis."""
_HEIGHT, _LOWEST, _LEGEND = 0.72, 1.8, 0.2
"""Of a panel, per inch of its width; of the lowest panel whose y axis has room for its name, in inches; and of a row of
the legend."""
_PAGE = 8.6
"""Inches: what a page of a paper has room for; of many rows of panels each becomes lower."""
_LINEAR = 5.0
"""Values within this factor are compared by eye on a linear axis; beyond it the small ones lie on top of each other."""
_CLOSE = 2.0
"""Values within this factor get an axis that does not begin at 0."""
_STEPS = [1, 2, 2.5, 5, 10]
"""Between ticks, times a power of ten."""
MARK = "mark"
"""The gid of lines that stand for no value."""


def panels(
    count: int, width: Width, *, height: float = _HEIGHT, columns: int | None = None, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, lettered if there are several; as many beside each other as its width has room for.

    `height` is that of a panel per inch of its width.
    """
    total = inches(width, count)
    beside = columns or max(1, min(count, int(total / _PANEL)))
    if columns is None and count > beside:
        beside = math.ceil(count / math.ceil(count / beside))  # rows of equal length, as far as may be
    rows = math.ceil(count / beside)
    tall = min(rows * max(_LOWEST, height * total / beside), _PAGE)
    figure = Figure(figsize=(total, tall + _LEGEND), layout="constrained")
    first: Axes | None = None
    found = []
    for index in range(count):
        axes = figure.add_subplot(rows, beside, index + 1, sharey=first if share_y else None)
        first = first or axes
        if count > 1:
            axes.set_title(ascii_lowercase[index % 26], loc="left", fontweight="bold")
        found.append(axes)
    return figure, found


def name_y(axes: Axes, words: str) -> None:
    """The name of the y axis, on two lines where it is longer than the axis."""
    axes.set_ylabel("\n".join(textwrap.wrap(words, _Y_CHARACTERS)))


def name_panel(axes: Axes, words: str) -> None:
    """A title, cut to the width of its panel."""
    spot = axes.get_subplotspec()
    figure = axes.get_figure(root=True)
    assert spot is not None
    assert figure is not None
    axes.set_title(fitted(words, figure.get_figwidth() / spot.get_gridspec().ncols - _SIDES))


def name_x_once(drawn: Sequence[Axes]) -> None:
    """Where all panels have the same x axis, only the lowest of each column names it."""
    if len({axes.get_xlabel() for axes in drawn}) > 1:
        return
    places = [_place(axes) for axes in drawn]
    for axes, (row, column) in zip(drawn, places, strict=True):
        if (row + 1, column) in places:
            axes.set_xlabel("")


def _place(axes: Axes) -> tuple[int, int]:
    """Row and column of a panel."""
    spot = axes.get_subplotspec()
    assert spot is not None
    return spot.rowspan.start, spot.colspan.start


def choose_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Before anything is drawn: a logarithmic y axis for values that span more than a factor of 5."""
    if _span(values) > _LINEAR:
        axes.set_yscale("log")


def drawable(axes: Axes, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaps for what has no place on the y axis: what is not finite, and on a logarithmic one what is not positive."""
    there = np.isfinite(values) if axes.get_yscale() == "linear" else np.isfinite(values) & (values > 0)
    return np.where(there, values, np.nan)


def finish_scale(axes: Axes, together: Sequence[Axes] = ()) -> None:
    """After all is drawn: limits and ticks, for the values of all panels `together` where they share the axis.

    A linear axis begins at 0, unless there are negative values or all lie within a factor of 2, whose differences are
    then the matter.

    Within a decade the ticks of a logarithmic axis are 1, 2, 3, 4, 5 and 7, within two decades 1, 2 and 5, beyond that
    powers of ten.
    """
    values = np.concatenate([_drawn(each) for each in together or (axes,)])
    if axes.get_yscale() == "linear":
        if (values.size and 0 <= values.min() < values.max() / _CLOSE) or not values.any():
            axes.set_ylim(bottom=0, top=None if values.any() else 1)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return
    positive = values[values > 0]
    if not positive.size:  # what made the axis logarithmic is not among what was drawn
        axes.set_yscale("linear")
        return
    span = _span(values)
    margin = span**0.05
    low, high = math.log10(positive.min() / margin), math.log10(positive.max() * margin)
    axes.set_ylim(10**low, 10**high)
    if span <= 100:
        powers = range(math.floor(low), math.ceil(high) + 1)
        digits = (1, 2, 5) if span > 10 else (1, 2, 3, 4, 5, 7)
        ticks = [
            digit * 10.0**power for power in powers for digit in digits if low <= math.log10(digit) + power <= high
        ]
        labels = [number(tick) for tick in ticks]
    else:
        exponents = decade_ticks(low, high)
        ticks, labels = [10.0**exponent for exponent in exponents], [decade(exponent) for exponent in exponents]
    axes.set_yticks(ticks, labels=labels)
    axes.yaxis.set_minor_locator(NullLocator())


def _span(values: NDArray[np.float64]) -> float:
    """Largest over smallest of what is finite and positive."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(positive.max() / positive.min()) if positive.size else 1.0


def _drawn(axes: Axes) -> NDArray[np.float64]:
    """The finite y values of lines and bands."""
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines if line.get_gid() != MARK]
    outlines = [np.asarray(path.vertices) for band in axes.collections for path in band.get_paths()]
    drawn += [outline[:, 1].astype(np.float64) for outline in outlines if len(outline)]
    joined: NDArray[np.float64] = np.concatenate([np.empty(0), *drawn])
    return joined[np.isfinite(joined)]


def count_recurrences(axes: Axes, total: int) -> None:
    """An x axis of recurrences from 1."""
    axes.set_xlabel("recurrence")
    axes.set_xlim((0.5, 1.5) if total == 1 else (1, total))
    count_x(axes)


def count_x(axes: Axes) -> None:
    """Whole numbers on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def mark_trained(axes: Axes, readings: Readings, at: float | None = None) -> None:
    """A dashed line at the trained number of recurrences, named above the panel; nothing where it was not reached.

    `at` is its place, on an axis that is not of recurrences. The limits of the axis have to be set before.
    """
    trained = readings.view.trained
    if trained is None or trained > readings.view.recurrences:
        return
    place = float(trained) if at is None else at
    axes.axvline(place, color=MUTED, linewidth=0.7, linestyle=(0, (4, 2)), gid=MARK)
    left = place < sum(axes.get_xlim()) / 2
    axes.annotate(
        f"trained: {trained}",
        (place, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2 if left else -2, 2),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        fontsize=SMALL_SIZE,
        color=MUTED,
    )
