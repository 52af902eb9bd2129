"""Accuracy on a task against recurrences, beside the length of the last step."""

from __future__ import annotations

import math
import re

from loopscope._util.wording import plural
from loopscope.evaluation.result import Evaluation, TaskCurve
from loopscope.report.figures.look import CATEGORIES, ordered_colours
from loopscope.report.figures.plot import Axis, Band, Line, Mark, Panel, Plot, Rule


def accuracy_plots(found: Evaluation) -> dict[str, Plot]:
    """A figure for each metric of each task, by name."""
    plots = [_plot(found, curve) for curve in found.curves if not curve.part and len(curve.points) > 1]
    return {plot.anchor: plot for plot in plots}


def accuracy_left_out(found: Evaluation) -> dict[str, str]:
    """Of the others the reason, by name."""
    reason = "a curve takes two numbers of recurrences, and one was evaluated; evaluate more of them (--recurrences)"
    return {_anchor(curve): reason for curve in found.curves if not curve.part and len(curve.points) == 1}


def _plot(found: Evaluation, curve: TaskCurve) -> Plot:
    parts = [each for each in found.curves if each.part and (each.task, each.metric) == (curve.task, curve.metric)]
    panels = [_panel(found, [curve], [CATEGORIES[0]])]
    reading = f"(a) {curve.metric} on {plural(curve.documents, 'document')} of {curve.task}; grey, one standard error."
    if parts:
        panels.append(_panel(found, parts, ordered_colours(len(parts))))
        reading += " (b) The same by difficulty: lighter is a larger number."
    if found.steps:
        numbers, middle = [each.recurrences for each in found.steps], [each.median for each in found.steps]
        quartiles = Band(x=numbers, low=[each.lower for each in found.steps], high=[each.upper for each in found.steps])
        panels.append(
            Panel(
                x=_recurrences(found),
                y=Axis(title="last step over norm", scale="log"),
                marks=[quartiles, Line(x=numbers, y=middle, colour=CATEGORIES[0], points=True), *_trained(found)],
            )
        )
        letter = "c" if parts else "b"
        reading += (
            f" ({letter}) Length of the last step over the state's norm, where answers are predicted"
            f"{'' if len({each.task for each in found.curves}) == 1 else ', over all tasks'}: median and quartiles."
        )
    return Plot(
        question=f"Does {curve.metric} on {curve.task} rise with recurrences, and keep its level where the state does?",
        reading=reading,
        panels=panels,
        anchor=_anchor(curve),
    )


def _anchor(curve: TaskCurve) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", f"{curve.task} {curve.metric}".lower()).strip("-")
    return f"accuracy-{slug}"


def _panel(found: Evaluation, curves: list[TaskCurve], colours: list[str]) -> Panel:
    marks: list[Mark] = []
    for curve, colour in zip(curves, colours, strict=True):
        numbers = [each.recurrences for each in curve.points]
        values = [math.nan if each.value is None else each.value for each in curve.points]
        errors = [math.nan if each.stderr is None else each.stderr for each in curve.points]
        if len(curves) == 1:
            low, high = (
                [value + sign * error for value, error in zip(values, errors, strict=True)] for sign in (-1, 1)
            )
            marks.append(Band(x=numbers, low=low, high=high))
        marks.append(Line(name=curve.part, x=numbers, y=values, colour=colour, points=True))
    return Panel(x=_recurrences(found), y=Axis(title=curves[0].metric), marks=[*marks, *_trained(found)])


def _recurrences(found: Evaluation) -> Axis:
    return Axis(title="recurrences", scale="log", ticks=found.recurrences)


def _trained(found: Evaluation) -> list[Rule]:
    return [Rule(x=found.trained_recurrences, name="trained")] if found.trained_recurrences in found.recurrences else []
