"""Single tokens that stand for their kind: how each comes to its state at the horizon, and the paths of those that move
most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopscope._util.wording import percent, significant, visible
from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.report.figures.curves import count_axis, drawn_recurrences
from loopscope.report.figures.look import AXIS, KIND_LOOKS, kind_label
from loopscope.report.figures.plot import Axis, Dots, FigureType, Line, Mark, Panel, Plot
from loopscope.report.figures.token_panel import walked
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_COSINE = "token_cosine_distance_to_horizon"
_MOST_LAYERS = 6
"""Of which a path is drawn."""
_SIZE = {Kind.ORBIT: "verdict_amplitude", Kind.SLIDER: "verdict_speed"}


def _to_horizon(view: StudyView, settings: ReportSettings) -> Plot:
    """Of each kind at the last layer, the token that moves most."""
    data = view.dataset.transpose(..., "prompt", "token", missing_dims="ignore")
    last = data.isel(judged_layer=-1)
    away = data[_COSINE].sel(site="last_layer").transpose("recurrence", "prompt", "token").values.astype(np.float64)
    levels = np.nan_to_num(last["verdict_level"].values, nan=-1.0)
    counts = drawn_recurrences(view.recurrences, settings)
    panels: list[list[Mark]] = [[], []]
    said = []
    for place, kind in enumerate(KINDS):
        there = last["verdict"].values == place
        if not there.any():
            continue
        prompt, token = (int(at) for at in np.unravel_index(np.where(there, levels, -2.0).argmax(), there.shape))
        said.append(f"{_named(view, prompt, token)} ({kind})")
        row = away[counts - 1, prompt, token]
        for marks, y in zip(panels, (1 - row, row), strict=True):
            marks.append(Line(x=counts, y=y, name=kind_label(kind), colour=KIND_LOOKS[kind].colour))
    return Plot(
        question="How does a token of each kind approach its last state?",
        reading="Cosine of a token's state after the last recurrent layer with its state at the horizon H = "
        f"{view.horizon}: (a) as it is, (b) its distance from 1. Shown for each kind: the token that still moves "
        f"most, {'; '.join(said)}. An orbit returns close to 1 again and again before H, a slider climbs all the way; "
        "at H itself every curve ends at 1.",
        panels=[
            Panel(x=count_axis(view.recurrences), y=Axis(title="cosine to state at H"), marks=panels[0]),
            Panel(
                x=count_axis(view.recurrences), y=Axis(title="1 − cosine to state at H", scale="auto"), marks=panels[1]
            ),
        ],
    )


def _named(view: StudyView, prompt: int, token: int) -> str:
    return f"Prompt {prompt}, token {token} “{view.strings(prompt)[token]}”"


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


def extremes_plot(candidates: Sequence[Extreme]) -> Plot | None:
    """The widest orbit and the fastest slider, as far as there are some."""
    panels, said = [], []
    for kind in (Kind.ORBIT, Kind.SLIDER):
        there = [each for each in candidates if each.kind is kind and math.isfinite(each.size)]
        if there:
            extreme = max(there, key=lambda each: each.size)
            panels.append(_path(extreme))
            said.append(_said(extreme, len(there)))
    if not panels:
        return None
    if len(panels) > 1:
        said = [f"({letter}) {words}" for letter, words in zip("ab", said, strict=True)]
    return Plot(
        question="Which tokens move most?",
        reading=f"{' '.join(said)} Each point is the state after one of the last recurrences, in the token's plane of "
        "largest motion; the star is the last one.",
        panels=panels,
        anchor="behaviour-extremes",
    )


def _said(extreme: Extreme, among: int) -> str:
    rank = f"the most of {among:,}" if among > 1 else "the only one"
    return f"{visible(extreme.label, 80)}: {_size(extreme)}; {rank}."


def _size(extreme: Extreme) -> str:
    if extreme.kind is Kind.ORBIT:
        return f"amplitude {percent(extreme.size)} of the norm, period {significant(extreme.period, 3)} recurrences"
    return f"{percent(extreme.size)} of the norm per recurrence"


def _path(extreme: Extreme) -> Panel:
    extreme_of = "the widest orbit" if extreme.kind is Kind.ORBIT else "the fastest slider"
    return _drawn_path(extreme, extreme_of, f"extreme-{extreme.kind}")


def _drawn_path(extreme: Extreme, title: str, anchor: str) -> Panel:
    x, y = extreme.path.astype(np.float64).T
    colour = KIND_LOOKS[extreme.kind].colour
    labels, tip = [str(len(x) - 1 - time) for time in range(len(x))], "recurrence {label} before the end"
    return Panel(
        x=Axis(title="1st component / norm", grid=True),
        y=Axis(title="2nd component / norm"),
        marks=[
            Line(x=x, y=y, colour=AXIS, width=1, labels=labels, tip=tip),
            Dots(x=x, y=y, colour=colour, size=5, labels=labels, tip=tip),
            Dots(x=x[-1:], y=y[-1:], colour=colour, symbol="star", size=13, labels=labels[-1:], tip="the last one"),
        ],
        title=title,
        anchor=anchor,
        equal=True,
    )


def _extremes(view: StudyView, settings: ReportSettings) -> Plot:
    plot = extremes_plot(_candidates(view))
    assert plot is not None
    return plot


def _candidates(view: StudyView) -> list[Extreme]:
    """Of the last layer."""
    data = view.dataset.isel(judged_layer=-1).transpose(..., "prompt", "token", missing_dims="ignore")
    return [
        Extreme(
            label=_named(view, int(prompt), int(token)),
            kind=kind,
            size=float(data[name].values[prompt, token]),
            period=float(data["verdict_period"].values[prompt, token]),
            path=walked(data["tail_path"].isel(prompt=prompt, token=token).transpose("tail", "plane").values),
        )
        for kind, name in _SIZE.items()
        for prompt, token in np.argwhere(data["verdict"].values == KINDS.index(kind))
    ]


def _extremes_by_layer(view: StudyView, settings: ReportSettings) -> Plot:
    """Of each judged layer, or of some of many, the orbit or slider that moves most."""
    data = view.dataset.transpose("judged_layer", "prompt", "token", ...)
    found = []
    for place in _moving_layers(view):
        here, layer = data.isel(judged_layer=place), int(data["judged_layer"][place])
        movers = here["mover"].values
        levels = [float(here["verdict_level"].values[n, at]) if at >= 0 else -1.0 for n, at in enumerate(movers)]
        prompt = int(np.argmax(levels))
        token = int(movers[prompt])
        kind = KINDS[int(here["verdict"].values[prompt, token])]
        extreme = Extreme(
            label=f"Layer {layer}, {_named(view, prompt, token)}",
            kind=kind,
            size=float(here[_SIZE[kind]].values[prompt, token]),
            period=float(here["verdict_period"].values[prompt, token]),
            path=walked(here["mover_path"].isel(prompt=prompt).transpose("tail", "plane").values),
        )
        found.append((extreme, _drawn_path(extreme, f"layer {layer}: {kind}", f"extreme-layer-{layer}")))
    return Plot(
        question="Which token moves most at each layer?",
        reading="For each recurrent layer with orbits or sliders, the one that moves most, in its plane of largest "
        "motion. Each point is the state after one of the last recurrences; the star is the last one. "
        + " ".join(f"{extreme.label}: {_size(extreme)}." for extreme, _ in found),
        panels=[panel for _, panel in found],
    )


def _moving_layers(view: StudyView) -> list[int]:
    """Places of judged layers at which a token orbits or slides, at most `_MOST_LAYERS` of them, evenly."""
    moving = np.flatnonzero((view.dataset["mover"].transpose("judged_layer", "prompt").values >= 0).any(-1))
    chosen = np.unique(np.linspace(0, len(moving) - 1, min(_MOST_LAYERS, len(moving))).round().astype(int))
    return [int(place) for place in moving[chosen]]


EXAMPLES = (
    FigureType(
        "verdict-cosine",
        _to_horizon,
        ("verdict", "verdict_level", _COSINE),
        anchor="behaviour-cosine",
        folded=True,
        paper=(13,),
    ),
    FigureType(
        "verdict-extremes",
        _extremes,
        ("verdict", "tail_path"),
        anchor="behaviour-extremes",
        unless=lambda view: None if extremes_plot(_candidates(view)) else "no token orbits or slides",
    ),
    FigureType(
        "verdict-extremes-by-layer",
        _extremes_by_layer,
        ("verdict", "mover", "mover_path"),
        anchor="behaviour-extremes-by-layer",
        unless=lambda view: None if _moving_layers(view) else "no token orbits or slides at any layer",
        paper=(15,),
    ),
)
