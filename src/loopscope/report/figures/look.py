"""Colours and the plain layout that all figures share. Maps use cividis (Nuñez, Anderton and Renslow, PLOS ONE 13,
2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from loopscope.dynamics.prediction import PredictedKind as Predicted
from loopscope.dynamics.verdicts import KINDS, Kind

CATEGORIES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#1C1D21")
INK, MUTED, GRID = "#1C1D21", "#5B5F66", "#E6E8EB"
BAND = 0.16
"""Opacity of the grey (`MUTED`) of a band: lines and grid are still seen through it."""

_MOST_NAMES = 12
# From the dark end of cividis to where it is still seen as a line on white.
_LINES = ((0, 34, 78), (124, 123, 120), (217, 180, 48))
_BLUES = ((8, 48, 107), (55, 135, 192), (171, 207, 232))

SEQUENTIAL = "Cividis"

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def layer_colours(count: int) -> list[str]:
    """One colour a layer: categories as long as they last, then an ordered scale."""
    return list(CATEGORIES[:count]) if count <= len(CATEGORIES) else _sampled(_LINES, count)


def named_in_legend(layer: int, layers: int) -> bool:
    """In a legend of many layers only the first, the middle and the last are named."""
    return layers <= _MOST_NAMES or layer in (0, layers // 2, layers - 1)


def ordered_colours(count: int) -> list[str]:
    """Dark to light: later is lighter."""
    return _sampled(_BLUES, count)


def _sampled(stops: Sequence[tuple[int, int, int]], count: int) -> list[str]:
    """So many colours evenly along straight lines between the stops, as #RRGGBB."""
    at = np.linspace(0, len(stops) - 1, count) if count > 1 else np.zeros(count)
    channels = [np.interp(at, range(len(stops)), [stop[channel] for stop in stops]).round() for channel in range(3)]
    return [f"#{int(red):02X}{int(green):02X}{int(blue):02X}" for red, green, blue in zip(*channels, strict=True)]


@dataclass(frozen=True, slots=True)
class KindLook:
    """Of one kind."""

    colour: str
    on_colour: str
    """Of a letter on that colour."""
    letter: str
    symbol: str
    """Plotly's name of a marker; its open form is `<symbol>-open`."""
    meaning: str
    """In a few words, for legends."""


KIND_LOOKS: dict[Kind, KindLook] = {
    Kind.FIXED_POINT: KindLook("#0072B2", "#FFFFFF", "F", "circle", "approaches one point, or rests there"),
    Kind.AT_FLOOR: KindLook("#56B4E9", "#1C1D21", "A", "square", "what is left of its motion looks like rounding"),
    Kind.ORBIT: KindLook("#D55E00", "#FFFFFF", "O", "diamond", "returns to the same states"),
    Kind.SLIDER: KindLook("#CC79A7", "#1C1D21", "S", "triangle-right", "moves on in one direction without a limit"),
    Kind.BOUNDED: KindLook("#E69F00", "#1C1D21", "B", "pentagon", "keeps moving within bounds, without a period"),
    Kind.DIVERGING: KindLook("#1C1D21", "#FFFFFF", "D", "triangle-up", "moves away faster and faster"),
    Kind.UNKNOWN: KindLook("#8A8F98", "#1C1D21", "?", "x", "the trajectory does not tell"),
}


def kind_label(kind: Kind) -> str:
    """As on an axis: `orbit (O)`."""
    return f"{kind} ({KIND_LOOKS[kind].letter})"


def looks_for_script() -> list[dict[str, str]]:
    """In the order of `KINDS`, for scripts of the page."""
    return [
        {
            "name": str(kind),
            "colour": KIND_LOOKS[kind].colour,
            "on": KIND_LOOKS[kind].on_colour,
            "letter": KIND_LOOKS[kind].letter,
            "meaning": KIND_LOOKS[kind].meaning,
        }
        for kind in KINDS
    ]


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


PREDICTED_LOOKS: dict[Predicted, tuple[str, str]] = {
    Predicted.FIXED_POINT: (KIND_LOOKS[Kind.FIXED_POINT].colour, "circle"),
    Predicted.DAMPED_ROTATION: (KIND_LOOKS[Kind.AT_FLOOR].colour, "circle"),
    Predicted.SLIDER: (KIND_LOOKS[Kind.SLIDER].colour, "triangle-right"),
    Predicted.ORBIT: (KIND_LOOKS[Kind.ORBIT].colour, "diamond"),
    Predicted.PERIOD_TWO: (KIND_LOOKS[Kind.BOUNDED].colour, "diamond"),
    Predicted.UNSTABLE: (KIND_LOOKS[Kind.DIVERGING].colour, "triangle-up"),
    Predicted.FAR: (KIND_LOOKS[Kind.UNKNOWN].colour, "x-thin-open"),
    Predicted.UNRESOLVED: (KIND_LOOKS[Kind.UNKNOWN].colour, "x"),
}
"""Colour, and plotly's name of a marker."""
