"""Figures: what each head looks at, and whether its attention settles."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from loopscope.report.figures.curves import per_row, stable_share
from loopscope.report.figures.look import layer_colours, named_in_legend
from loopscope.report.paper.axes import count_recurrences, mark_trained, panels
from loopscope.report.paper.inference import judged_at
from loopscope.report.paper.legends import add_colour_bar, add_legend
from loopscope.report.paper.style import Width, study_figure
from loopscope.report.paper.texts import decade_ticks
from loopscope.study import Readings, median_over_prompts, sites_of

_ROW = 0.06
"""Inches of a head in a map, at least: less and rows cannot be told apart."""
_MOST_NAMES = 16
"""Layers that are named beside a map."""


@study_figure
def head_change(readings: Readings, width: Width = "auto") -> Figure:
    """A row per head of every recurrent layer: how much its map changes from recurrence to recurrence."""
    change = median_over_prompts(per_row(readings.shown, "attention_change"))
    values = change.transpose("layer", "head", "recurrence").values[..., 1:].astype(np.float64)
    layers, heads, recurrences = values.shape
    rows = values.reshape(-1, recurrences)
    with np.errstate(divide="ignore"):  # a map that does not change at all has no logarithm, and no colour
        shown = np.where(rows > 0, np.log10(rows), np.nan)
    figure, (axes,) = panels(1, width)
    figure.set_figheight(max(figure.get_figheight(), 0.6 + _ROW * len(rows)))
    exponents = decade_ticks(*_decades(shown))
    edges = (1.5, recurrences + 1.5, len(rows) - 0.5, -0.5)
    image = axes.imshow(shown, extent=edges, aspect="auto", vmin=exponents[0], vmax=exponents[-1])
    axes.grid(visible=False)
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=0.6)
    every = max(1, -(-layers // _MOST_NAMES))
    middles = [layer * heads + (heads - 1) / 2 for layer in range(0, layers, every)]
    axes.set_yticks(middles, labels=[str(layer) for layer in range(0, layers, every)])
    axes.set_ylabel("recurrent layer, a row per head")
    axes.set_xlabel("recurrence")
    add_colour_bar(figure, image, axes, "change per row", exponents)
    return figure


@study_figure
def heads_stable(readings: Readings, width: Width = "auto") -> Figure:
    """Share of a layer's heads, over all prompts, that are stable after so many recurrences."""
    stable_from = readings.variable("head_stable_from")
    counts = np.arange(1, readings.view.recurrences + 1)
    shares = 100 * stable_share(stable_from, counts)
    figure, (axes,) = panels(1, width)
    for layer, (share, colour) in enumerate(zip(shares, layer_colours(len(shares)), strict=True)):
        label = str(layer) if named_in_legend(layer, len(shares)) else None
        axes.step(counts, share, where="post", color=colour, label=label)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("share of heads (%)")
    count_recurrences(axes, len(counts))
    mark_trained(axes, readings)
    add_legend(figure, [axes], "layer")
    return figure


@study_figure
def head_sinks(readings: Readings, width: Width = "auto") -> Figure:
    """Share of each head's attention that the first token receives, in one pass; of a looped model at the trained
    number of recurrences."""
    at = judged_at(readings) - 1
    kept = [
        index
        for index, site in enumerate(sites_of(readings.shown))
        if site.stage != "recurrent" or site.recurrence == at
    ]
    sink = (
        median_over_prompts(readings.variable("sink_score")).transpose("depth", "head").values[kept].astype(np.float64)
    )
    figure, (axes,) = panels(1, width)
    image = axes.imshow(sink, vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    for start in (readings.prelude, readings.prelude + readings.recurrent):
        if 0 < start < len(kept):
            axes.axhline(start - 0.5, color="white", linewidth=1)
    every = max(1, -(-len(kept) // _MOST_NAMES))
    axes.set_yticks(range(0, len(kept), every))
    axes.set_xticks(range(0, sink.shape[1], max(1, -(-sink.shape[1] // 12))))
    axes.set_ylabel("layer of one pass")
    axes.set_xlabel("head")
    add_colour_bar(figure, image, axes, "sink score of the first token")
    return figure


def _decades(logarithms: NDArray[np.float64]) -> tuple[float, float]:
    """Whole powers of ten around the values."""
    finite = logarithms[np.isfinite(logarithms)]
    low, high = np.floor(finite.min()), np.ceil(finite.max())
    return float(low), float(max(high, low + 1))
