"""Figures: the stages of inference, along the depth of one pass, through all visits, and layer by layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from loopscope.answers.quantities import STAGE_QUANTITIES, StageQuantity
from loopscope.errors import ConfigError, StudyError
from loopscope.report.figures.look import CATEGORIES
from loopscope.report.paper.axes import count_x, finish_scale, name_x_once, name_y, panels
from loopscope.report.paper.curves import visit_curve
from loopscope.report.paper.layouts import EXPLAINED, Layout, draw_curve, legend_title, passes
from loopscope.report.paper.legends import add_legend
from loopscope.report.paper.style import Width, study_figure
from loopscope.study import Readings, sites_of

FEW = 8
"""Recurrences of the paper's figures through every visit; its appendix shows more."""


@study_figure
def stages(
    readings: Readings,
    layout: Layout = "by recurrence",
    width: Width = "auto",
    *,
    only: str | None = None,
    recurrences: list[int] | None = None,
) -> Figure:
    """A panel per stage measure that the study has, or the one that `only` names by its anchor, such as concentration.

    `recurrences`, counted from 1: by recurrence a line each, by depth up to the last of them; those up to the trained
    number unless given. Raises `ConfigError` for a name that there is not, `StudyError` for a study without it.
    """
    anchors = [quantity.anchor for quantity in STAGE_QUANTITIES]
    if only is not None and only not in anchors:
        raise ConfigError(f"There is no stage measure {only!r}; there are {', '.join(anchors)}.")
    quantities = [quantity for quantity in measured(readings) if only in (None, quantity.anchor)]
    if not quantities:
        raise StudyError("The study lacks the stage measures from which this is drawn; analyze the model again.")
    lines = within(readings) if recurrences is None else recurrences
    figure, drawn = panels(len(quantities), width)
    for axes, quantity in zip(drawn, quantities, strict=True):
        curve = visit_curve(readings, quantity)
        draw_curve(axes, readings, curve, layout, lines, linear=not quantity.logarithmic)
        name_y(axes, quantity.y_title)
        finish_scale(axes)
    name_x_once(drawn)
    add_legend(figure, drawn, legend_title(layout), explained=EXPLAINED)
    return figure


@study_figure
def neurons(readings: Readings, width: Width = "auto") -> Figure:
    """Share of a layer's MLP neurons that raise, or lower, the logits of a few tokens far more than the rest."""
    labels = [str(label) for label in readings.variable("unique_layer").values]
    figure, (axes,) = panels(1, width)
    at = np.arange(len(labels))
    for name, colour, shift in (("prediction", CATEGORIES[0], -0.2), ("suppression", CATEGORIES[1], 0.2)):
        share = 100 * readings.variable(f"{name}_neurons").values.astype(np.float64)
        axes.bar(at + shift, np.nan_to_num(share), width=0.4, color=colour, label=name)
    every = max(1, -(-len(labels) // 12))
    short = [label.replace("prelude.", "p").replace("recurrent.", "r").replace("coda.", "c") for label in labels]
    axes.set_xticks(at[::every], labels=short[::every] if readings.view.looped else [str(i) for i in at[::every]])
    axes.set_xlabel("layer (p: prelude, r: recurrent, c: coda)" if readings.view.looped else "layer")
    axes.set_ylabel("share of neurons (%)")
    axes.set_ylim(bottom=0, top=None if axes.dataLim.y1 > 0 else 1)
    add_legend(figure, [axes])
    return figure


@study_figure
def massive_places(readings: Readings, width: Width = "auto") -> Figure:
    """Where the largest entry of the residual stream is, visit by visit: the share of prompts in which it belongs to
    the first token, and the share in which it lies in the coordinate where it lies most often."""
    count = readings.prelude + readings.recurrent * min(FEW, max(1, readings.view.recurrences))
    last = len(sites_of(readings.shown)) if not readings.view.looped or readings.view.recurrences <= FEW else count
    token, place = (
        readings.variable(f"massive_{name}").transpose("depth", "prompt").values for name in ("token", "dimension")
    )
    figure, (axes,) = panels(1, width)
    visits = np.arange(last) + (1 if readings.view.looped else 0)
    for name, share, colour in (
        ("on the first token", (token == 0).mean(axis=1), CATEGORIES[0]),
        ("in the most common coordinate", np.array([_most_common(row) for row in place]), CATEGORIES[1]),
    ):
        axes.plot(visits, 100 * share[:last], color=colour, marker="o", label=name)
    axes.set_ylim(-3, 103)
    axes.set_xlim(visits[0] - 0.5, visits[-1] + 0.5)
    count_x(axes)
    axes.set_xlabel("layer application, in order" if readings.view.looped else "layer")
    axes.set_ylabel("share of prompts (%)")
    add_legend(figure, [axes])
    return figure


def measured(readings: Readings) -> list[StageQuantity]:
    """The stage measures that the study has."""
    return [
        quantity
        for quantity in STAGE_QUANTITIES
        if quantity.variable in readings.shown and np.isfinite(readings.shown[quantity.variable].values).any()
    ]


def judged_at(readings: Readings) -> int:
    """The trained number of recurrences, or the last one measured where that is not known or not reached."""
    return min(readings.view.trained or readings.view.recurrences, readings.view.recurrences)


def within(readings: Readings) -> list[int]:
    """The recurrences up to the trained number that get a line each."""
    return passes(judged_at(readings)) if readings.view.looped else []


def beyond(readings: Readings) -> list[int]:
    """The trained number of recurrences, its doublings, and the last one measured; empty where none lies beyond it."""
    trained, last = readings.view.trained, readings.view.recurrences
    if trained is None or not 1 <= trained < last:
        return []
    doublings = [trained * 2**power for power in range(last.bit_length()) if trained * 2**power < last]
    return [*doublings, last]


def _most_common(row: np.ndarray) -> float:
    """Share of the entries of a row that have its most frequent value."""
    return float(np.unique(row, return_counts=True)[1].max() / len(row))
