"""Colours and the plain layout that all figures share. Maps use cividis (Nuñez, Anderton and Renslow, PLOS ONE 13,
2018)."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from loopscope.drawing import CATEGORIES, GRID, INK, MUTED, layer_colours, named_in_legend, ordered_colours

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

SEQUENTIAL = "Cividis"

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


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
