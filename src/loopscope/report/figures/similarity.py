"""One point or many? Matrices of layers, and of every two visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loopscope._util.sites import stage_name, stage_starts
from loopscope.report.figures.convergence import PER_ROW
from loopscope.report.figures.curves import FEW
from loopscope.report.figures.plot import Axis, FigureType, HeatMap, Number, Panel, Plot, Section, on_page
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView

_MOST_NUMBERS = 8
"""Layers whose cosines are written into the map."""
_MOST_NAMES = 16
"""Passes that are named on an axis; more names would lie on top of each other."""
_HEIGHT = 330


def _layer_cosine(view: StudyView, settings: ReportSettings) -> Plot:
    cosine = view.median("layer_cosine").transpose("layer", "layer_other").values.astype(np.float64)
    layers = len(cosine)
    axis = Axis(title="recurrent layer", ticks={n: str(n) for n in range(0, layers, -(-layers // 12))})
    return Plot(
        question="Do the layers share one point?",
        reading=(
            "Cosine between the residual streams of the recurrent layers at the horizon H, median over prompts of "
            "means over tokens. Where all are near 1, the layers share one point; otherwise each layer has its "
            "own."
        ),
        panels=[
            Panel(
                x=axis,
                y=axis,
                marks=[
                    HeatMap(
                        z=cosine,
                        x=np.arange(layers),
                        bar="cosine at H",
                        low=min(0.0, float(np.nanmin(cosine))),
                        high=1,
                        texts=[[f"{value:.2f}" for value in row] for row in cosine] if layers <= _MOST_NUMBERS else (),
                        tip="layers {y} and {x}: {z:.3f}",
                    )
                ],
                height=_HEIGHT,
                equal=True,
            )
        ],
    )


def _residual(recurrences: int | None, view: StudyView, settings: ReportSettings) -> Plot:
    if view.looped:
        question = "Does every pass through the block repeat the last one?"
        reading = (
            "White lines separate stages and recurrences. Diagonal stripes: each pass repeats the last one layer by "
            "layer. One bright square: all layers are alike."
        )
    else:
        question, reading = (
            "How does the residual stream turn from layer to layer?",
            "Bright squares: layers that hardly turn it.",
        )
    values, labels = _part(view, "cycle_similarity", recurrences)
    low = _least_within(values, labels)
    if low > np.nanmin(values):
        reading += f" The colours begin at {low:g}, just below the least value between recurrent layers; lower values "
        reading += "are as dark."
    return Plot(
        question=question,
        reading=(
            f"Cosine between the residual streams of every two {_visits(view, recurrences)}, mean over tokens and "
            f"prompts. {reading}"
        ),
        panels=[_visits_map(values, labels, "cosine", low=low, high=1)],
    )


def _attention(recurrences: int | None, view: StudyView, settings: ReportSettings) -> Plot:
    values, labels = _part(view, "attention_cycle_distance", recurrences)
    repeats = " Dark diagonals: each layer attends as in the pass before." if view.looped else ""
    return Plot(
        question="Does attention repeat from pass to pass?"
        if view.looped
        else "How similar is the attention of the layers?",
        reading=(
            f"Distance between the attention maps of every two {_visits(view, recurrences)}, over all heads, mean over "
            f"prompts. {PER_ROW}{repeats}"
        ),
        panels=[_visits_map(values, labels, "distance per row", low=0, high=float(np.nanmax(values)) or 1.0)],
    )


def _cka(view: StudyView, settings: ReportSettings) -> Plot:
    values, labels = _part(view, "visit_cka", FEW)
    return Plot(
        question="Are the states of two visits the same up to rotation?",
        reading=(
            f"Linear CKA between the states of every two {_visits(view, FEW)}, over the tokens of a prompt, mean over "
            "prompts. 1: one is the other rotated and scaled, which a cosine does not see. With fewer tokens than "
            "directions it is high by itself. White lines separate stages and recurrences."
        ),
        panels=[_visits_map(values, labels, "CKA", low=0, high=1)],
    )


def _least_within(values: NDArray[np.float64], labels: Sequence[str]) -> float:
    """A twentieth at or below the least value between recurrent layers: prelude and coda lie so far off that beside
    them the passes would all look alike."""
    loop = [place for place, label in enumerate(labels) if stage_name(label).isdigit()] or list(range(len(labels)))
    least = float(np.nanmin(values[np.ix_(loop, loop)]))
    return min(math.floor(20 * least) / 20, 0.95)


def _labels(view: StudyView, recurrences: int | None) -> list[str]:
    """The visits of a cycle's matrix up to a recurrence, or all of them.

    The coda, which runs after the last recurrence of all, is left out of a part.
    """
    labels = [str(label) for label in view.shown["visit"].values]
    held = sum(stage_name(label).isdigit() for label in labels) // max(1, view.recurrent)
    if recurrences is None or held <= recurrences:
        return labels
    return labels[: view.prelude + view.recurrent * recurrences]


def _part(view: StudyView, name: str, recurrences: int | None) -> tuple[NDArray[np.float64], list[str]]:
    values, labels = view.variable(name).values.astype(np.float64), _labels(view, recurrences)
    return values[: len(labels), : len(labels)], labels


def _visits(view: StudyView, recurrences: int | None) -> str:
    if not view.looped:
        return "layers"
    if recurrences is None:
        return "visits of all the recurrences kept"
    return f"visits of the first {min(FEW, view.recurrences)} recurrences"


def _visits_map(values: NDArray[np.float64], labels: Sequence[str], what: str, *, low: Number, high: Number) -> Panel:
    """Visits x visits in order of realised depth, with white lines where a stage or a recurrence begins, or of a
    feed-forward model its layers."""
    starts = stage_starts(labels)
    names = [stage_name(labels[start]) for start in starts]
    looped = any(name.isdigit() for name in names)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)]
    if not looped:
        names, middles = [str(n) for n in range(len(labels))], [float(n) for n in range(len(labels))]
    every = -(-len(names) // _MOST_NAMES)
    # The coda is named beside the last recurrence, where there is room for one name of the two.
    room = len(names) - (every if names[-1] == "coda" else 0)
    ticks = {
        middles[place]: name
        for place, name in enumerate(names)
        if not name.isdigit() or (int(name) % every == 0 and place < room)
    }
    axis = Axis(title="recurrence" if looped else "layer", ticks=ticks)
    between = [start - 0.5 for start in starts[1:]] if looped else []
    return Panel(
        x=axis,
        y=axis,
        marks=[
            HeatMap(
                z=values, x=np.arange(len(labels)), bar=what, low=low, high=high, parted_x=between, parted_y=between,
                pairs=labels, tip=f"{{label}}\n{what} {{z:.3f}}",
            )
        ],
        height=_HEIGHT,
        equal=True,
    )  # fmt: skip


def _no_longer(view: StudyView) -> str | None:
    if len(_labels(view, None)) > len(_labels(view, FEW)):
        return None
    return f"the study holds no more than the first {FEW} recurrences (--cycle-recurrences)"


SIMILARITY: tuple[FigureType[StudyView], ...] = (
    FigureType("layer-cosine", _layer_cosine, ("layer_cosine",)),
    FigureType(
        "cycle-residual",
        partial(_residual, FEW),
        ("cycle_similarity",),
        anchor="cycle-similarity",
        loops=False,
        paper=(19,),
    ),
    FigureType(
        "cycle-attention",
        partial(_attention, FEW),
        ("attention_cycle_distance",),
        anchor="attention-cycle",
        loops=False,
        paper=(2,),
    ),
    FigureType(
        "cycle-residual-long",
        partial(_residual, None),
        ("cycle_similarity",),
        anchor="cycle-similarity-long",
        folded=True,
        unless=_no_longer,
        paper=(20,),
    ),
    FigureType(
        "cycle-attention-long",
        partial(_attention, None),
        ("attention_cycle_distance",),
        anchor="attention-cycle-long",
        folded=True,
        unless=_no_longer,
        paper=(21,),
    ),
    FigureType("visit-cka", _cka, ("visit_cka",), folded=True, loops=False),
)


def similarity_section(view: StudyView, settings: ReportSettings) -> Section:
    """Cosines between layers at the horizon, and residual streams and attention of all visits of the first
    recurrences."""
    return Section(
        anchor="points",
        short="Points",
        title="One point per layer, and every pass alike?" if view.looped else "How similar are the layers?",
        lead="Residual streams are compared token by token; cosines are then averaged over tokens and prompts.",
        columns=3 if view.looped else 2,
        figures=on_page(SIMILARITY, view, settings),
    )
