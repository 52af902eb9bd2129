"""Figures of a comparison: curves on relative depth, likeness by recurrence, drift."""

from __future__ import annotations

import dataclasses

import numpy as np
import plotly.graph_objects as go
import xarray

from loopscope.answers.comparison.result import Comparison
from loopscope.answers.quantities import STAGE_QUANTITIES, StageQuantity
from loopscope.report.figures._old import Figure, base_figure, mark_vertical, plot_text, scale_y
from loopscope.report.figures.look import CATEGORIES, GRID, INK, MUTED, layer_colours, ordered_colours
from loopscope.report.figures.plot import Section
from loopscope.study import powers_of_two

_DEPTH = "relative depth (%: first layer 0, last layer 100)"
_SPANS = {"block": "the block alone", "pass": "prelude, block and coda"}


def comparison_sections(comparison: Comparison) -> list[Section]:
    """In the order of the questions, without figures that have nothing to show."""
    looped = [label for label in comparison.labels if comparison.studies[label]["recurrences"]]
    sections = [
        _curves(comparison),
        *(_passes(comparison, label) for label in looped),
        _likeness(comparison, looped),
        _drift(comparison, looped),
    ]
    shown = [
        dataclasses.replace(section, figures=[figure for figure in section.figures if figure.has_data])
        for section in sections
    ]
    return [section for section in shown if section.figures]


def _curves(comparison: Comparison) -> Section:
    figures = []
    colours = layer_colours(max(1, len(comparison.labels) - 1))
    for quantity in STAGE_QUANTITIES:
        figure = base_figure(_DEPTH, quantity.y_title, hovermode="closest")
        others = iter(colours)
        for label in comparison.labels:
            reference = label == comparison.reference
            at = (comparison.studies[label]["judged_at"] or 1) - 1
            _add_curve(
                figure,
                *comparison.curve(label, quantity.name, at),
                name=f"{plot_text(label)}{' (reference)' if reference else ''}",
                colour=INK if reference else next(others),
                dash="dash" if reference else "solid",
            )
        figures.append(_figure(f"curves-{quantity.anchor}", quantity.title, quantity.reading, figure, quantity))
    return Section(
        anchor="curves",
        short="Curves",
        title="What does a pass look like beside the reference?",
        lead="Medians over prompts. Of a looped model: prelude, the block at the recurrence it is judged at, and coda.",
        columns=3,
        figures=figures,
    )


def _passes(comparison: Comparison, label: str) -> Section:
    """Every measure of one looped study: a line per recurrence, and the reference."""
    index, study = comparison.labels.index(label), comparison.studies[label]
    counts = powers_of_two(study["recurrences"])
    figures = []
    for quantity in STAGE_QUANTITIES:
        figure = base_figure(_DEPTH, quantity.y_title, hovermode="closest")
        _shade_outer_stages(figure, study["layout"])
        for count, colour in zip(counts, ordered_colours(len(counts)), strict=True):
            depth, values = comparison.curve(label, quantity.name, count - 1)
            _add_curve(figure, depth, values, name=str(count), colour=colour)
        if label != comparison.reference:
            at = (comparison.studies[comparison.reference]["judged_at"] or 1) - 1
            depth, values = comparison.curve(comparison.reference, quantity.name, at)
            _add_curve(figure, depth, values, name="reference", colour=INK, dash="dash")
        figures.append(_figure(f"passes-{index}-{quantity.anchor}", quantity.title, quantity.reading, figure, quantity))
    return Section(
        anchor=f"passes-{index}",
        short=f"Passes of {label}",
        title=f"{label}, pass by pass",
        lead="A line per recurrence, later ones lighter, between prelude and coda (shaded), which run once.",
        columns=3,
        figures=figures,
    )


def _likeness(comparison: Comparison, looped: list[str]) -> Section:
    figures = []
    for label in looped:
        if label == comparison.reference:
            continue
        study, index = comparison.studies[label], comparison.labels.index(label)
        outside = study["layout"]["prelude"] + study["layout"]["coda"]
        for span, words in _SPANS.items():
            if span == "block" and not outside:
                continue
            data = comparison.dataset.sel(study=label, span=span).isel(recurrence=slice(study["recurrences"]))
            figures.append(
                Figure(
                    anchor=f"likeness-{index}-{span}",
                    title=f"{label}: {words}" if outside else label,
                    caption="Grey: the middle 90 % of shuffled orders. Dotted: the curve back to front.",
                    plot=_likeness_plot(data, study["trained_recurrences"], study["recurrences"]),
                )
            )
    return Section(
        anchor="likeness",
        short="Likeness",
        title="Is every pass as like the reference?",
        lead="Correlation with the reference, mean over the measures that can be judged, by recurrence.",
        figures=figures,
    )


