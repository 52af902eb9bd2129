"""All questions, in the order in which a reader wants them."""

from __future__ import annotations

from loopscope.answers.answer import Answer, Criterion, Outcome
from loopscope.answers.behaviour import behaviour_answer
from loopscope.answers.early_exit import exit_rule_answer
from loopscope.answers.final import final_answer
from loopscope.answers.fixed_point import fixed_point_answer
from loopscope.answers.heads import heads_answer
from loopscope.answers.initial_state import initial_state_answer
from loopscope.answers.limits import limits_answer
from loopscope.answers.readout import loss_answer
from loopscope.answers.settled import arrival_answer, points_answer, trained_depth_answer
from loopscope.answers.stability import stability_answer
from loopscope.answers.stages import stages_answer
from loopscope.study import Study, view_study

_LOOPED = (
    fixed_point_answer,
    behaviour_answer,
    stability_answer,
    points_answer,
    arrival_answer,
    trained_depth_answer,
    initial_state_answer,
    loss_answer,
    final_answer,
    exit_rule_answer,
    heads_answer,
    stages_answer,
)


def quick_answers(study: Study, criterion: Criterion | None = None) -> list[Answer]:
    """What a study says about its model, the main question first and what limits the answers last.

    A feed-forward model has no loop to ask about: it gets the first question, declined, its loss and the limits.
    Every number in a sentence is computed from the study; `criterion` holds every threshold, the defaults of
    `Criterion` unless given.

    Raises `StudyError` if the study lacks a variable that the questions need.
    """
    criterion = criterion or Criterion()
    view = view_study(study)
    if view.looped:
        answers = [ask(view, criterion) for ask in _LOOPED]
    else:
        answers = [_no_loop(criterion), loss_answer(view, criterion)]
    return [*answers, limits_answer(view, criterion, answers)]


def _no_loop(criterion: Criterion) -> Answer:
    return Answer(
        key="fixed_point",
        question="Does it reach a fixed point?",
        outcome=Outcome.NOT_APPLICABLE,
        verdict="no loop",
        sentence="This model is feed-forward: it has no recurrence, so there is nothing that could settle.",
        figure="cycle-similarity",
        criterion=criterion,
    )
