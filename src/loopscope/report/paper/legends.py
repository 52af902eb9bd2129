"""What says which line or colour is which: legends and colour bars."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from loopscope.report.paper.texts import SMALL_SIZE, decade, fitted, text_inches

_MARGIN = 0.15
"""Inches around a legend."""
_HANDLE = 0.21
"""Inches that the handle of a label and the spaces around it take in a legend."""


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
    width = figure.get_figwidth() - _MARGIN
    shown = {label: fitted(label, width - _HANDLE, SMALL_SIZE) for label in labels}
    for label in explained:
        if label in labels and _legend_columns([shown[kept] for kept in labels], width) < len(labels):
            labels.remove(label)
    columns = _legend_columns([shown[label] for label in labels], width)
    # Matplotlib fills column by column.
    order = [labels[index] for column in range(columns) for index in range(column, len(labels), columns)]
    handles = [entries[label] for label in order]
    figure.legend(handles, [shown[label] for label in order], loc="outside lower center", ncols=columns)


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """The most columns whose widest entries fit beside each other."""
    sizes = [_HANDLE + text_inches(label, SMALL_SIZE) for label in labels]
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
