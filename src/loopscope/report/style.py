"""Colours and the plain layout that all figures share.

Categories use the palette of Okabe and Ito ("Color Universal Design", 2008), which readers with any common colour
vision tell apart; its yellow is left out, being too faint on white. Ordered quantities use cividis (Nuñez, Anderton
and Renslow, PLOS ONE 13, 2018), and ordered lines one blue from dark to light.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

__all__ = [
    "CATEGORIES",
    "GRID",
    "INK",
    "MUTED",
    "SEQUENTIAL",
    "base_figure",
    "layer_colours",
    "named_in_legend",
    "ordered_colours",
]

CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#1C1D21")
SEQUENTIAL = "Cividis"
INK, MUTED, GRID = "#1C1D21", "#5B5F66", "#E6E8EB"

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_MOST_NAMES = 12
# The dark end of cividis to where it is still seen as a line on white.
_LINES = ["rgb(0, 34, 78)", "rgb(124, 123, 120)", "rgb(217, 180, 48)"]
_BLUES = ["rgb(8, 48, 107)", "rgb(55, 135, 192)", "rgb(171, 207, 232)"]


def layer_colours(count: int) -> list[str]:
    """One colour a layer: categories as long as they last, then an ordered scale."""
    if count <= len(CATEGORIES):
        return list(CATEGORIES[:count])
    return list(sample_colorscale(_LINES, [index / (count - 1) for index in range(count)]))


def named_in_legend(layer: int, layers: int) -> bool:
    """In a legend of many layers only the first, the middle and the last are named."""
    return layers <= _MOST_NAMES or layer in (0, layers // 2, layers - 1)


def ordered_colours(count: int) -> list[str]:
    """Dark to light: later is lighter."""
    return list(sample_colorscale(_BLUES, [index / max(1, count - 1) for index in range(count)]))


def base_figure(x_title: str, y_title: str, **layout: Any) -> go.Figure:
    """An empty figure with named axes, the legend below. Entries of `layout` replace those of plotly's layout here."""
    axis = {
        "gridcolor": GRID,
        "linecolor": "#B9BDC4",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#B9BDC4",
        "tickfont": {"size": 12},
        "automargin": True,
        "exponentformat": "power",
    }
    title = {"standoff": 8, "font": {"size": 13}}
    shared: dict[str, Any] = {
        "font": {"family": _FONT, "size": 12.5, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 8, "r": 12, "t": 18, "b": 8},
        "xaxis": {**axis, "title": {**title, "text": x_title}, "showgrid": False},
        "yaxis": {**axis, "title": {**title, "text": y_title}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "traceorder": "normal",
            "font": {"size": 12},
        },
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#B9BDC4", "font": {"family": _FONT, "size": 12}},
    }
    figure = go.Figure(layout={**shared, **layout})
    figure.layout.template = None  # plotly's own, which it fills in unless told otherwise
    return figure
