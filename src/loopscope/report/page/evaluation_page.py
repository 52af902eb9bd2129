"""The page of an evaluation: accuracy against recurrences, beside how the state settles."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from loopscope._util.wording import visible
from loopscope.answers.answer import Answer, Outcome
from loopscope.evaluation.result import CurvePoint, Evaluation, TaskCurve
from loopscope.report.figures.accuracy import accuracy_plots
from loopscope.report.figures.plot import Section
from loopscope.report.page.html import render_template

_LIMITS = (
    "Changes are told apart from none by 95 % intervals over documents, one number of recurrences at a time; of many "
    "numbers and tasks one in twenty is beyond its interval by chance.",
    "That accuracy changes with recurrences says that this model uses them, and not that the task needs them.",
    "A short last step says that the state moves little, and not that it is near where it will end.",
)
_WORDS = {1: "rises", 0: "no measurable change", -1: "falls"}


def render_evaluation(found: Evaluation) -> str:
    """The whole page as HTML."""
    plots = accuracy_plots(found)
    section = Section(
        anchor="accuracy",
        short="Accuracy",
        title="What recurrences are worth",
        lead="Each task after several numbers of recurrences, and how long the last step was.",
        figures=list(plots.values()),
    )
    tables = [dataclasses.replace(each, anchor=f"table-{n}") for n, each in enumerate(found.tables(), 1)]
    trained = "not known" if found.trained_recurrences is None else str(found.trained_recurrences)
    facts = [
        ("trained with", f"{trained} recurrences"),
        ("asked for", ", ".join(map(str, found.recurrences))),
        ("run in", found.dtype),
    ]
    return render_template(
        "evaluation.html",
        heading=f"{visible(found.model, 80)} on tasks",
        facts=facts,
        answers=[evaluation_answer(found, curve) for curve in found.curves if not curve.part],
        limits=list(_LIMITS),
        tables=tables,
        sections=[section] if section.figures else [],
        thresholds=[("documents at most", "all" if found.limit is None else str(found.limit), "")],
        provenance=[("model", [("name", found.model), ("weights", found.weights_sha256), ("seed", str(found.seed))])],
    )


def evaluation_answer(found: Evaluation, curve: TaskCurve) -> Answer:
    """What it does from the smallest number to the one that changes are from, and from there to the largest."""
    to, beyond = (_sign(curve.points[place]) for place in (0, -1))
    to = None if to is None else -to
    moves = {sign for sign in (to, beyond) if sign is not None}
    if not moves:
        outcome = Outcome.CANNOT_TELL
    elif 1 in moves:
        outcome = Outcome.PARTLY if -1 in moves else Outcome.YES
    elif -1 in moves or not any(point.unlike for point in curve.points):
        outcome = Outcome.NO
    else:
        outcome = Outcome.CANNOT_TELL
    parts = [
        f"{_WORDS[sign]} {where} {curve.reference}"
        for sign, where in ((to, "to"), (beyond, "beyond"))
        if sign is not None
    ]
    return Answer(
        key="accuracy",
        question=f"Does {curve.metric} on {curve.task} rise with recurrences?",
        outcome=outcome,
        verdict=", ".join(parts) or "not compared",
        sentence=" ".join(found.said_of(curve)) or "No two numbers of recurrences can be compared by document.",
        evidence={
            f"{curve.metric} after {point.recurrences}": math.nan if point.value is None else point.value
            for point in curve.points
        },
    )


def _sign(point: CurvePoint) -> int | None:
    """Of a change that its interval tells from none, else 0; None where there is none to tell."""
    if point.change is None or point.change_half_width is None:
        return None
    return int(np.sign(point.change)) if point.unlike and abs(point.change) > point.change_half_width else 0
