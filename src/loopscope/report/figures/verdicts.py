"""Shares of the kinds: by method, layer and role of the token, over two settings, and of one kind given another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import percent, significant
from loopscope.answers.behaviour import driven
from loopscope.answers.rates import KindShare, co_occurrence, token_shares, view_rates
from loopscope.dynamics.verdicts import KINDS, SETTLED_CODES, Kind
from loopscope.report.figures.examples import EXAMPLES
from loopscope.report.figures.look import KIND_LOOKS, MUTED, Symbol, kind_label
from loopscope.report.figures.plot import Axis, Dots, FigureType, Frame, HeatMap, Mark, Panel, Plot
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_LEAST = 2e-5
"""Left end of the axis unless an interval reaches further: 1 token in 50,000."""
_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
_ROW = 46
"""CSS pixels of a kind."""
_MOST_TEXTS = 12
"""Columns in whose cells there is room for a number."""
_IN_CELL = 3
"""Kinds named in a cell of a sensitivity map."""
_METHODS = ("displacement", "cosine")


# ---- shares with their intervals ----


@dataclass(frozen=True, kw_only=True)
class ShareSeries:
    """Shares of all kinds among one sort of thing, by one method."""

    name: str
    shares: Sequence[KindShare]
    square: bool = False
    """Drawn as squares rather than circles."""
    hollow: bool = False


def shares_plot(series: Sequence[ShareSeries], reading: str, things: str = "tokens") -> Plot:
    """Shares of the kinds that any series has, with their intervals, on a logarithmic axis."""
    kinds = [share.kind for share in series[0].shares]
    there = [kind for place, kind in enumerate(kinds) if any(each.shares[place].count for each in series)] or kinds[:1]
    lows = [_LEAST, *(0.7 * share.interval[0] for each in series for share in each.shares if share.count)]
    low = min(value for value in lows if value > 0)
    marks: list[Mark] = []
    for place, each in enumerate(series):
        shift = 0.18 * (place - (len(series) - 1) / 2)
        marks += _share_dots(each, [each.shares[kinds.index(kind)] for kind in there], shift)
    return Plot(
        question=f"How many {things} settle, orbit or move on?",
        reading=f"{reading} Marks are shares of the decided {things}. Bars are 95 % intervals, widened by all "
        f"undecided {things}. A triangle is the upper end of the interval of a kind that was not found.",
        panels=[
            Panel(
                x=Axis(
                    title="share (logarithmic)",
                    scale="log",
                    span=(low, 1.4),
                    ticks={tick: f"{100 * tick:g} %" for tick in _TICKS if tick >= low},
                    grid=True,
                ),
                y=_kinds_axis(there, grid=False),
                marks=marks,
                height=150 + max(2, len(there)) * _ROW,
            )
        ],
        anchor="behaviour-shares",
    )


def share_label(share: KindShare) -> str:
    """`12 of 4,000, 40 more may be, 0.30 % (0.16 % to 1.5 %)`."""
    low, high = share.interval
    more = f", {share.undecided:,} more may be" if share.undecided else ""
    shown = percent(share.share) if share.decided else "none is decided"
    return f"{share.count:,} of {share.decided:,}{more}, {shown} ({percent(low)} to {percent(high)})"


def _share_dots(series: ShareSeries, shares: Sequence[KindShare], shift: float) -> list[Mark]:
    """One a kind; of a kind that none has, the highest share that the interval allows, as an arrow. The last is for the
    legend alone."""
    symbol: Symbol = "square" if series.square else "circle"
    marks: list[Mark] = []
    for row, share in enumerate(shares):
        if not share.total:
            continue
        low, high = share.interval
        at = share.share if share.count else high
        marks.append(
            Dots(
                x=[at], y=[row + shift], left=[low if share.count else at], right=[high],
                colour=KIND_LOOKS[share.kind].colour, symbol=symbol if share.count else "triangle-left",
                hollow=series.hollow, tip=f"{series.name}, {share.kind}: {share_label(share)}",
            )
        )  # fmt: skip
    return [*marks, Dots(x=[np.nan], y=[np.nan], name=series.name, colour=MUTED, symbol=symbol, hollow=series.hollow)]


def _shares(view: StudyView, settings: ReportSettings) -> Plot:
    found = {method: view_rates(view, method) for method in _METHODS}
    series = [
        ShareSeries(name=f"{things}, {method}", shares=shares, square=things == "prompts", hollow=method == "cosine")
        for things in ("tokens", "prompts")
        for method, rates in found.items()
        for shares in (rates.tokens if things == "tokens" else rates.prompts,)
    ]
    plot = shares_plot(
        series,
        f"After {found['displacement'].where}. A prompt counts for every kind that one of its tokens "
        "has. Intervals treat the tokens of a prompt as dependent." + driven(found["displacement"]),
    )
    # The sentences beside it then say all.
    return dataclasses.replace(plot, folded=all(_all_settle(rates.tokens) for rates in found.values()))


# ---- maps ----


def _layers(view: StudyView, settings: ReportSettings) -> Plot:
    data = view.dataset
    codes = data["verdict"].transpose("judged_layer", "prompt", "token").values
    layers = [int(layer) for layer in data["judged_layer"].values]
    return Plot(
        question="Do all layers show the same kinds?",
        reading="Percent of the tokens, by the displacement method; colours on a square-root scale.",
        panels=[
            _share_map(
                {str(layer): token_shares(one) for layer, one in zip(layers, codes, strict=True)},
                "recurrent layer",
            )
        ],
    )


def _roles(view: StudyView, settings: ReportSettings) -> Plot:
    rates = view_rates(view, "displacement")
    return Plot(
        question="Does it depend on what the token is?",
        reading=f"Percent of the tokens of each role after {rates.where}, by the displacement method; colours "
        "on a square-root scale. A token can have several roles: the question is what lies between a system prompt and "
        "what a chat template adds.",
        panels=[
            _share_map(
                {name.replace(" ", "\n"): shares for name, shares in rates.roles.items() if shares[0].total},
                "role of the token",
            )
        ],
    )


def _share_map(columns: Mapping[str, Sequence[KindShare]], x_title: str) -> Panel:
    """Shares of the kinds that occur, a column each group."""
    there = [place for place in range(len(KINDS)) if any(shares[place].count for shares in columns.values())] or [0]
    shares = [[column[place] for column in columns.values()] for place in there]
    return _kind_map(
        np.array([[share.share for share in row] for row in shares], dtype=np.float64),
        [KINDS[place] for place in there],
        list(columns),
        [[share_label(share) if share.total else "no such token" for share in row] for row in shares],
        x_title,
    )


def _together(view: StudyView, settings: ReportSettings) -> Plot:
    values, there = _kinds_together(view)
    shown = values[np.ix_(there, there)]
    kinds = [KINDS[place] for place in there]
    tips = [
        [
            f"of the tokens with {mine} at some layer, {percent(value)} have {its} at some layer"
            for its, value in zip(kinds, row, strict=True)
        ]
        for mine, row in zip(kinds, shown, strict=True)
    ]
    return Plot(
        question="Does a token do the same at different layers?",
        reading="Among the tokens that show the row's kind at some layer: the share that shows the column's kind at "
        "some layer. Colours on a square-root scale. The row of a rare kind shows what its tokens do at other layers.",
        panels=[
            _kind_map(
                shown, kinds, [KIND_LOOKS[kind].letter for kind in kinds], tips, "also at some layer", "at some layer"
            )
        ],
    )


def _kinds_together(view: StudyView) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """P(column at some layer | row at some layer) of one token, and the kinds that occur."""
    values = co_occurrence(view.study)
    return values, np.flatnonzero(np.isfinite(values).any(1))


def _kind_map(
    values: NDArray[np.float64],
    kinds: Sequence[Kind],
    columns: Sequence[str],
    tips: Sequence[Sequence[str]],
    x_title: str,
    y_title: str = "",
) -> Panel:
    """A row a kind. The colours are even in the square root, as rare kinds are what is looked for."""
    texts = [[significant(100 * value) if np.isfinite(value) else "" for value in row] for row in values.tolist()]
    every = max(1, len(columns) // 16)
    return Panel(
        x=Axis(title=x_title, ticks={place: columns[place] for place in range(0, len(columns), every)}),
        y=_kinds_axis(kinds, y_title),
        marks=[
            HeatMap(
                z=np.sqrt(values),
                x=range(len(columns)),
                bar="share of tokens (%)",
                low=0,
                high=1,
                bar_ticks={share**0.5: f"{100 * share:g}" for share in (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)},
                texts=texts if len(columns) <= _MOST_TEXTS else (),
                gaps=True,
                labels=tips,
                tip="{label}",
            )
        ],
        height=max(240, min(460, 180 + 40 * len(kinds))),
    )


def _kinds_axis(kinds: Sequence[Kind], title: str = "", *, grid: bool | None = None) -> Axis:
    return Axis(
        title=title,
        ticks={row: kind_label(kind) for row, kind in enumerate(kinds)},
        span=(len(kinds) - 0.5, -0.5),
        grid=grid,
    )


def _sensitivity(view: StudyView, settings: ReportSettings) -> Plot:
    record = view.manifest["behaviour"]
    panels = []
    for method in _tried(view):
        counts = view.dataset[f"{method}_sensitivity"].sum("prompt")
        names = [str(each) for each in record["sensitivity"][method]]
        chosen = [float(record[method][each]) for each in names]
        panels.append(
            _sensitivity_map(
                counts.transpose(f"{method}_setting", f"{method}_setting_other", "kind"), names, chosen, method
            )
        )
    return Plot(
        question="How much do the verdicts depend on the thresholds?",
        reading=(
            "Every token judged again with other values of two settings of the method. A cell gives the most common "
            "kinds by letter, in percent; its colour is the share of the kind that is most common with the values "
            "used, which are framed. If the cells around the frame look alike, the verdicts do not depend on the "
            "choice."
        ),
        panels=panels,
    )


def _tried(view: StudyView) -> list[str]:
    """Methods whose verdicts were tried under other settings, all prompts together."""
    record = view.manifest.get("behaviour") or {}
    named = [method for method in _METHODS if f"{method}_sensitivity" in view.dataset and method in record]
    return [method for method in named if view.dataset[f"{method}_sensitivity"].values.sum()]


def _sensitivity_map(counts: xarray.DataArray, names: Sequence[str], chosen: Sequence[float], method: str) -> Panel:
    """Shares over a grid of two settings, `counts` with dimensions (setting, setting_other, kind)."""
    shares = counts.values / np.maximum(counts.values.sum(-1, keepdims=True), 1)
    values = [[float(value) for value in counts[dim].values] for dim in counts.dims[:2]]
    row, column = (
        int(np.abs(np.array(along) - value).argmin()) for along, value in zip(values, chosen, strict=True)
    )  # fmt: skip
    common = int(shares[row, column].argmax())
    axes = [
        Axis(
            title=name.replace("_", " "),
            ticks={place: f"{value:g}" for place, value in enumerate(along)},
            span=(-0.5, len(along) - 0.5),
        )
        for name, along in zip(names, values, strict=True)
    ]
    return Panel(
        x=axes[1],
        y=axes[0],
        marks=[
            HeatMap(
                z=shares[..., common],
                x=range(len(values[1])),
                bar=f"share of {KINDS[common]} (%)",
                low=0,
                high=1,
                bar_ticks={share: f"{100 * share:g}" for share in (0.0, 0.25, 0.5, 0.75, 1.0)},
                texts=[[_cell(cell) for cell in cells] for cells in shares],
                gaps=True,
                labels=[[_all(cell) for cell in cells] for cells in shares],
                tip="{label}",
            ),
            Frame(x=column, y=row),
        ],
        title=f"method {method}",
        anchor=f"sensitivity-{method}",
        height=420,
    )


def _cell(shares: NDArray[np.float64]) -> str:
    """`F 98` and so on, in percent, the commonest kinds first."""
    order = [place for place in np.argsort(-shares, kind="stable")[:_IN_CELL] if shares[place] > 0]
    return "\n".join(f"{KIND_LOOKS[KINDS[place]].letter} {significant(100 * float(shares[place]))}" for place in order)


def _all(shares: NDArray[np.float64]) -> str:
    return "\n".join(f"{kind}: {percent(float(share))}" for kind, share in zip(KINDS, shares, strict=True) if share > 0)


# ---- where all settle, in a sentence ----


def _all_settle(shares: Sequence[KindShare]) -> bool:
    return shares[0].total > 0 and sum(share.count for share in shares if share.kind.settles) == shares[0].total


def _only_kind(columns: Sequence[Sequence[KindShare]]) -> Kind | None:
    """That of all tokens, where they have but one."""
    found = {share.kind for shares in columns for share in shares if share.count}
    return found.pop() if len(found) == 1 else None


def split(shares: Sequence[KindShare]) -> str:
    """`74 % at a fixed point, 26 % at the noise floor`, of tokens that settle."""
    total, names = shares[0].total, {Kind.FIXED_POINT: "at a fixed point", Kind.AT_FLOOR: "at the noise floor"}
    return ", ".join(
        f"{percent(share.count / total)} {names[share.kind]}" for share in shares if share.count and share.kind in names
    )


def _settled_at_every_layer(view: StudyView) -> str | None:
    data = view.dataset
    codes = data["verdict"].transpose("judged_layer", "prompt", "token").values
    layers = {int(layer): token_shares(one) for layer, one in zip(data["judged_layer"].values, codes, strict=True)}
    if (kind := _only_kind(list(layers.values()))) is not None:
        return f"All tokens are of one kind at every layer that was judged: {kind}."
    if not all(map(_all_settle, layers.values())):
        return None
    said = "; ".join(f"{split(shares)} after layer {layer}" for layer, shares in layers.items())
    return f"All tokens settle at every layer that was judged: {said}."


def _settled_in_every_role(view: StudyView) -> str | None:
    roles = {name: shares for name, shares in view_rates(view, "displacement").roles.items() if shares[0].total}
    if (kind := _only_kind(list(roles.values()))) is not None and not kind.settles:
        return f"All tokens are of one kind, whatever their role ({', '.join(roles)}): {kind}."
    if not roles or not all(map(_all_settle, roles.values())):
        return None
    return f"All tokens settle, whatever their role ({', '.join(roles)})."


def _settled_under_every_setting(view: StudyView) -> str | None:
    record, said = view.manifest["behaviour"], []
    for method in _tried(view):
        counts = view.dataset[f"{method}_sensitivity"].sum("prompt").transpose(..., "kind").values
        if counts.sum() != counts[..., SETTLED_CODES].sum():
            return None
        names = " and ".join(str(each).replace("_", " ") for each in record["sensitivity"][method])
        said.append(f"all {counts[..., 0].size} pairs of {names} (method {method})")
    tried = " and with ".join(said)
    return f"The verdicts do not depend on the thresholds: all tokens settle with {tried} that were tried."


def _settled_together(view: StudyView) -> str | None:
    kinds = [KINDS[place] for place in _kinds_together(view)[1]]
    if not all(kind.settles for kind in kinds):
        return None
    return "No token settles at one layer and moves on at another."


def _one_layer(view: StudyView) -> str | None:
    return None if view.dataset.sizes["judged_layer"] > 1 else "one layer was judged, so there is nothing to compare"


def _one_kind(view: StudyView) -> str | None:
    several = len(_kinds_together(view)[1]) > 1
    return _one_layer(view) or (None if several else "all tokens show the same kind at every layer")


VERDICTS = (
    FigureType("verdict-shares", _shares, ("verdict", "verdict_cosine"), anchor="behaviour-shares"),
    FigureType(
        "verdict-layers",
        _layers,
        ("verdict",),
        anchor="behaviour-layers",
        said=_settled_at_every_layer,
        folded=True,
        unless=_one_layer,
        paper=(15,),
    ),
    FigureType("verdict-roles", _roles, ("verdict",), anchor="behaviour-roles", said=_settled_in_every_role),
    FigureType(
        "verdict-sensitivity",
        _sensitivity,
        ("displacement_sensitivity", "cosine_sensitivity"),
        anchor="behaviour-sensitivity",
        said=_settled_under_every_setting,
        folded=True,
        one_is_enough=True,
        unless=lambda view: None if _tried(view) else "no verdict was tried with other settings",
    ),
    FigureType(
        "verdict-co-occurrence",
        _together,
        ("verdict",),
        anchor="behaviour-co-occurrence",
        said=_settled_together,
        folded=True,
        unless=_one_kind,
        paper=(14,),
    ),
    *EXAMPLES,
)
