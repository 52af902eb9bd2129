"""Figures: the token norm in the three layouts: by depth, by recurrence, by layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from loopscope.report.axes import add_stages
from loopscope.report.figure import Figure, Section
from loopscope.report.lines import by_layer
from loopscope.report.material import Material, median_over_prompts
from loopscope.report.style import CATEGORIES, MUTED, base_figure, ordered_colours

__all__ = ["norms_section"]


def norms_section(material: Material) -> Section:
    """How large the residual stream is, visit by visit."""
    figures = []
    if "visit_norm" in material.shown:
        labels = [str(label) for label in material.shown["visit"].values]
        norms = median_over_prompts(material.shown["visit_norm"]).values.astype(np.float32)
        figures.append(_by_depth(material, labels, norms))
        if material.view.looped:
            figures.append(_by_recurrence(material, labels, norms))
    if material.view.looped:
        figures.append(
            Figure(
                anchor="norm-by-layer",
                title="By layer: over the recurrences",
                caption="A line per recurrent layer, over all recurrences measured.",
                plot=by_layer(material, "residual_norm", "token norm"),
            )
        )
    lead = "Mean token norm of the residual stream, median over prompts."
    if material.view.looped:
        lead += " The same quantity laid out in three ways."
    return Section(
        anchor="norms", short="Norms", title="How large is the residual stream?", lead=lead, figures=figures, columns=3
    )


def _by_depth(material: Material, labels: list[str], norms: np.ndarray) -> Figure:
    figure = base_figure("layer application, in order", "token norm", hovermode="closest", showlegend=False)
    figure.update_yaxes(rangemode="tozero")
    figure.add_scatter(
        x=np.arange(1, len(labels) + 1),
        y=norms,
        mode="lines+markers",
        line={"color": CATEGORIES[0], "width": 2},
        marker={"size": 5},
        customdata=labels,
        hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
    )
    for index, label in enumerate(labels):
        previous = labels[index - 1].split("@") if index else [label]
        if index and (label.split("@")[1:] != previous[1:] or label.split(".")[0] != previous[0].split(".")[0]):
            figure.add_vline(x=index + 0.5, line={"color": MUTED, "width": 0.75, "dash": "dot"})
    return Figure(
        anchor="norm-by-depth",
        title="By depth: one line through every visit",
        caption="Every application of a layer in order"
        + ("; dotted lines part prelude, recurrences and coda." if material.view.looped else "."),
        plot=figure,
    )


def _by_recurrence(material: Material, labels: list[str], norms: np.ndarray) -> Figure:
    figure = base_figure("relative depth (% of prelude, block and coda)", "token norm", hovermode="closest")
    add_stages(figure, material)
    total = material.prelude + material.recurrent + material.coda
    recurrences = sum(label.startswith("recurrent.0@") for label in labels)
    for recurrence, colour in enumerate(ordered_colours(recurrences)):
        rows = [index for index, label in enumerate(labels) if label.endswith(f"@{recurrence}")]
        depth = [material.depth_percent(layer) for layer in range(len(rows))]
        _add_line(figure, depth, norms[rows], str(recurrence + 1), colour, f"recurrence {recurrence + 1}")
    for stage, start in (("prelude", 0), ("coda", material.prelude + material.recurrent)):
        rows = [index for index, label in enumerate(labels) if label.startswith(f"{stage}.")]
        if rows:
            depth = [100 * (start + layer + 1) / total for layer in range(len(rows))]
            _add_line(figure, depth, norms[rows], stage, CATEGORIES[3], stage)
    figure.update_xaxes(range=[0, 102])
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(legend_title={"text": "recurrence", "font": {"size": 12}})
    return Figure(
        anchor="norm-by-recurrence",
        title="By recurrence: along the depth of one pass",
        caption="A line per pass through the block, later ones lighter. Lines that coincide: every pass does the same.",
        plot=figure,
    )


def _add_line(figure: go.Figure, depth: list[float], norms: np.ndarray, name: str, colour: str, what: str) -> None:
    figure.add_scatter(
        x=depth,
        y=norms,
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 6},
        hovertemplate=f"{what}: %{{y:.3g}}<extra></extra>",
    )
