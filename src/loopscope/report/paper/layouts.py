"""The three ways to lay a quantity of every visit out (method: by layer, by recurrence, by depth)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from loopscope.report.figures.look import BAND, GRID, MUTED, layer_colours, named_in_legend, ordered_colours
from loopscope.report.paper.axes import MARK, choose_scale, count_recurrences, count_x, drawable, mark_trained
from loopscope.report.paper.curves import Curve
from loopscope.study import Readings, powers_of_two

Layout = Literal["by layer", "by recurrence", "by depth"]
LAYOUTS: tuple[Layout, ...] = ("by layer", "by recurrence", "by depth")

_MOST_PARTED = 16
"""Recurrences between which lines are drawn; more would hide the curve."""
MOST_JOINED = 12
"""Layers of which each gets a line of its own through the visits."""
_OUTER, _BAND, _VISITS = "prelude, coda", "90 %", "every visit"
EXPLAINED = (_OUTER, _VISITS, _BAND)
"""Labels of what every caption says in words too."""


def draw_curve(
    axes: Axes,
    readings: Readings,
    curve: Curve,
    layout: Layout,
    recurrences: Sequence[int],
    *,
    linear: bool = False,
) -> None:
    """`recurrences`, counted from 1, are the lines of a drawing by recurrence; of one by depth the last is the last
    drawn. One by layer shows all. A quantity that is `linear` gets no logarithmic axis."""
    if not linear:
        choose_scale(axes, np.concatenate([curve.block[1].ravel(), curve.prelude[1], curve.coda[1]]))
    if layout == "by layer":
        _by_layer(axes, readings, curve)
    elif layout == "by recurrence":
        _by_recurrence(axes, readings, curve, recurrences)
    else:
        _by_depth(axes, readings, curve, max(recurrences, default=0))


def passes(total: int, most: int = 8) -> list[int]:
    """Recurrences from 1 that get a line each: all of a few, else powers of two and the last."""
    return list(range(1, total + 1)) if total <= most else powers_of_two(total)


def legend_title(layout: Layout) -> str:
    return {"by layer": "layer", "by recurrence": "recurrence", "by depth": "layer"}[layout]


def shade_stages(axes: Axes, start: float, end: float) -> None:
    """Grey on 0 to 100 % of relative depth but for the block, from `start` to `end`: prelude and coda."""
    for low, high in ((0.0, start), (end, 100.0)):
        if high > low:
            axes.axvspan(low, high, color=GRID, linewidth=0, alpha=0.6, zorder=0)


def _by_layer(axes: Axes, readings: Readings, curve: Curve) -> None:
    counts = np.arange(1, curve.recurrences + 1)
    if curve.block.shape[1]:
        _band(axes, counts, curve.block[:, -1])
    layers = curve.block.shape[1]
    for layer, colour in enumerate(layer_colours(layers)):
        label = str(layer) if named_in_legend(layer, layers) else None
        # A study of one recurrence has points, and no lines.
        marker = "o" if len(counts) == 1 else None
        axes.plot(counts, drawable(axes, curve.block[1, layer]), color=colour, label=label, marker=marker)
    count_recurrences(axes, curve.recurrences)
    mark_trained(axes, readings)


def _by_recurrence(axes: Axes, readings: Readings, curve: Curve, recurrences: Sequence[int]) -> None:
    total = readings.prelude + readings.recurrent + readings.coda
    block = [readings.depth_percent(layer) for layer in range(readings.recurrent)]
    step = 100 / total
    start, end = readings.prelude * step, (readings.prelude + readings.recurrent) * step
    shade_stages(axes, start, end)
    if recurrences:
        _band(axes, block, curve.block[:, :, recurrences[-1] - 1])
    for count, colour in zip(recurrences, ordered_colours(len(recurrences)), strict=True):
        values = drawable(axes, curve.block[1, :, count - 1])
        if np.isfinite(values).any():  # a first step there is none, and a last one may be nothing at all
            axes.plot(block, values, color=colour, label=str(count), marker="o")
    for outer, before in ((curve.prelude[1], 0.0), (curve.coda[1], end)):
        if np.isfinite(outer).any():
            depth = before + step * np.arange(1, len(outer) + 1)
            axes.plot(depth, drawable(axes, outer), color=MUTED, label=_OUTER, marker="s")
    axes.set_xlabel("relative depth (%)")
    axes.set_xlim(0, 102)


def _by_depth(axes: Axes, readings: Readings, curve: Curve, recurrences: int) -> None:
    values = curve.along_depth(recurrences)
    layers, looped = curve.block.shape[1], readings.view.looped
    # Visits are counted from 1, as recurrences are; layers, as everywhere, from 0.
    visits = np.arange(values.shape[1]) + (1 if looped else 0)
    _band(axes, visits, values)
    few = len(visits) <= 24
    axes.plot(
        visits,
        drawable(axes, values[1]),
        color=MUTED if looped else layer_colours(1)[0],
        linewidth=0.7 if looped else 1.1,
        marker="o" if few else None,
        label=_VISITS if looped else None,
        zorder=2,
    )
    if layers <= MOST_JOINED:
        for layer, colour in enumerate(layer_colours(layers)):
            at = readings.prelude + layer + 1 + layers * np.arange(recurrences)
            axes.plot(at, drawable(axes, curve.block[1, layer, :recurrences]), color=colour, label=str(layer), zorder=3)
    if recurrences and recurrences <= _MOST_PARTED:
        for recurrence in range(recurrences + 1):
            at_edge = readings.prelude + layers * recurrence + 0.5
            axes.axvline(at_edge, color=MUTED, linewidth=0.5, linestyle=":", gid=MARK)
    axes.set_xlabel("layer application, in order" if looped else "layer")
    axes.set_xlim(visits[0] - 0.5, visits[-1] + 0.5)
    count_x(axes)
    trained = readings.view.trained
    if looped and trained is not None and trained < recurrences:
        mark_trained(axes, readings, readings.prelude + layers * trained + 0.5)


def _band(axes: Axes, x: Sequence[float] | NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Grey between low and high, where both are there."""
    low, high = drawable(axes, values[0]), drawable(axes, values[2])
    if (np.isfinite(low) & np.isfinite(high)).any():
        axes.fill_between(x, low, high, color=MUTED, alpha=BAND, linewidth=0, label=_BAND, zorder=1)