def _likeness_plot(data: xarray.Dataset, trained: int | None, measured: int) -> go.Figure:
    figure = base_figure("recurrences", "correlation")
    counts = np.arange(1, measured + 1)
    null = data["overall_null_quantile"].values.astype(np.float32)
    edge = {"x": counts, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_scatter(y=null[0], showlegend=False, **edge)
    figure.add_scatter(
        y=null[-1], fill="tonexty", fillcolor="rgba(91,95,102,0.16)", name="90 % of shuffled orders", **edge
    )
    shown = "lines" if measured > 1 else "markers"
    for name, colour, dash, words in (
        ("overall_reversed_similarity", MUTED, "dot", "back to front"),
        ("overall_similarity", CATEGORIES[0], "solid", "correlation"),
    ):
        figure.add_scatter(
            x=counts,
            y=data[name].values.astype(np.float32),
            mode=shown,
            name=words,
            line={"color": colour, "width": 2, "dash": dash},
            hovertemplate="%{y:.2f}",
        )
    figure.update_yaxes(range=[-1.05, 1.05])
    if trained is not None and trained <= measured:
        mark_vertical(figure, trained, f"trained: {trained}")
    return figure


def _drift(comparison: Comparison, looped: list[str]) -> Section:
    figures = []
    for index, label in enumerate(looped):
        study = comparison.studies[label]
        if study["recurrences"] < 2:
            continue
        for variable, anchor, title, y_title in (
            ("drift", f"drift-{index}", "how far the level moves", "RMS difference / RMS"),
            ("own_similarity", f"own-{index}", "whether the layers keep their order", "correlation"),
        ):
            figures.append(
                Figure(
                    anchor=anchor,
                    title=f"{label}: {title}",
                    caption=f"Each pass through the block against that of recurrence {study['judged_at']}.",
                    plot=_drift_plot(comparison, label, variable, y_title),
                )
            )
    return Section(
        anchor="drift",
        short="Drift",
        title="Do the stages stay beyond the trained recurrences?",
        lead="A line per measure. Where all layers share one value there is no correlation, and the line ends.",
        figures=figures,
    )


def _drift_plot(comparison: Comparison, label: str, variable: str, y_title: str) -> go.Figure:
    study = comparison.studies[label]
    figure = base_figure("recurrences", y_title)
    data = comparison.dataset[variable].sel(study=label).isel(recurrence=slice(study["recurrences"]))
    for quantity, colour in zip(STAGE_QUANTITIES, CATEGORIES, strict=False):
        values = data.sel(measure=quantity.name).values.astype(np.float32)
        figure.add_scatter(
            x=np.arange(1, study["recurrences"] + 1),
            # On a logarithmic axis the pass itself, which has not moved, is a gap; so is what was 0 and is not.
            y=np.where((values > 0) & np.isfinite(values), values, np.nan) if variable == "drift" else values,
            mode="lines",
            name=quantity.name,
            line={"color": colour, "width": 2},
            hovertemplate="%{y:.3g}",
        )
    if variable == "drift":
        scale_y(figure)
    if study["trained_recurrences"] is not None and study["trained_recurrences"] <= study["recurrences"]:
        mark_vertical(figure, study["trained_recurrences"], f"trained: {study['trained_recurrences']}")
    return figure


def _add_curve(
    figure: go.Figure, depth: np.ndarray, values: np.ndarray, *, name: str, colour: str, dash: str = "solid"
) -> None:
    figure.add_scatter(
        x=depth,
        y=values,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        marker={"size": 6},
        hovertemplate=f"{name}, %{{x:.0f}} %: %{{y:.3g}}<extra></extra>",
    )


def _shade_outer_stages(figure: go.Figure, layout: dict[str, int]) -> None:
    """Prelude and coda, up to half way to the block's first and last layer."""
    step = 100 / max(1, sum(layout.values()) - 1)
    edges = {"prelude": (0, layout["prelude"] - 0.5), "coda": (layout["prelude"] + layout["recurrent"] - 0.5, None)}
    for stage, (start, end) in edges.items():
        if layout[stage]:
            figure.add_vrect(
                x0=start * step,
                x1=100 if end is None else end * step,
                fillcolor=GRID,
                opacity=0.45,
                line_width=0,
                layer="below",
                annotation={"text": stage, "font": {"size": 11, "color": MUTED}, "yanchor": "bottom", "y": 1.0},
                annotation_position="top",
            )


def _figure(anchor: str, title: str, reading: str, plot: go.Figure, quantity: StageQuantity) -> Figure:
    if quantity.logarithmic:
        scale_y(plot)
    else:
        plot.update_yaxes(rangemode="tozero")
    return Figure(anchor=anchor, title=title, caption=reading, plot=plot)
