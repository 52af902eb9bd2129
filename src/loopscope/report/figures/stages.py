"""The stages of inference, along the depth of one pass, through all visits, and layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from string import ascii_lowercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopscope.answers.limits import short_prompts
from loopscope.answers.quantities import VISIT_QUANTITIES, StageQuantity
from loopscope.report.figures.curves import (
    FEW,
    Layout,
    judged_at,
    laid_out,
    line_words,
    passes,
    share_axis,
    visit_curve,
)
from loopscope.report.figures.look import CATEGORIES
from loopscope.report.figures.plot import Axis, Bars, FigureType, Line, Panel, Plot, Section, on_page
from loopscope.report.settings import ReportSettings
from loopscope.study import StudyView, sites_of


def within(view: StudyView) -> list[int]:
    """The recurrences up to the trained number that get a line each."""
    return passes(judged_at(view)) if view.looped else []


def beyond(view: StudyView) -> list[int]:
    """The trained number of recurrences, its doublings, and the last one measured; empty where none lies beyond it."""
    trained, last = view.trained, view.recurrences
    if trained is None or not 1 <= trained < last:
        return []
    doublings = [trained * 2**power for power in range(last.bit_length()) if trained * 2**power < last]
    return [*doublings, last]


def _few(view: StudyView) -> list[int]:
    return [min(FEW, view.recurrences)] if view.looped else []


def _all(view: StudyView) -> list[int]:
    return [view.recurrences]


def _no_more_than_few(view: StudyView) -> str | None:
    count = view.recurrences
    return None if count > FEW else f"{count} recurrences were measured, which the figure of the first {FEW} shows"


def _nothing_beyond(view: StudyView) -> str | None:
    if view.trained is None:
        return "it is not known how many recurrences the model was trained with"
    return None if beyond(view) else f"no recurrence beyond the trained {view.trained} was measured"


def _stages(
    name: str,
    question: str,
    layout: Layout,
    paper: tuple[int, ...],
    *,
    lines: Callable[[StudyView], list[int]] = within,
    only: str = "",
    anchored: bool = False,
    **how: Any,
) -> FigureType[StudyView]:
    """A panel per stage measure, or `only` the one of this anchor; each has an anchor on the page if they are
    `anchored`, and `how` is what else is said of the type."""
    quantities = [quantity for quantity in VISIT_QUANTITIES if only in ("", quantity.anchor)]
    return FigureType(
        name,
        partial(_drawn, quantities, question, layout, lines, anchored),
        tuple(quantity.variable for quantity in quantities),
        one_is_enough=True,
        paper=paper,
        **how,
    )


def _drawn(
    quantities: Sequence[StageQuantity],
    question: str,
    layout: Layout,
    lines: Callable[[StudyView], list[int]],
    anchored: bool,
    view: StudyView,
    settings: ReportSettings,
) -> Plot:
    quantities = [quantity for quantity in quantities if view.why_absent(quantity.variable) is None]
    curves, recurrences = [visit_curve(view, quantity) for quantity in quantities], lines(view)
    letters = [f"({letter}) " for letter in ascii_lowercase] if len(quantities) > 1 else [""]
    said = [
        " ".join([f"{letter}{quantity.name.capitalize()}: {quantity.reading}", *_limits(view, quantity)])
        for letter, quantity in zip(letters, quantities, strict=False)
    ]
    medians = "Medians over prompts, at every layer application."
    return Plot(
        question=question,
        reading=" ".join([medians, *said]),
        lines=line_words(view, layout, curves[0], recurrences),
        panels=[
            laid_out(
                view,
                settings,
                curve,
                layout,
                quantity.y_title,
                recurrences,
                scale="auto" if quantity.logarithmic else "linear",
                title=quantity.name.capitalize() if len(quantities) > 1 else "",
                anchor=f"{quantity.anchor}-{layout.replace(' ', '-')}" if anchored else "",
            )
            for quantity, curve in zip(quantities, curves, strict=True)
        ],
        legend="recurrence" if layout == "by recurrence" else "layer",
    )


def _limits(view: StudyView, quantity: StageQuantity) -> list[str]:
    return short_prompts(view) if quantity.variable == "sink_score" else []


def _massive_places(view: StudyView, settings: ReportSettings) -> Plot:
    count = view.prelude + view.recurrent * min(FEW, max(1, view.recurrences))
    last = count if view.looped and view.recurrences > FEW else len(sites_of(view.shown))
    token, place = (
        view.variable(f"massive_{name}").transpose("depth", "prompt").values[:last] for name in ("token", "dimension")
    )
    visits = np.arange(last) + (1 if view.looped else 0)
    upto = f" of the first {min(FEW, view.recurrences)} recurrences" if view.looped else ""
    shares = (
        ("on the first token", (token == 0).mean(axis=1), CATEGORIES[0]),
        ("in the most common coordinate", np.array([_most_common(row) for row in place]), CATEGORIES[1]),
    )
    return Plot(
        question="Where are the largest entries?",
        reading=(
            f"The largest entry of the residual stream at every layer application{upto}: share of prompts in which it "
            "belongs to the first token, and in which it lies in its most common coordinate."
        ),
        panels=[
            Panel(
                x=Axis(
                    title="layer application, in order" if view.looped else "layer",
                    span=(visits[0] - 0.5, visits[-1] + 0.5),
                    whole=True,
                ),
                y=share_axis("share of prompts"),
                marks=[
                    Line(x=visits, y=share, name=name, colour=colour, points=True) for name, share, colour in shares
                ],
            )
        ],
    )


def _most_common(row: NDArray[Any]) -> float:
    """Share of the entries of a row that have its most frequent value."""
    return float(np.unique(row, return_counts=True)[1].max() / len(row))


def _neurons(view: StudyView, settings: ReportSettings) -> Plot:
    labels = [str(label) for label in view.variable("unique_layer").values]
    every = max(1, -(-len(labels) // 12))
    short = [label.replace("prelude.", "p").replace("recurrent.", "r").replace("coda.", "c") for label in labels]
    names = short if view.looped else [str(layer) for layer in range(len(labels))]
    kinds = (("prediction", CATEGORIES[0]), ("suppression", CATEGORIES[1]))
    return Plot(
        question="Which layers have neurons that write single tokens?",
        reading=(
            "Share of MLP neurons whose output raises (prediction) or lowers (suppression) the logits of a few tokens "
            "far more than those of the rest: the cosines of its output weights with the unembedding have a kurtosis "
            "above 10. Computed from the weights alone. Folded: including the weights of the norms between them, and "
            "with the unembedding's mean over tokens removed. Raw: with the weights as they are."
        ),
        panels=[
            Panel(
                x=Axis(
                    title="layer (p: prelude, r: recurrent, c: coda)" if view.looped else "layer",
                    ticks=dict(list(enumerate(names))[::every]),
                ),
                y=Axis(title=f"share of neurons, {version}", scale="linear", percent=True),
                marks=[
                    Bars(
                        x=np.arange(len(labels)),
                        y=view.variable(f"{prefix}{name}_neurons").values.astype(np.float64),
                        name=name,
                        colour=colour,
                        labels=labels,
                        tip=f"{{label}}, {name}: {{y:.2%}}",
                    )
                    for name, colour in kinds
                ],
            )
            for version, prefix in (("folded", "folded_"), ("raw", ""))
            if f"{prefix}prediction_neurons" in view.shown  # older studies have the raw ones alone
        ],
        same_y=True,
    )


def _no_neuron(view: StudyView) -> str | None:
    names = [f"{version}{kind}_neurons" for version in ("folded_", "") for kind in ("prediction", "suppression")]
    some = any(view.shown[name].values.any() for name in names if name in view.shown)
    return None if some else "no neuron has a kurtosis above 10, neither folded nor raw"


_CONCENTRATED = "How concentrated is the attention?"
_REPEATING = "Do the stages of inference repeat?"

STAGES: tuple[FigureType[StudyView], ...] = (
    _stages(
        "concentration-by-depth", _CONCENTRATED, "by depth", (7,), lines=_few, only="concentration", for_paper=True,
        loops=False,
    ),
    _stages(
        "concentration-by-depth-long", _CONCENTRATED, "by depth", (11,), lines=_all, only="concentration",
        for_paper=True, unless=_no_more_than_few,
    ),
    _stages(
        "concentration-by-recurrence", _CONCENTRATED, "by recurrence", (8,), only="concentration", for_paper=True
    ),
    _stages(
        "concentration-beyond", _CONCENTRATED, "by recurrence", (12,), lines=beyond, only="concentration",
        for_paper=True, unless=_nothing_beyond,
    ),
    _stages(
        "magnitude-by-depth", "How large is the residual stream?", "by depth", (9,), lines=_few, only="magnitude",
        for_paper=True, loops=False,
    ),
    _stages(
        "stages-by-depth", "What happens at each visit?", "by depth", (34,), lines=_few, anchored=True, loops=False
    ),
    _stages("stages-by-recurrence", _REPEATING, "by recurrence", tuple(range(35, 47)), anchored=True),
    _stages("stages-by-layer", "How does each layer change over the recurrences?", "by layer", (47, 48, 49)),
    _stages(
        "stages-beyond", "Do the stages persist beyond the trained recurrences?", "by recurrence", (50, 51, 52),
        lines=beyond, unless=_nothing_beyond,
    ),
    FigureType("massive-places", _massive_places, ("massive_token", "massive_dimension"), folded=True, loops=False),
    FigureType(
        "neurons", _neurons, ("prediction_neurons", "suppression_neurons"), folded=True, loops=False,
        unless=_no_neuron, paper=(32, 33),
    ),
)  # fmt: skip


def stages_section(view: StudyView, settings: ReportSettings) -> Section:
    """What each visit does to attention and residual stream."""
    first = [each for each in STAGES if each.name == "stages-by-recurrence"]
    others = [dataclasses.replace(each, folded=view.looped) for each in STAGES if each not in first]
    return Section(
        anchor="stages",
        short="Stages",
        title="Do the stages of inference repeat?" if view.looped else "What are the stages of inference?",
        lead="Medians over prompts. Where lines by recurrence coincide, every pass repeats the same stages."
        if view.looped
        else "Medians over prompts.",
        figures=on_page([*first, *others], view, settings),
    )
