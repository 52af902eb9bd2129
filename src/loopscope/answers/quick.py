"""All questions, in the order in which a reader wants them; and the answers as numbers alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from loopscope.answers.answer import Answer, Criterion, Question
from loopscope.answers.behaviour import BEHAVIOUR, behaviour_answer
from loopscope.answers.consistency import consistent
from loopscope.answers.criteria import CRITERIA, criteria_answer
from loopscope.answers.early_exit import EXIT_RULE, exit_rule_answer
from loopscope.answers.fixed_point import FIXED_POINT, fixed_point_answer
from loopscope.answers.heads import HEADS, heads_answer
from loopscope.answers.initial_state import INITIAL_STATE, initial_state_answer
from loopscope.answers.limits import limits_answer
from loopscope.answers.rates import study_rates
from loopscope.answers.readout import FINAL, LOSS, final_answer, loss_answer
from loopscope.answers.settled import (
    ARRIVAL,
    POINTS,
    TRAINED_DEPTH,
    arrival_answer,
    points_answer,
    trained_depth_answer,
)
from loopscope.answers.stability import STABILITY, stability_answer
from loopscope.answers.stages import STAGES, stages_answer
from loopscope.study import Study, StudyView, trusted, view_study

_LOOPED: tuple[tuple[Question, Callable[[StudyView, Criterion], Answer]], ...] = (
    (FIXED_POINT, fixed_point_answer),
    (BEHAVIOUR, behaviour_answer),
    (STABILITY, stability_answer),
    (POINTS, points_answer),
    (ARRIVAL, arrival_answer),
    (TRAINED_DEPTH, trained_depth_answer),
    (INITIAL_STATE, initial_state_answer),
    (LOSS, loss_answer),
    (FINAL, final_answer),
    (CRITERIA, criteria_answer),
    (EXIT_RULE, exit_rule_answer),
    (HEADS, heads_answer),
    (STAGES, stages_answer),
)
"""Each with what answers it where the study has what it needs."""


def quick_answers(study: Study, criterion: Criterion | None = None) -> list[Answer]:
    """What a study says about its model, the main question first and what limits the answers last.

    Answers that contradict each other are withdrawn (see `consistent`). A feed-forward model has no loop to ask about:
    it gets the first question, declined, its loss and the limits.
    Every number in a sentence is computed from the study; `criterion` holds every threshold, the defaults of
    `Criterion` unless given.

    Raises `StudyError` if the study lacks a variable that the questions need.
    """
    with trusted([study]):
        return _answers(view_study(study), criterion or Criterion())


def _answers(view: StudyView, criterion: Criterion) -> list[Answer]:
    if view.looped:
        answers = [question.declined(view) or ask(view, criterion) for question, ask in _LOOPED]
    else:
        no_loop = "This model is feed-forward: it has no recurrence, so there is nothing that could settle."
        first = FIXED_POINT.unanswered("no loop", no_loop, figure="cycle-similarity")
        answers = [first, LOSS.declined(view) or loss_answer(view, criterion)]
    answers = consistent(answers)
    answers.append(limits_answer(view, criterion, answers))
    return [dataclasses.replace(answer, criterion=criterion) for answer in answers]


def study_metrics(study: Study) -> dict[str, float]:
    """A study as a flat dictionary, for those who follow many runs: the numbers that the answers rest on, as
    `QUESTION/NAME`, and the share of the decided tokens that are of each kind, as `tokens/KIND`. What is not finite, or
    was not measured, is absent."""
    found = {
        f"{answer.key}/{name}": value for answer in quick_answers(study) for name, value in answer.evidence.items()
    }
    if "verdict" in study.dataset:
        found |= {f"tokens/{each.kind}": each.share for each in study_rates(study).tokens if each.decided}
    return {
        name.replace(" ", "_"): float(value)
        for name, value in found.items()
        if not isinstance(value, str) and math.isfinite(value)
    }
