"""The page's figures until each is a `Plot`: goes when the last one is."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import plotly.graph_objects as go
import xarray
from markupsafe import Markup
from numpy.typing import NDArray

from loopscope._util.sites import Site
from loopscope._util.wording import significant, visible
from loopscope.report.figures.look import (
    CATEGORIES,
    GRID,
    INK,
    MUTED,
    PAGE_FONT,
    layer_colours,
    named_in_legend,
    ordered_colours,
)
from loopscope.report.figures.plot import script_text
from loopscope.report.settings import ReportSettings
from loopscope.study import Readings, Study, median_over_prompts, positive, powers_of_two, read_study


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot of the report."""

    template: ClassVar[str] = "old_plot.html"

    anchor: str
    """Unique on the page; answers link to it."""
    title: str
    """What it asks or shows, in a sentence."""
    caption: str
    """How to read it."""
    plot: go.Figure
    height: int = 340
    """In CSS pixels."""
    picks: str = ""
    """The stage of whose heads a click picks one: the plot's custom data begin with layer and head."""

    @property
    def has_data(self) -> bool:
        """Whether there is a finite number to draw: a study whose prompts diverged has figures without any."""
        drawn = (trace.z if "z" in trace else trace.y for trace in self.plot.data)
        return any(bool(np.isfinite(np.asarray(values, dtype=np.float64)).any()) for values in drawn)

    @property
    def json(self) -> Markup:
        """The plot for a script element: no character in it can end the element, or start another."""
        return script_text(str(self.plot.to_json()))


def plot_text(text: str, longest: int = 40) -> str:
    """A text from outside (a token, a prompt, a name) for plotly, which reads a little HTML: escaped, white space
    made visible, cut to `longest` characters."""
    return html.escape(visible(text, longest), quote=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Material(Readings):
    """A study as the report's figures need it."""

    settings: ReportSettings

    @property
    def counts(self) -> NDArray[np.int64]:
        """The recurrences to draw, counted from 1: all of them, or a selection that is denser at the start."""
        total, most = self.view.recurrences, self.settings.most_recurrences
        if total <= most:
            return np.arange(1, total + 1)
        spaced = np.geomspace(1, total, most)
        return np.unique(np.concatenate([np.arange(1, most // 4), spaced.round().astype(np.int64)]))

    def curve(self, name: str) -> xarray.DataArray:
        """Median over prompts of a variable, at the recurrences to draw: dimensions (layer, recurrence)."""
        return median_over_prompts(self.shown[name].isel(recurrence=self.counts - 1)).transpose("layer", "recurrence")


def gather_material(study: Study, settings: ReportSettings) -> Material:
    """Raises `StudyError` for a study that lacks what the quick answers need."""
    return Material(
        **{name: value for name, value in vars(read_study(study)).items() if name != "_medians"}, settings=settings
    )


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
        "font": {"family": PAGE_FONT, "size": 12.5, "color": INK},
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
        "hoverlabel": {"bgcolor": "white", "bordercolor": "#B9BDC4", "font": {"family": PAGE_FONT, "size": 12}},
    }
    figure = go.Figure(layout={**shared, **layout})
    figure.layout.template = None  # plotly's own, which it fills in unless told otherwise
    return figure


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
