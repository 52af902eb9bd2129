"""Panels, and what is put on their axes: scales that fit the values, marks, legends, texts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_lowercase

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from loopscope.drawing import MUTED, Readings, visible
from loopscope.figures.style import Width, inches

__all__ = [
    "add_colour_bar",
    "add_legend",
    "choose_scale",
    "count_recurrences",
    "count_x",
    "decade",
    "decade_ticks",
    "drawable",
    "finish_scale",
    "label_marks",
    "mark_trained",
    "name_x_once",
    "name_y",
    "number",
    "panels",
    "text",
]

_PANEL = 2.0
"""Inches: the width below which panels go under each other rather than beside."""
_Y_CHARACTERS = 26
"""Of a name along the lowest y axis."""
_HEIGHT, _LOWEST, _LEGEND = 0.72, 1.8, 0.2
"""Of a panel, per inch of its width; of the lowest panel whose y axis has room for its name, in inches; and of a row of
the legend."""
_PAGE = 8.6
"""Inches: what a page of a paper has room for; of many rows of panels each becomes lower."""
_CHARACTER, _HANDLE = 0.052, 0.24
"""Inches that a character and a handle take in a legend, roughly; more columns than fit would be cut off."""
_LINEAR = 5.0
"""Values within this factor are compared by eye on a linear axis; beyond it the small ones lie on top of each other."""
_CLOSE = 2.0
"""Values within this factor get an axis that does not begin at 0."""
_STEPS = [1, 2, 2.5, 5, 10]
"""Between ticks, times a power of ten."""
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARK = "mark"
"""The gid of lines that stand for no value."""


def panels(
    count: int, width: Width, *, height: float = _HEIGHT, columns: int | None = None, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, lettered if there are several; as many beside each other as its width has room for.

    `height` is that of a panel per inch of its width.
    """
    total = inches(width, count)
    beside = columns or max(1, min(count, round(total / _PANEL)))
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


def text(outside: str, longest: int = 24) -> str:
    """A text from outside for a figure: white space made visible, cut, and what the font has no shape for as ▯."""
    known = _characters()
    return "".join(char if ord(char) in known else "▯" for char in visible(outside, longest))


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def decade(exponent: int) -> str:
    """A power of ten, without markup: 10⁻³."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def number(value: float) -> str:
    """A number of a tick, without markup: 0.02, 350, 2·10⁻⁷."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**exponent:.3g}·{decade(exponent)}".replace("-", "−")


def name_y(axes: Axes, words: str) -> None:
    """The name of the y axis, on two lines where it is longer than the axis."""
    axes.set_ylabel("\n".join(textwrap.wrap(words, _Y_CHARACTERS)))


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


def decade_ticks(low: float, high: float, most: int = 6) -> list[int]:
    """Whole exponents from `low` to `high`, evenly, at most so many."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    step = max(1, math.ceil((last - first) / max(1, most - 1)))
    return list(range(first, last + 1, step))


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
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.lines if line.get_gid() != _MARK]
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
    """A dashed line at the trained number of recurrences, where that was reached; `at` is its place on the axis."""
    trained = readings.view.trained
    if trained is not None and trained <= readings.view.recurrences:
        axes.axvline(trained if at is None else at, color=MUTED, linewidth=0.7, linestyle=(0, (4, 2)), gid=_MARK)


def label_marks(axes: Axes, x: float, words: str) -> None:
    """Words above the panel at a place on its x axis, to the side where there is room."""
    low, high = axes.get_xlim()
    left = x < (low + high) / 2
    axes.annotate(
        words,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2 if left else -2, 2),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom",
        fontsize=6.5,
        color=MUTED,
    )


def add_legend(
    figure: Figure, drawn: Sequence[Axes], title: str | None = None, *, explained: Sequence[str] = ()
) -> None:
    """One legend below all panels: every label once, numbers before words, row by row. The title is its first entry.

    Where one row does not hold all, the labels that the caption has `explained` as well are left out.
    """
    entries: dict[str, Artist] = {}
    for axes in drawn:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    labels = sorted(entries, key=lambda label: not label.isdigit())
    if title and labels[0].isdigit():
        labels, entries = [title, *labels], {title: Line2D([], [], linestyle="none"), **entries}
    width = figure.get_figwidth()
    for label in explained:
        if label in labels and _legend_columns(labels, width) < len(labels):
            labels.remove(label)
    columns = _legend_columns(labels, width)
    # Matplotlib fills column by column.
    order = [labels[index] for column in range(columns) for index in range(column, len(labels), columns)]
    figure.legend([entries[label] for label in order], order, loc="outside lower center", ncols=columns)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """The most columns whose widest entries fit beside each other."""
    sizes = [_HANDLE + _CHARACTER * len(label) for label in labels]
    for columns in range(len(labels), 1, -1):
        if sum(max(sizes[column::columns]) for column in range(columns)) <= width:
            return columns
    return 1


def add_colour_bar(figure: Figure, image: AxesImage, beside: Axes, words: str, exponents: Sequence[int] = ()) -> None:
    """A named colour bar, as high as the map. Of an image of logarithms, `exponents` are the powers of ten to write."""
    bar = figure.colorbar(image, cax=beside.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label(words)
    bar.outline.set_visible(False)
    if exponents:
        bar.set_ticks(list(exponents), labels=[decade(exponent) for exponent in exponents])
