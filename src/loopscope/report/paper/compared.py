"""Figures that put studies side by side, looped or feed-forward, on relative depth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loopscope.answers.comparison.curves import MEASURES
from loopscope.answers.comparison.result import Comparison
from loopscope.answers.quantities import STAGE_QUANTITIES, StageQuantity
from loopscope.errors import ConfigError
from loopscope.report.figures.look import BAND, CATEGORIES, INK, MUTED, layer_colours, ordered_colours
from loopscope.report.paper.axes import (
    MARK,
    choose_scale,
    count_recurrences,
    drawable,
    finish_scale,
    name_panel,
    name_x_once,
    name_y,
    panels,
)
from loopscope.report.paper.layouts import passes, shade_stages
from loopscope.report.paper.legends import add_legend
from loopscope.report.paper.style import Width, inches, paper_style
from loopscope.report.paper.texts import text
from loopscope.study import powers_of_two

_P = ParamSpec("_P")

MOST_COLUMNS = 3
"""Of looped studies beside each other: more would be narrower than a panel can be read."""
_TWO_PANELS = 4.0
"""Inches that two panels beside each other need."""
_DEPTH = "relative depth (%)"
_DRIFTS = {"drift": "RMS difference / RMS", "own_similarity": "correlation with own pass"}


def _comparison_figure(
    draw: Callable[Concatenate[Comparison, _P], Figure],
) -> Callable[Concatenate[Comparison, _P], Figure]:
    @functools.wraps(draw)
    def drawn(comparison: Comparison, /, *args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with paper_style():
            return draw(comparison, *args, **kwargs)

    return drawn


@_comparison_figure
def compared_curves(comparison: Comparison, width: Width = "auto") -> Figure:
    """A panel per stage measure: one pass of every study, of a looped one at the recurrence it is judged at."""
    quantities = _shared(comparison)
    figure, drawn = panels(len(quantities), width)
    colours = layer_colours(max(1, len(comparison.labels) - 1))
    for axes, quantity in zip(drawn, quantities, strict=True):
        lines = {label: comparison.curve(label, quantity.name, _home(comparison, label)) for label in comparison.labels}
        _scale(axes, quantity, [values for _, values in lines.values()])
        others = iter(colours)
        for label, (depth, values) in lines.items():
            reference = label == comparison.reference
            axes.plot(
                depth,
                drawable(axes, values.astype(np.float64)),
                color=INK if reference else next(others),
                linestyle="--" if reference else "-",
                marker="o",
                label=text(label) + (" (reference)" if reference else ""),
            )
        _finish(axes, quantity)
    name_x_once(drawn)
    add_legend(figure, drawn)
    return figure


@_comparison_figure
def compared_measure(comparison: Comparison, measure: str, width: Width = "auto", *, beyond: bool = False) -> Figure:
    """One stage measure, a panel per looped study: a line per recurrence between prelude and coda, and the reference
    dashed. Up to the recurrence that a study is judged at, or, with `beyond`, up to the last one measured.

    `measure` is one of `loopscope.comparison.MEASURES`; raises `ConfigError` for another.
    """
    if measure not in MEASURES:
        raise ConfigError(f"There is no stage measure {measure!r}; there are {', '.join(MEASURES)}.")
    quantity = STAGE_QUANTITIES[MEASURES.index(measure)]
    labels = [label for label in looped(comparison) if measure not in comparison.studies[label]["missing"]]
    lines = _recurrences(comparison, labels, beyond=beyond)
    figure, drawn = panels(len(labels), width, share_y=True)
    for axes, label in zip(drawn, labels, strict=True):
        _draw_passes(axes, comparison, label, quantity, lines)
        name_panel(axes, text(label))
    for axes in drawn:
        _finish(axes, quantity, drawn)
    name_x_once(drawn)
    add_legend(figure, drawn, "recurrence", explained=[text(comparison.reference)])
    return figure


@_comparison_figure
def compared_stages(comparison: Comparison, width: Width = "auto") -> Figure:
    """All stage measures, every pass beside the reference: a row per measure and a column per looped study, or, of a
    single looped study, a panel per measure."""
    quantities, labels = _shared(comparison), looped(comparison)
    alone = len(labels) == 1
    lines = _recurrences(comparison, labels)
    places = [(quantity, label) for quantity in quantities for label in labels]
    figure, drawn = panels(len(places), width, columns=None if alone else len(labels))
    for index, (axes, (quantity, label)) in enumerate(zip(drawn, places, strict=True)):
        _draw_passes(axes, comparison, label, quantity, lines)
        if not alone and index < len(labels):
            name_panel(axes, text(label))
        _finish(axes, quantity)
    name_x_once(drawn)
    add_legend(figure, drawn, "recurrence", explained=[text(comparison.reference)])
    return figure


@_comparison_figure
def compared_likeness(comparison: Comparison, width: Width = "auto") -> Figure:
    """A panel per looped study and span: correlation of each pass with the reference, mean over the measures, beside
    shuffled orders of the layers and the curve back to front."""
    places = [
        (label, span)
        for label in compared(comparison)
        for span in ("block", "pass")
        if span == "pass" or _outside(comparison.studies[label])
    ]
    figure, drawn = panels(len(places), width)
    for axes, (label, span) in zip(drawn, places, strict=True):
        study = comparison.studies[label]
        data = comparison.dataset.sel(study=label, span=span).isel(recurrence=slice(study["recurrences"]))
        counts = np.arange(1, study["recurrences"] + 1)
        null = data["overall_null_quantile"].values
        axes.fill_between(counts, null[0], null[-1], color=MUTED, alpha=BAND, linewidth=0, label="90 % of orders")
        marker = "o" if len(counts) == 1 else None
        for name, colour, style, words in (
            ("overall_reversed_similarity", MUTED, ":", "back to front"),
            ("overall_similarity", CATEGORIES[0], "-", "correlation"),
        ):
            axes.plot(counts, data[name].values, color=colour, linestyle=style, marker=marker, label=words)
        axes.set_ylim(-1.05, 1.05)
        name_y(axes, "correlation with reference")
        name_panel(axes, f"{span}: {text(label)}")
        count_recurrences(axes, len(counts))
        _mark_trained(axes, study)
    name_x_once(drawn)
    add_legend(figure, drawn)
    return figure


@_comparison_figure
def compared_drift(comparison: Comparison, width: Width = "auto") -> Figure:
    """Two panels per looped study: how far each pass through the block is, in level and in the order of its layers,
    from the pass at the recurrence that the study is judged at; a line per measure."""
    labels = [label for label in looped(comparison) if comparison.studies[label]["recurrences"] > 1]
    places = [(label, variable) for label in labels for variable in _DRIFTS]
    # The two of a study beside each other, where there is room for two.
    figure, drawn = panels(len(places), width, columns=2 if inches(width, len(places)) >= _TWO_PANELS else 1)
    for axes, (label, variable) in zip(drawn, places, strict=True):
        study = comparison.studies[label]
        data = comparison.dataset[variable].sel(study=label).isel(recurrence=slice(study["recurrences"]))
        values = data.transpose("measure", "recurrence").values.astype(np.float64)
        if variable == "drift":
            choose_scale(axes, values)
        for row, quantity, colour in zip(values, STAGE_QUANTITIES, CATEGORIES, strict=False):
            if np.isfinite(row).any():
                counts = np.arange(1, len(row) + 1)
                axes.plot(counts, drawable(axes, row), color=colour, label=quantity.name)
        name_y(axes, _DRIFTS[variable])
        name_panel(axes, text(label))
        finish_scale(axes)
        count_recurrences(axes, study["recurrences"])
        _mark_trained(axes, study)
    name_x_once(drawn)
    add_legend(figure, drawn)
    return figure


def looped(comparison: Comparison) -> list[str]:
    """The labels of the looped studies."""
    return [label for label in comparison.labels if comparison.studies[label]["recurrences"]]


def compared(comparison: Comparison) -> list[str]:
    """Of those, the ones that are compared with the reference."""
    return [label for label in looped(comparison) if label != comparison.reference]


def _shared(comparison: Comparison) -> list[StageQuantity]:
    """The stage measures that at least one study has."""
    missing = [set(study["missing"]) for study in comparison.studies.values()]
    return [quantity for quantity in STAGE_QUANTITIES if not all(quantity.name in names for names in missing)]


def _recurrences(comparison: Comparison, labels: Sequence[str], *, beyond: bool = False) -> dict[str, list[int]]:
    """Of each study the recurrences, from 1, that get a line."""
    studies = {label: comparison.studies[label] for label in labels}
    if beyond:
        return {label: powers_of_two(study["recurrences"]) for label, study in studies.items()}
    return {label: passes(study["judged_at"]) for label, study in studies.items()}


def _draw_passes(
    axes: Axes, comparison: Comparison, label: str, quantity: StageQuantity, lines: Mapping[str, list[int]]
) -> None:
    layout = comparison.studies[label]["layout"]
    curves_of = {count: comparison.curve(label, quantity.name, count - 1) for count in lines[label]}
    reference = comparison.curve(comparison.reference, quantity.name, _home(comparison, comparison.reference))
    _scale(axes, quantity, [values for _, values in (*curves_of.values(), reference)])
    step = 100 / max(1, sum(layout.values()) - 1)
    # Half way to the block's first and last layer.
    start = (layout["prelude"] - 0.5) * step if layout["prelude"] else 0.0
    end = (layout["prelude"] + layout["recurrent"] - 0.5) * step if layout["coda"] else 100.0
    shade_stages(axes, start, end)
    # One colour for a recurrence in all panels, since they share a legend.
    every = sorted(set().union(*lines.values()))
    colours = dict(zip(every, ordered_colours(len(every)), strict=True))
    for count, (depth, values) in curves_of.items():
        shown = drawable(axes, values.astype(np.float64))
        axes.plot(depth, shown, color=colours[count], marker="o", label=str(count))
    if label != comparison.reference:
        depth, values = reference
        shown = drawable(axes, values.astype(np.float64))
        axes.plot(depth, shown, color=CATEGORIES[3], linestyle="--", label=text(comparison.reference))


def _scale(axes: Axes, quantity: StageQuantity, lines: Sequence[np.ndarray]) -> None:
    if quantity.logarithmic and axes.get_yscale() == "linear":
        choose_scale(axes, np.concatenate(lines).astype(np.float64))


def _finish(axes: Axes, quantity: StageQuantity, together: Sequence[Axes] = ()) -> None:
    name_y(axes, quantity.y_title)
    axes.set_xlabel(_DEPTH)
    finish_scale(axes, together)


def _home(comparison: Comparison, label: str) -> int:
    """Index of the recurrence that a study is judged at."""
    return (comparison.studies[label]["judged_at"] or 1) - 1


def _outside(study: Mapping[str, Any]) -> int:
    return int(study["layout"]["prelude"] + study["layout"]["coda"])


def _mark_trained(axes: Axes, study: Mapping[str, Any]) -> None:
    trained = study["trained_recurrences"]
    if trained is not None and trained <= study["recurrences"]:
        words = "trained number"
        axes.axvline(trained, color=MUTED, linewidth=0.7, linestyle=(0, (4, 2)), gid=MARK, label=words)
