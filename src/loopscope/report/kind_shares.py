"""Figures: how many tokens, and how many prompts, tend to what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from loopscope.answers.wording import percent
from loopscope.rates import KindShare
from loopscope.report.figure import Figure
from loopscope.report.kinds import KIND_LOOKS, kind_label
from loopscope.report.style import MUTED, base_figure

__all__ = ["ShareSeries", "share_label", "shares_figure"]

_LEAST = 2e-5
"""Left end of the axis unless an interval reaches further: 1 token in 50,000."""
_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1)
_ROW = 46
"""CSS pixels of a kind."""


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
