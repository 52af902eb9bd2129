"""Figures: shares of the kinds as maps, by layer, by token role, over two settings, and of one kind given another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import percent, significant, visible
from loopscope.answers.rates import KindShare
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.report.figures._old import Figure, base_figure
from loopscope.report.figures.look import KIND_LOOKS, MUTED, SEQUENTIAL, kind_label

_LEAST = 2e-5
"""Left end of the axis unless an interval reaches further: 1 token in 50,000."""
_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1)
_ROW = 46
"""CSS pixels of a kind."""

_MOST_TEXTS = 12
"""Columns in whose cells there is room for a number."""
_QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_IN_CELL = 3
"""Kinds named in a cell of a sensitivity map."""


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """An orbit or a slider that may be the most extreme one."""

    label: str
    kind: Kind
    size: float
    """Amplitude of an orbit, speed of a slider, relative to the norm."""
    period: float
    path: NDArray[np.floating]
    """(time, 2), relative to the norm."""


def extremes(candidates: Sequence[Extreme]) -> list[Figure]:
    """The widest orbit and the fastest slider, as far as there are some."""
    figures = []
    for kind in (Kind.ORBIT, Kind.SLIDER):
        there = [each for each in candidates if each.kind is kind and math.isfinite(each.size)]
        if there:
            figures.append(_drawn(max(there, key=lambda each: each.size), len(there)))
    return figures


def _drawn(extreme: Extreme, among: int) -> Figure:
    x, y = extreme.path.astype(np.float32).T
    colour = KIND_LOOKS[extreme.kind].colour
    figure = base_figure("1st component / norm", "2nd component / norm", hovermode="closest", showlegend=False)
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines+markers",
        line={"color": "#B9BDC4", "width": 1},
        marker={"color": colour, "size": 5},
        text=[f"{len(x) - 1 - time} before the end" for time in range(len(x))],
        hovertemplate="recurrence %{text}<extra></extra>",
    )
    figure.add_scatter(
        x=x[-1:], y=y[-1:], mode="markers", marker={"color": colour, "size": 12, "symbol": "star"}, hoverinfo="skip"
    )
    figure.update_yaxes(scaleanchor="x")
    orbit = extreme.kind is Kind.ORBIT
    if orbit:
        numbers = f"amplitude {percent(extreme.size)} of the norm, period {significant(extreme.period, 3)} recurrences"
    else:
        numbers = f"{percent(extreme.size)} of the norm per recurrence"
    rank = f"the most of {among:,}" if among > 1 else "the only one"
    return Figure(
        anchor=f"extreme-{extreme.kind}",
        title="The widest orbit" if orbit else "The fastest slider",
        caption=f"{visible(extreme.label, 80)}: {numbers}; {rank}. Each point is a state of the "
        "tail, in the plane in which it moves most; the star is the last one.",
        plot=figure,
    )


@dataclass(frozen=True, kw_only=True)
class ShareSeries:
    """Shares of all kinds among one sort of thing, by one method."""

    name: str
    shares: Sequence[KindShare]
    square: bool = False
    """Drawn as squares rather than circles."""
    hollow: bool = False


def shares_figure(series: Sequence[ShareSeries], caption: str, things: str = "tokens") -> Figure:
    """Shares of the kinds that any series has, with their intervals, on a logarithmic axis."""
    kinds = [share.kind for share in series[0].shares]
    there = [kind for place, kind in enumerate(kinds) if any(each.shares[place].count for each in series)] or kinds[:1]
    figure = base_figure("share (logarithmic)", "", hovermode="closest")
    for place, each in enumerate(series):
        _add(figure, each, [kinds.index(kind) for kind in there], 0.18 * ((len(series) - 1) / 2 - place))
    lows = [_LEAST, *(0.7 * share.interval[0] for each in series for share in each.shares if share.count)]
    low = min(value for value in lows if value > 0)
    ticks = [tick for tick in _TICKS if tick >= low]
    figure.update_xaxes(
        type="log",
        tickvals=ticks,
        ticktext=[f"{100 * tick:g} %" for tick in ticks],
        range=[math.log10(low), 0.15],
        showgrid=True,
    )
    figure.update_yaxes(
        tickvals=list(range(len(there))),
        ticktext=[kind_label(kind) for kind in there],
        range=[len(there) - 0.5, -0.5],
        ticks="",
        showgrid=False,
    )
    return Figure(
        anchor="behaviour-shares",
        title=f"How many {things} tend to what?",
        caption=caption,
        plot=figure,
        height=150 + max(2, len(there)) * _ROW,
    )


def share_label(share: KindShare) -> str:
    """`12 of 4,000, 0.30 % (0.16 % to 0.52 %)`."""
    low, high = share.interval
    return f"{share.count:,} of {share.total:,}, {percent(share.share)} ({percent(low)} to {percent(high)})"


def _add(figure: go.Figure, series: ShareSeries, places: list[int], shift: float) -> None:
    """One marker a kind; of a kind that none has, the highest share that the interval allows, as an arrow."""
    symbol = "square" if series.square else "circle"
    for row, place in enumerate(places):
        share = series.shares[place]
        if not share.total:
            continue
        low, high = share.interval
        at = share.share if share.count else high
        colour = KIND_LOOKS[share.kind].colour
        figure.add_scatter(
            x=[at],
            y=[row - shift],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [high - at],
                "arrayminus": [at - low if share.count else 0],
                "thickness": 1.5,
                "width": 3,
            },
            mode="markers",
            marker={
                "symbol": (symbol if share.count else "triangle-left") + ("-open" if series.hollow else ""),
                "size": 9,
                "color": colour,
                "line": {"width": 2, "color": colour},
            },
            showlegend=False,
            hovertemplate=f"{series.name}, {share.kind}: {share_label(share)}<extra></extra>",
        )
    figure.add_scatter(
        x=[None],
        y=[None],
        name=series.name,
        mode="markers",
        marker={
            "symbol": symbol + ("-open" if series.hollow else ""),
            "size": 9,
            "color": MUTED,
            "line": {"width": 2, "color": MUTED},
        },
    )


def share_map(
    columns: Mapping[str, Sequence[KindShare]], *, anchor: str, title: str, caption: str, x_title: str
) -> Figure:
    """Shares of the kinds that occur, a column each group; the colours are even in the square root, as rare kinds are
    what is looked for."""
    there = [place for place in range(len(KINDS)) if any(shares[place].count for shares in columns.values())] or [0]
    shares = [[column[place] for column in columns.values()] for place in there]
    values = np.array([[share.share for share in row] for row in shares], dtype=np.float64)
    return _map(
        values,
        list(columns),
        [KINDS[place] for place in there],
        [[share_label(share) if share.total else "no such token" for share in row] for row in shares],
        anchor=anchor,
        title=title,
        caption=caption,
        x_title=x_title,
    )


def co_occurrence_map(values: NDArray[np.float64], caption: str) -> Figure | None:
    """P(column at some layer | row at some layer) of one token; None where there is but one kind to speak of."""
    there = np.flatnonzero(np.isfinite(values).any(1))
    if len(there) < 2:
        return None
    shown = values[np.ix_(there, there)]
    kinds = [KINDS[place] for place in there]
    texts = [
        [f"of the tokens with {mine} at some layer, {percent(value)} have {its} at some layer" for its, value in pairs]
        for mine, pairs in ((kind, list(zip(kinds, row, strict=True))) for kind, row in zip(kinds, shown, strict=True))
    ]
    return _map(
        shown,
        [KIND_LOOKS[kind].letter for kind in kinds],
        kinds,
        texts,
        anchor="behaviour-co-occurrence",
        title="Which kinds do different layers show of the same token?",
        caption=caption,
        x_title="also at some layer",
        y_title="at some layer",
    )


def sensitivity_map(counts: xarray.DataArray, names: Sequence[str], chosen: Sequence[float], method: str) -> Figure:
    """Shares over a grid of two settings, `counts` with dimensions (setting, setting_other, kind)."""
    first, second = (str(dim) for dim in counts.dims[:2])
    total = counts.values.sum(-1, keepdims=True)
    shares = counts.values / np.maximum(total, 1)
    at = [_nearest(counts[dim].values, value) for dim, value in zip((first, second), chosen, strict=True)]
    common = int(shares[at[0], at[1]].argmax())
    figure = base_figure(names[1].replace("_", " "), names[0].replace("_", " "), hovermode="closest")
    figure.add_heatmap(
        z=shares[..., common],
        zmin=0,
        zmax=1,
        text=[[_cell(shares[row, column]) for column in range(shares.shape[1])] for row in range(shares.shape[0])],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=[[_all(shares[row, column]) for column in range(shares.shape[1])] for row in range(shares.shape[0])],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=SEQUENTIAL,
        colorbar=_bar(str(KINDS[common]), _QUARTERS, _QUARTERS),
        xgap=2,
        ygap=2,
    )
    figure.add_shape(
        type="rect",
        x0=at[1] - 0.48,
        x1=at[1] + 0.48,
        y0=at[0] - 0.48,
        y1=at[0] + 0.48,
        line={"color": KIND_LOOKS[Kind.ORBIT].colour, "width": 3},
    )
    for axis, dim in ((figure.update_xaxes, second), (figure.update_yaxes, first)):
        values = [float(value) for value in counts[dim].values]
        axis(tickvals=list(range(len(values))), ticktext=[f"{value:g}" for value in values], ticks="", showgrid=False)
    return Figure(
        anchor=f"sensitivity-{method}",
        title=f"How much hangs on the thresholds of the method {method}?",
        caption=(
            f"Every token judged again with other values of two settings. The colour is the share of {KINDS[common]}, "
            "a cell gives the commonest kinds by their letters, in percent, and the frame marks the values that were "
            "used. Cells alike around the frame: the verdicts do not hang on the choice."
        ),
        plot=figure,
        height=420,
    )


def _map(
    values: NDArray[np.float64],
    columns: Sequence[str],
    kinds: Sequence[Kind],
    texts: Sequence[Sequence[str]],
    *,
    anchor: str,
    title: str,
    caption: str,
    x_title: str,
    y_title: str = "",
) -> Figure:
    figure = base_figure(x_title, y_title, hovermode="closest")
    wide = len(columns) > _MOST_TEXTS
    ticks = [0.0, 0.01, 0.1, 0.25, 0.5, 1.0]
    figure.add_heatmap(
        z=np.sqrt(values),
        zmin=0,
        zmax=1,
        x=list(range(len(columns))),
        y=list(range(len(kinds))),
        text=None if wide else [[_short(value) for value in row] for row in values],
        texttemplate=None if wide else "%{text}",
        textfont={"size": 11},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=SEQUENTIAL,
        colorbar=_bar("tokens", [tick**0.5 for tick in ticks], ticks),
        xgap=1,
        ygap=1,
    )
    every = max(1, len(columns) // 16)
    figure.update_xaxes(
        tickvals=list(range(0, len(columns), every)),
        ticktext=list(columns)[::every],
        ticks="",
        showgrid=False,
        # Plotly forgets the labels of so low a map when it makes room for its colours, and would write across them.
        title={"standoff": 36},
    )
    figure.update_yaxes(
        tickvals=list(range(len(kinds))),
        ticktext=[kind_label(kind) for kind in kinds],
        autorange="reversed",
        ticks="",
        showgrid=False,
    )
    return Figure(
        anchor=anchor, title=title, caption=caption, plot=figure, height=max(240, min(460, 180 + 40 * len(kinds)))
    )


def _bar(title: str, places: Sequence[float], values: Sequence[float]) -> dict[str, object]:
    return {
        "title": {"text": f"share of {title}, percent", "side": "top", "font": {"size": 12}},
        "orientation": "h",
        "y": 1.0,
        "yref": "paper",
        "yanchor": "bottom",
        "xpad": 0,
        "thickness": 12,
        "outlinewidth": 0,
        "tickvals": list(places),
        "ticktext": [f"{100 * value:g}" for value in values],
    }


def _short(share: float) -> str:
    """Percent, without the sign: there is little room in a cell."""
    return significant(100 * share) if np.isfinite(share) else ""


def _cell(shares: NDArray[np.float64]) -> str:
    """`F 98` and so on, in percent, the commonest kinds first."""
    order = [place for place in np.argsort(-shares, kind="stable")[:_IN_CELL] if shares[place] > 0]
    return "<br>".join(f"{KIND_LOOKS[KINDS[place]].letter} {_short(float(shares[place]))}" for place in order)


def _all(shares: NDArray[np.float64]) -> str:
    return "<br>".join(
        f"{kind}: {percent(float(share))}" for kind, share in zip(KINDS, shares, strict=True) if share > 0
    )


def _nearest(values: NDArray[np.floating], value: float) -> int:
    return int(np.abs(values - value).argmin())
