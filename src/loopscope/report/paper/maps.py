"""Figures: matrices of visits, layers and heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from loopscope._util.sites import stage_name, stage_starts
from loopscope.report.paper.axes import panels
from loopscope.report.paper.inference import FEW
from loopscope.report.paper.legends import add_colour_bar
from loopscope.report.paper.style import Width, study_figure
from loopscope.study import Readings, median_over_prompts

_MOST_NUMBERS = 8
"""Layers whose cosines are written into the map."""
_MOST_NAMES = 16
"""Passes that are named on an axis; more names would lie on top of each other."""


@study_figure
def cycle_residual(readings: Readings, width: Width = "auto", *, recurrences: int | None = FEW) -> Figure:
    """Cosine of the residual streams of every two visits up to a recurrence, or of all that the study holds."""
    shown, labels = _part(readings, "cycle_similarity", recurrences)
    return _visits_map(shown, labels, width, "cosine", lowest=min(0.0, float(np.nanmin(shown))), highest=1.0)


@study_figure
def cycle_attention(readings: Readings, width: Width = "auto", *, recurrences: int | None = FEW) -> Figure:
    """Frobenius distance per row of the attention maps of every two visits up to a recurrence, or of all."""
    shown, labels = _part(readings, "attention_cycle_distance", recurrences)
    return _visits_map(shown, labels, width, "distance per row", lowest=0.0, highest=float(np.nanmax(shown)) or 1.0)


@study_figure
def layer_cosine(readings: Readings, width: Width = "auto") -> Figure:
    """Cosines of the layers' states at the horizon, median over prompts."""
    cosine = median_over_prompts(readings.variable("layer_cosine")).transpose("layer", "layer_other").values
    figure, (axes,) = panels(1, width, height=0.82)
    figure.set_layout_engine("compressed")
    lowest = min(0.0, float(np.nanmin(cosine)))
    image = axes.imshow(cosine, vmin=lowest, vmax=1)
    axes.grid(visible=False)
    if len(cosine) <= _MOST_NUMBERS:
        for row, column in np.ndindex(cosine.shape):
            dark = cosine[row, column] < lowest + 0.55 * (1 - lowest)
            colour = "white" if dark else "black"
            axes.text(column, row, f"{cosine[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(0, len(cosine), -(-len(cosine) // 12)))
    axes.set_xlabel("recurrent layer")
    axes.set_ylabel("recurrent layer")
    add_colour_bar(figure, image, axes, "cosine at H")
    return figure


def cycle_labels(readings: Readings, recurrences: int | None) -> list[str]:
    """The visits of a cycle's matrix up to a recurrence, or all of them.

    The coda, which runs after the last recurrence of all, is left out of a part.
    """
    labels = [str(label) for label in readings.shown["visit"].values]
    held = sum(stage_name(label).isdigit() for label in labels) // max(1, readings.recurrent)
    if recurrences is None or held <= recurrences:
        return labels
    return labels[: readings.prelude + readings.recurrent * recurrences]


def _part(readings: Readings, name: str, recurrences: int | None) -> tuple[NDArray[np.float64], list[str]]:
    values = readings.variable(name).values.astype(np.float64)
    labels = cycle_labels(readings, recurrences)
    return values[: len(labels), : len(labels)], labels


def _visits_map(
    values: NDArray[np.float64], labels: Sequence[str], width: Width, words: str, *, lowest: float, highest: float
) -> Figure:
    """Visits x visits in order of realised depth, white lines where a stage or a recurrence begins."""
    figure, (axes,) = panels(1, width, height=0.84)
    figure.set_layout_engine("compressed")
    image = axes.imshow(values, vmin=lowest, vmax=highest)
    axes.grid(visible=False)
    _name_passes(axes, labels)
    add_colour_bar(figure, image, axes, words)
    return figure


def _name_passes(axes: Axes, labels: Sequence[str]) -> None:
    """Names of stages and recurrences, with white lines where each begins; of a feed-forward model its layers."""
    starts = stage_starts(labels)
    names = [stage_name(labels[start]) for start in starts]
    looped = any(name.isdigit() for name in names)
    if looped:
        thin = min(0.5, 6 / len(starts))
        for start in starts[1:]:
            axes.axvline(start - 0.5, color="white", linewidth=thin)
            axes.axhline(start - 0.5, color="white", linewidth=thin)
        middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)]
    else:
        middles, names = [float(index) for index in range(len(labels))], [str(index) for index in range(len(labels))]
    every = -(-len(names) // _MOST_NAMES)
    # The coda is named beside the last recurrence, where there is room for one name of the two.
    room = len(names) - (every if names[-1] == "coda" else 0)
    kept = [
        place for place, name in enumerate(names) if not name.isdigit() or (int(name) % every == 0 and place < room)
    ]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([middles[place] for place in kept], labels=[names[place] for place in kept])
    axes.tick_params(length=0)
    if looped:
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("recurrence" if looped else "layer")
    axes.set_ylabel("recurrence" if looped else "layer")
