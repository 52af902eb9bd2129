"""A quantity of every visit, laid out by depth (one line through all visits) and by recurrence (a line per pass)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loopscope.drawing import Site
from loopscope.report.axes import add_stages, lines_across
from loopscope.report.material import Material
from loopscope.report.style import CATEGORIES, MUTED, base_figure, ordered_colours

__all__ = ["along_depth", "along_one_pass"]


def along_depth(values: NDArray[np.floating], sites: Sequence[Site], y_title: str) -> go.Figure:
    """One line through every visit, dotted lines where a stage or a recurrence begins."""
    figure = base_figure("layer application, in order", y_title, hovermode="closest", showlegend=False)
    figure.add_scatter(
        x=np.arange(1, len(sites) + 1),
        y=values.astype(np.float32),
        mode="lines+markers",
        line={"color": CATEGORIES[0], "width": 2},
        marker={"size": 5},
        customdata=[site.label for site in sites],
        hovertemplate="%{customdata}: %{y:.3g}<extra></extra>",
    )
    starts = [
        index + 0.5
        for index, (before, site) in enumerate(itertools.pairwise(sites), start=1)
        if (before.stage, before.recurrence) != (site.stage, site.recurrence)
    ]
    lines_across(figure, {"color": MUTED, "width": 0.75, "dash": "dot"}, x=starts)
    return figure


def along_one_pass(
    material: Material, values: NDArray[np.floating], sites: Sequence[Site], y_title: str, recurrences: Sequence[int]
) -> go.Figure:
    """A line per chosen recurrence (from 0) over relative depth, later ones lighter, beside prelude and coda."""
    figure = base_figure("relative depth (% of prelude, block and coda)", y_title, hovermode="closest")
    add_stages(figure, material)
    total = material.prelude + material.recurrent + material.coda
    for recurrence, colour in zip(recurrences, ordered_colours(len(recurrences)), strict=True):
        rows = [
            index for index, site in enumerate(sites) if site.stage == "recurrent" and site.recurrence == recurrence
        ]
        depth = [material.depth_percent(layer) for layer in range(len(rows))]
        _add_line(figure, depth, values[rows], str(recurrence + 1), colour, f"recurrence {recurrence + 1}")
    for stage, start in (("prelude", 0), ("coda", material.prelude + material.recurrent)):
        rows = [index for index, site in enumerate(sites) if site.stage == stage]
        if rows:
            depth = [100 * (start + layer + 1) / total for layer in range(len(rows))]
            _add_line(figure, depth, values[rows], stage, CATEGORIES[3], stage)
    figure.update_xaxes(range=[0, 102])
    figure.update_layout(legend_title={"text": "recurrence", "font": {"size": 12}})
    return figure


def _add_line(
    figure: go.Figure, depth: list[float], values: NDArray[np.floating], name: str, colour: str, what: str
) -> None:
    figure.add_scatter(
        x=depth,
        y=values.astype(np.float32),
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 6},
        hovertemplate=f"{what}: %{{y:.3g}}<extra></extra>",
    )
