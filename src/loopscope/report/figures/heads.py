"""What each head looks at, and whether its attention settles."""

from __future__ import annotations

import numpy as np

from loopscope._util.sinks import SINK_THRESHOLD
from loopscope._util.wording import significant
from loopscope.answers.limits import short_prompts
from loopscope.report.figures.convergence import CONVERGENCE, PER_ROW
from loopscope.report.figures.curves import (
    count_axis,
    drawn_recurrences,
    judged_at,
    layer_lines,
    one_recurrence,
    per_row,
    share_axis,
    stable_share,
    trained_mark,
)
from loopscope.report.figures.look import decade, decade_ticks, decades, logarithms
from loopscope.report.figures.maps import head_maps
from loopscope.report.figures.plot import Axis, Drawn, FigureType, HeatMap, Mark, Panel, Plot, Rule, Section, on_page
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView, median_over_prompts, sites_of

_ROW = 9
"""CSS pixels of a head in a map, at least: fewer and rows cannot be told apart."""
_MOST_NAMES = 16
"""Layers that are named beside a map."""
_SUPPORT_STABLE = 0.9
"""The criterion of arXiv 2609.27373, by which `support_stable_from` was found."""


def _head_change(view: StudyView, settings: ReportSettings) -> Plot:
    counts = drawn_recurrences(view.recurrences, settings)[1:]
    view.variable("attention_change")
    change = median_over_prompts(per_row(view.shown, "attention_change")).transpose("layer", "head", "recurrence")
    values = change.values[..., counts - 1].astype(np.float64)
    layers, heads, _ = values.shape
    rows = values.reshape(-1, len(counts))
    shown = logarithms(rows)
    powers = decade_ticks(*decades(shown), most=9)
    every = max(1, -(-layers // _MOST_NAMES))
    place = np.stack(np.meshgrid(np.arange(layers), np.arange(heads), indexing="ij"), axis=-1).reshape(-1, 1, 2)
    return Plot(
        question="Which heads keep changing?",
        reading=(
            "How much each head's attention map changes from one recurrence to the next: a row per head, median over "
            f"prompts. {PER_ROW} Rows that turn dark are heads whose attention settles; bright ones keep changing. "
            "White lines separate the recurrent layers; no colour means no change at all."
        ),
        panels=[
            Panel(
                x=Axis(title="recurrence", whole=True),
                y=Axis(
                    title="recurrent layer, a row per head",
                    ticks={layer * heads + (heads - 1) / 2: str(layer) for layer in range(0, layers, every)},
                ),
                marks=[
                    HeatMap(
                        z=shown,
                        x=counts,
                        bar="change per row",
                        low=powers[0],
                        high=powers[-1],
                        bar_ticks={power: decade(power) for power in powers},
                        parted_y=[layer * heads - 0.5 for layer in range(1, layers)],
                        data=np.broadcast_to(place, (len(rows), len(counts), 2)).tolist(),
                        labels=[[significant(value) if value > 0 else "no change" for value in row] for row in rows],
                        tip="layer {0}, head {1}, recurrence {x}: {label}",
                        picks=_picks(view, "recurrent"),
                    )
                ],
                height=max(320, min(900, 120 + _ROW * len(rows))),
            )
        ],
    )


def _heads_stable(view: StudyView, settings: ReportSettings) -> Plot:
    counts = drawn_recurrences(view.recurrences, settings)
    shares = stable_share(view.variable("head_stable_from"), counts)
    return Plot(
        question="After how many recurrences are heads stable?",
        reading=(
            "Share of heads, over all prompts, that are stable after that many recurrences: their change per row stays "
            f"at or below {view.head_stable:g} from there on (--head-stable). The last recurrence measured cannot "
            "count, since nothing after it was seen. One line per recurrent layer."
        ),
        panels=[
            Panel(
                x=count_axis(view.recurrences),
                y=share_axis("share of heads"),
                marks=[*layer_lines(shares, counts, steps=True), *trained_mark(view)],
            )
        ],
        legend="layer",
    )


def _head_sinks(view: StudyView, settings: ReportSettings) -> Plot:
    """In one pass; of a looped model at the trained number of recurrences."""
    at, sites = judged_at(view), sites_of(view.shown)
    kept = [place for place, site in enumerate(sites) if site.stage != "recurrent" or site.recurrence == at]
    sink = view.median("sink_score").transpose("depth", "head").values[kept].astype(np.float64)
    layers, heads = sink.shape
    ends = (view.prelude, view.prelude + view.recurrent)
    one_pass = f" (recurrence {at})" if view.looped else ""
    return Plot(
        question="Which heads attend to the first token?",
        reading=" ".join(
            [
                f"Share of each head's attention that the first token receives, along one pass{one_pass}, median over "
                f"prompts. A head has a sink from {SINK_THRESHOLD:g} on."
                + (" White lines separate prelude, block and coda." if view.looped else ""),
                *short_prompts(view),
            ]
        ),
        panels=[
            Panel(
                x=Axis(title="head", ticks={n: str(n) for n in range(0, heads, max(1, -(-heads // 12)))}),
                y=Axis(
                    title="layer of one pass",
                    ticks={n: str(n) for n in range(0, layers, max(1, -(-layers // _MOST_NAMES)))},
                ),
                marks=[
                    HeatMap(
                        z=sink,
                        x=np.arange(heads),
                        bar="sink score of the first token",
                        low=0,
                        high=1,
                        parted_y=[start - 0.5 for start in ends if 0 < start < layers],
                        data=np.moveaxis(np.indices(sink.shape), 0, -1).tolist(),
                        tip="layer {y}, head {x}: {z:.2f}",
                        picks="" if view.looped else _picks(view, "prelude"),
                    )
                ],
                height=320,
            )
        ],
    )


def _supports(view: StudyView, settings: ReportSettings) -> Plot:
    panels = []
    for name, title in (
        ("support_strongest", "16 strongest keys, to the recurrence before"),
        ("support_strongest_to_horizon", "to the horizon"),
        ("support_mass", "keys with 95 %, to the recurrence before"),
        ("support_mass_to_horizon", "to the horizon"),
    ):
        stable = Rule(y=_SUPPORT_STABLE, name="stable", dash="dot")
        marks = [*_medians(view, settings, name), stable, *trained_mark(view)]
        y = Axis(title="Jaccard similarity", span=(0, 1))
        panels.append(Panel(x=count_axis(view.recurrences), y=y, title=title, marks=marks))
    return Plot(
        question="Do heads still change which keys they look at?",
        reading=(
            "Jaccard similarity of the keys that a row of attention looks at: those in both sets over those in either, "
            "on sampled rows with more than 16 keys, median over heads and prompts, a line per recurrent layer. A "
            "head's support counts as stable from the recurrence after which the first stays at 0.9 or more three "
            "times (arXiv 2609.27373). A map may change while its support does not."
        ),
        panels=panels,
        legend="layer",
    )


def _medians(view: StudyView, settings: ReportSettings, name: str) -> list[Mark]:
    """Over heads and prompts, a line per recurrent layer."""
    counts = drawn_recurrences(view.recurrences, settings)
    rows = view.shown[name].median(("head", "prompt")).transpose("layer", "recurrence").values[:, counts - 1]
    return layer_lines(rows, counts)


def _shared_cache(view: StudyView, settings: ReportSettings) -> Plot:
    panels = []
    for name, title, axis in (
        ("cache_key_distance", "keys, from those at the horizon", "relative distance"),
        ("cache_value_distance", "values, from those at the horizon", "relative distance"),
        ("cache_output_change", "what a head mixes with them", "relative change"),
    ):
        y = Axis(title=axis, scale="auto")
        marks = [*_medians(view, settings, name), *trained_mark(view)]
        panels.append(Panel(x=count_axis(view.recurrences), y=y, title=title, marks=marks))
    return Plot(
        question="What would one cache for all recurrences change?",
        reading=(
            f"How far keys and values are from those after {view.horizon} recurrences, relative to them, and how much "
            "what a head mixes changes if all tokens before bring those instead of their own, on sampled rows: medians "
            "over heads and prompts, a line per recurrent layer. 0: nothing; 1: as much as there is. It is the change "
            "of one head at one place: what comes of it later is not followed."
        ),
        panels=panels,
        legend="layer",
    )


def _picks(view: StudyView, stage: str) -> str:
    """Where the study has maps, that a click can show."""
    return stage if "attention_map" in view.dataset else ""


HEADS: tuple[FigureType[StudyView], ...] = (
    FigureType("head-change", _head_change, ("attention_change",), unless=one_recurrence),
    # Not head_stable_from: a head that is never stable has no number, so that may be finite nowhere.
    FigureType("heads-stable", _heads_stable, ("attention_change",), folded=True, unless=one_recurrence),
    FigureType(
        "head-supports",
        _supports,
        (
            "support_strongest",
            "support_strongest_to_horizon",
            "support_mass",
            "support_mass_to_horizon",
        ),
        folded=True,
        unless=one_recurrence,
    ),
    FigureType(
        "shared-cache",
        _shared_cache,
        ("cache_key_distance", "cache_value_distance", "cache_output_change"),
        folded=True,
        unless=one_recurrence,
    ),
    FigureType("head-sinks", _head_sinks, ("sink_score",), loops=False),
)


def heads_section(view: StudyView, settings: ReportSettings) -> Section:
    """Change, stabilisation and sinks of the heads."""
    maps = head_maps(view)
    # Two beside each other, then the maps that a click into them shows, then the others.
    first = ("head-change", "head-sinks")
    others = ("heads-stable", "head-supports", "shared-cache", "attention-by-layer")
    types = [each for each in (*HEADS, *CONVERGENCE) if each.name in (*first, *others)]
    plots = {plot.name: plot for plot in on_page(types, view, settings)}
    figures: list[Drawn] = [plots.pop(name) for name in first if name in plots]
    figures += [maps] if maps is not None else []
    figures += [plots[name] for name in others if name in plots]
    lead = "Attention after the softmax, head by head; medians over prompts."
    if view.looped:
        lead += (
            " Change is the Euclidean distance between a row of a map and the same row one recurrence before, as root "
            "mean square over rows; two rows with nothing in common are 1 to 1.4 apart."
        )
    if maps is None:
        lead += " The study holds no maps of single heads: none were to be kept, or none can be seen."
    return Section(
        anchor="heads",
        short="Heads",
        title="Do the heads stabilise?" if view.looped else "What do the heads look at?",
        lead=lead,
        figures=figures,
    )
