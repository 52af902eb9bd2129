"""Figures: one point or many?"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loopscope._util.sites import stage_name, stage_starts
from loopscope.report.figures.curves import Material
from loopscope.report.figures.in_plotly import lines_across
from loopscope.report.figures.look import SEQUENTIAL, base_figure
from loopscope.report.figures.plot import Figure, Section
from loopscope.study import median_over_prompts

_MOST_NUMBERS = 8


def similarity_section(material: Material) -> Section:
    """Cosines between layers at the horizon, and between all visits of the first recurrences."""
    figures = []
    if material.view.looped:
        figures.append(_layers(material))
    if "cycle_similarity" in material.shown:
        figures.append(_visits(material))
    return Section(
        anchor="points",
        short="Points",
        title="One point or many?" if material.view.looped else "How similar are the layers?",
        lead="Cosines of residual streams, token by token, then averaged over tokens and prompts.",
        figures=figures,
    )


def _layers(material: Material) -> Figure:
    cosine = median_over_prompts(material.shown["layer_cosine"]).transpose("layer", "layer_other").values
    names = [str(layer) for layer in range(material.recurrent)]
    figure = _heat_map(cosine, names, "recurrent layer", "recurrent layer")
    if material.recurrent <= _MOST_NUMBERS:
        figure.update_traces(texttemplate="%{z:.2f}", textfont={"size": 12})
    return Figure(
        anchor="layer-cosine",
        title="Do the layers share one point?",
        caption=(
            "Cosine between the layers' states at the horizon, median over prompts. All near 1: every layer ends "
            "at the same point and the cycle is no cycle. Otherwise each layer has its own."
        ),
        plot=figure,
        height=420,
    )


def _visits(material: Material) -> Figure:
    labels = [str(label) for label in material.shown["visit"].values]
    if material.view.looped:
        title = "Does every pass through the block repeat the last one?"
        reading = (
            "White lines part the stages and recurrences. Diagonal stripes: the pass repeats itself layer by layer. "
            "One bright square: all layers agree."
        )
    else:
        title = "How does the residual stream turn?"
        reading = "Bright squares: layers that leave its direction as it is."
    return Figure(
        anchor="cycle-similarity",
        title=title,
        caption=f"Cosine between the residual streams of every two visits, in order of realised depth. {reading}",
        plot=visits_map(material.shown["cycle_similarity"].values, labels, "cosine", highest=1.0),
        height=420,
    )


def visits_map(
    values: NDArray[np.floating],
    labels: list[str],
    what: str,
    *,
    lowest: float | None = None,
    highest: float | None = None,
) -> go.Figure:
    """A heat map of visits x visits, with white lines where a stage or a recurrence begins."""
    figure = _heat_map(values, labels, "visit", "visit", what=what, lowest=lowest, highest=highest)
    edges = stage_starts(labels)
    between = [edge - 0.5 for edge in edges[1:]]
    lines_across(figure, {"color": "white", "width": 1.5}, x=between, y=between)
    middles = [(start + end - 1) / 2 for start, end in zip(edges, [*edges[1:], len(labels)], strict=True)]
    names = [stage_name(labels[start]) for start in edges]
    figure.update_traces(
        x=None,
        y=None,
        customdata=np.array([[[a, b] for b in labels] for a in labels]),
        hovertemplate=f"%{{customdata[0]}}<br>%{{customdata[1]}}<br>{what} %{{z:.3f}}<extra></extra>",
    )
    figure.update_xaxes(type="linear", tickmode="array", tickvals=middles, ticktext=names, ticks="", tickangle=-90)
    figure.update_yaxes(type="linear", tickmode="array", tickvals=middles, ticktext=names, ticks="")
    return figure


def _heat_map(
    values: NDArray[np.floating],
    names: list[str],
    x_title: str,
    y_title: str,
    *,
    what: str = "cosine",
    lowest: float | None = None,
    highest: float | None = 1.0,
) -> go.Figure:
    """Colours from the least value (at most 0) to the largest, unless told otherwise."""
    figure = base_figure(x_title, y_title, hovermode="closest")
    shown = values.astype(np.float32)
    finite = shown[np.isfinite(shown)]
    figure.add_heatmap(
        z=shown,
        x=names,
        y=names,
        zmin=float(min(0.0, finite.min(initial=0.0))) if lowest is None else lowest,
        zmax=float(finite.max(initial=0.0)) if highest is None else highest,
        colorscale=SEQUENTIAL,
        colorbar={"title": {"text": what, "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 0.9},
        hovertemplate="%{x} and %{y}: %{z:.3f}<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain", showgrid=False)
    figure.update_xaxes(constrain="domain")
    if names and names[0].isdigit():
        ticks = list(range(0, len(names), -(-len(names) // 12)))
        figure.update_xaxes(type="category", tickvals=ticks, tickangle=0)
        figure.update_yaxes(type="category", tickvals=ticks)
    return figure
