"""The two ways to draw a quantity of every layer and recurrence as lines (method: the layouts by layer and by
recurrence)."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray
from numpy.typing import NDArray

from loopscope.drawing import powers_of_two
from loopscope.report.axes import add_floor, add_stages, mark_vertical, scale_y
from loopscope.report.material import Material, median_over_prompts, positive
from loopscope.report.style import base_figure, layer_colours, named_in_legend, ordered_colours

__all__ = ["by_layer", "by_recurrence"]


def by_layer(material: Material, name: str, y_title: str, *, ribbon: bool = True, floor: bool = False) -> go.Figure:
    """A line per recurrent layer over the recurrences: medians over prompts. The ribbon spans the middle 90 % of
    the tokens at the last layer. A vertical line marks the trained number of recurrences; `floor` adds the rounding
    floor."""
    figure = base_figure("recurrences", y_title)
    counts = material.counts
    if ribbon:
        _add_ribbon(figure, material, name, counts)
    curve = material.curve(name)
    for layer, colour in enumerate(layer_colours(material.recurrent)):
        values = curve.values[layer]
        figure.add_scatter(
            x=counts,
            y=positive(values),
            name=f"layer {layer}",
            mode="lines" if len(counts) > 1 else "markers",
            line={"color": colour, "width": 2},
            showlegend=named_in_legend(layer, material.recurrent),
            hovertemplate="%{y:.3g}",
        )
    if floor:
        add_floor(figure, material)
    scale_y(figure)
    trained = material.view.trained
    if trained is not None and trained <= material.view.recurrences:
        mark_vertical(figure, trained, f"trained: {trained}")
    return figure


def by_recurrence(material: Material, values: xarray.DataArray, y_title: str) -> go.Figure:
    """A line per recurrence over relative depth; recurrences are picked at powers of two, later ones lighter.

    `values` has dimensions (layer, recurrence), all recurrences.
    """
    figure = base_figure("relative depth (% of prelude, block and coda)", y_title, hovermode="closest")
    picked = powers_of_two(values.sizes["recurrence"])
    depth = [material.depth_percent(layer) for layer in range(material.recurrent)]
    add_stages(figure, material)
    for count, colour in zip(picked, ordered_colours(len(picked)), strict=True):
        line = values.isel(recurrence=count - 1).values
        if not np.isfinite(line).any():
            continue
        figure.add_scatter(
            x=depth,
            y=positive(line),
            name=f"{count}",
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 6},
            hovertemplate=f"recurrence {count}, layer %{{pointNumber}}: %{{y:.3g}}<extra></extra>",
        )
    figure.update_xaxes(range=[0, 102])
    figure.update_layout(legend_title={"text": "recurrence", "font": {"size": 12}})
    scale_y(figure)
    return figure


def _add_ribbon(figure: go.Figure, material: Material, name: str, counts: NDArray[np.int64]) -> None:
    quantiles = material.shown[f"{name}_quantile"].isel(layer=-1, recurrence=counts - 1)
    edges = [median_over_prompts(quantiles.sel(quantile=level, drop=True)).values for level in (0.05, 0.95)]
    low, high = (positive(edge) for edge in edges)
    shown = np.isfinite(low) & np.isfinite(high)
    shared: dict[str, Any] = {"x": counts[shown], "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_scatter(y=low[shown], showlegend=False, **shared)
    figure.add_scatter(
        y=high[shown],
        fill="tonexty",
        fillcolor="rgba(91,95,102,0.16)",
        name="90 % of tokens",
        **shared,
    )
