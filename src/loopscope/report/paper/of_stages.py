"""The types of figure that show stages of inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.figure import Figure

from loopscope._util.sinks import SINK_THRESHOLD
from loopscope._util.wording import listed
from loopscope.answers.quantities import STAGE_QUANTITIES
from loopscope.report.paper.absence import why_absent
from loopscope.report.paper.captions import line_words
from loopscope.report.paper.inference import FEW, beyond, massive_places, measured, neurons, stages, within
from loopscope.report.paper.kinds import FigureType, never, study_type
from loopscope.report.paper.layouts import Layout
from loopscope.report.paper.style import Width
from loopscope.study import Readings

_Lines = Callable[[Readings], list[int]]
_Reason = Callable[[Readings], str | None]


def _few(readings: Readings) -> list[int]:
    return [min(FEW, readings.view.recurrences)] if readings.view.looped else []


def _all(readings: Readings) -> list[int]:
    return [readings.view.recurrences]


def _no_more_than_few(readings: Readings) -> str | None:
    count = readings.view.recurrences
    return None if count > FEW else f"{count} recurrences were measured, which the figure of the first {FEW} shows"


def _nothing_beyond(readings: Readings) -> str | None:
    if readings.view.trained is None:
        return "it is not known how many recurrences the model was trained with"
    return None if beyond(readings) else f"no recurrence beyond the trained {readings.view.trained} was measured"


def _type(
    name: str,
    layout: Layout,
    paper: tuple[int, ...],
    *,
    only: str | None = None,
    lines: _Lines = within,
    loops: bool = True,
    unless: _Reason = never,
) -> FigureType[Readings]:
    variables = tuple(quantity.variable for quantity in STAGE_QUANTITIES if only in (None, quantity.anchor))

    def draw(readings: Readings, width: Width) -> Figure:
        return stages(readings, layout, width, only=only, recurrences=lines(readings))

    def absent(readings: Readings) -> str | None:
        # Of all measures together, one is enough.
        reasons = [why_absent(readings, [variable], loops=loops) for variable in variables]
        return reasons[0] if all(reasons) else unless(readings)

    return FigureType(
        name=name,
        draw=draw,
        words=partial(_words, layout, only, lines),
        variables=variables,
        absent=absent,
        paper=paper,
    )


def _words(layout: Layout, only: str | None, lines: _Lines, readings: Readings) -> str:
    quantities = [quantity for quantity in measured(readings) if only in (None, quantity.anchor)]
    named = [
        quantity.name if quantity.name == quantity.y_title else f"{quantity.name} ({quantity.y_title})"
        for quantity in quantities
    ]
    if len(named) > 1:
        named = [f"({letter}) {words}" for letter, words in zip("abcdef", named, strict=False)]
    heads = any("head" in readings.shown[quantity.variable].dims for quantity in quantities)
    sinks = any(quantity.anchor == "sinks" for quantity in quantities)
    sentences = [
        f"At every layer application: {listed(named)}.",
        "Medians over prompts" + (", measures of attention means over heads." if heads else "."),
        f"A head has a sink from {SINK_THRESHOLD:g} of all attention on." if sinks else "",
        line_words(
            readings, layout, "90 % of the prompts" if readings.shown.sizes["prompt"] > 1 else "", lines(readings)
        ),
    ]
    return " ".join(filter(None, sentences))


def _massive_words(readings: Readings) -> str:
    upto = f" of the first {min(FEW, readings.view.recurrences)} recurrences" if readings.view.looped else ""
    return (
        f"Where the largest entry of the residual stream is, at every layer application{upto}: share of prompts in "
        "which it belongs to the first token, and in which it lies in the coordinate where it lies most often there."
    )


STAGE_FIGURES: tuple[FigureType[Readings], ...] = (
    _type("concentration-by-depth", "by depth", (7,), only="concentration", lines=_few, loops=False),
    _type("concentration-by-depth-long", "by depth", (11,), only="concentration", lines=_all, unless=_no_more_than_few),
    _type("concentration-by-recurrence", "by recurrence", (8,), only="concentration"),
    _type("concentration-beyond", "by recurrence", (12,), only="concentration", lines=beyond, unless=_nothing_beyond),
    _type("magnitude-by-depth", "by depth", (9,), only="magnitude", lines=_few, loops=False),
    _type("stages-by-depth", "by depth", (34,), lines=_few, loops=False),
    _type("stages-by-recurrence", "by recurrence", tuple(range(35, 47))),
    _type("stages-by-layer", "by layer", (47, 48, 49)),
    _type("stages-beyond", "by recurrence", (50, 51, 52), lines=beyond, unless=_nothing_beyond),
    study_type("massive-places", massive_places, _massive_words, ("massive_token", "massive_dimension"), loops=False),
    study_type(
        "neurons",
        neurons,
        "Share of MLP neurons whose output raises (prediction) or lowers (suppression) the logits of a few tokens far "
        "more than the rest: its cosines with the unembedding have a kurtosis above 10. From the weights alone.",
        ("prediction_neurons", "suppression_neurons"),
        (32, 33),
        loops=False,
    ),
)
