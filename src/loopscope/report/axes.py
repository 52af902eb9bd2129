"""What is put on axes: scales that fit the values, and named lines across a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from loopscope.answers.wording import significant
from loopscope.report.material import Material
from loopscope.report.style import GRID, MUTED

__all__ = ["add_floor", "add_stages", "lines_across", "mark_vertical", "scale_y"]

_LABEL = {"size": 11, "color": MUTED}


def scale_y(figure: go.Figure) -> None:
    """A logarithmic y axis where the values span more than a factor of 5, a linear one from 0 otherwise.

    Within two decades the ticks are 1, 2 and 5, beyond that powers of ten. Values of 0 have no place on a logarithm.
    """
    values = drawn_values(figure)
    values = values[values > 0]
    span = float(values.max() / values.min()) if values.size else 1.0
    if span <= 5:
        figure.update_yaxes(rangemode="tozero")
        return
    if span <= 100:
        powers = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
        return
    # About eight ticks. Plotly enlarges powers by a quarter; the smaller size brings them back to that of other ticks.
    step = max(1, round(math.log10(span) / 7))
    figure.update_yaxes(type="log", exponentformat="power", dtick=step, tickfont={"size": 9.6})


def add_floor(figure: go.Figure, material: Material) -> None:
    """A dotted line at the estimated rounding floor, where it was measured; a note where it lies so far below the
    curves that showing it would flatten them."""
    floor = material.shown["noise_floor"].values
    floor = floor[np.isfinite(floor) & (floor > 0)]
    lowest = drawn_values(figure)
    lowest = lowest[lowest > 0]
    if not floor.size or not lowest.size:
        return
    level = float(np.median(floor))
    if level < lowest.min() / 100:
        figure.add_annotation(
            x=0.01,
            xref="paper",
            xanchor="left",
            y=0,
            yref="paper",
            yanchor="bottom",
            text=f"rounding floor {significant(level)}, far below",
            showarrow=False,
            font=_LABEL,
        )
        return
    figure.add_scatter(
        x=material.counts[[0, -1]],
        y=[level, level],
        name="rounding floor",
        mode="lines",
        line={"color": MUTED, "width": 1.5, "dash": "dot"},
        hovertemplate="%{y:.2g}",
    )


def add_stages(figure: go.Figure, material: Material) -> None:
    """Names and shades the shares of the depth that prelude, block and coda take."""
    total = material.prelude + material.recurrent + material.coda
    start = 0.0
    for name, layers in (("prelude", material.prelude), ("block", material.recurrent), ("coda", material.coda)):
        end = start + 100 * layers / total
        if layers:
            figure.add_vrect(
                x0=start,
                x1=end,
                fillcolor=GRID if name != "block" else "rgba(0,0,0,0)",
                opacity=0.45,
                line_width=0,
                layer="below",
                annotation={"text": name, "font": _LABEL, "yanchor": "bottom", "y": 1.0},
                annotation_position="top",
            )
        start = end


def lines_across(
    figure: go.Figure, line: Mapping[str, Any], *, x: Iterable[float | int] = (), y: Iterable[float | int] = ()
) -> None:
    """Lines from edge to edge, vertical at each `x` and horizontal at each `y`.

    All at once: plotly's own `add_vline` looks through everything that the figure has, every time.
    """
    vertical = [{"x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "y domain"} for at in x]
    horizontal = [{"y0": at, "y1": at, "x0": 0, "x1": 1, "xref": "x domain"} for at in y]
    added = [{"type": "line", "line": dict(line), **ends} for ends in (*vertical, *horizontal)]
    figure.update_layout(shapes=[*figure.layout.shapes, *added])


def mark_vertical(figure: go.Figure, at: int, text: str, *, log: bool = False) -> None:
    """A dashed line across the figure, named above it. On a logarithmic axis annotations want the exponent, lines the
    value."""
    lines_across(figure, {"color": MUTED, "width": 1, "dash": "dash"}, x=[at])
    figure.add_annotation(
        x=math.log10(at) if log else at,
        y=1,
        yref="paper",
        yanchor="bottom",
        text=text,
        showarrow=False,
        font=_LABEL,
    )


def drawn_values(figure: go.Figure) -> NDArray[np.float64]:
    """The finite y values of all lines and markers, flat."""
    values = [np.asarray(trace.y, dtype=np.float64).ravel() for trace in figure.data]
    joined: NDArray[np.float64] = np.concatenate([np.empty(0), *values])
    return joined[np.isfinite(joined)]
