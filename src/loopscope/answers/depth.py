"""Is the state still moving at the depth the model was trained for?"""

from __future__ import annotations

import math

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.criterion import Criterion
from loopscope.answers.statistics import mean, median
from loopscope.answers.view import StudyView
from loopscope.answers.wording import percent, plural, significant

__all__ = ["trained_depth_answer"]

_QUESTION = "Has it settled at the depth it was trained for?"


def trained_depth_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Compare the trained number of recurrences with the last one measured (medians over prompts, layer that is
    farthest)."""
    trained = view.trained
    if trained is None:
        return _unanswered("not known", "The model does not say how many recurrences it was trained with.", criterion)
    if trained > view.recurrences:
        return _unanswered(
            "not measured",
            f"It was trained with {trained} recurrences, but only {view.recurrences} were measured.",
            criterion,
        )
    if not view.finite.sizes["prompt"]:
        return _unanswered("it diverges", "Every prompt diverged, so there is no state to follow.", criterion)

    step = _median_by_recurrence(view, "relative_step")
    distance = _median_by_recurrence(view, "relative_distance")
    there, last = trained - 1, view.recurrences - 1
    evidence: dict[str, float | str] = {
        "trained_recurrences": float(trained),
        "relative_distance_at_trained": distance[there],
        "relative_step_at_trained": step[there],
        "relative_distance_at_last": distance[last],
        "relative_step_at_last": step[last],
    }
    far = distance[there] > criterion.reached_level
    # The first recurrence has no step (NaN compares as False); its distance alone decides.
    moving = step[there] > criterion.drift_tolerance
    state = (
        f"After the {plural(trained, 'recurrence')} of training it is {percent(distance[there])} away from its "
        f"state at recurrence {view.horizon}"
    )
    if math.isfinite(step[there]):
        state += f", and the last of these recurrences moved it by {percent(step[there])}"
    later = f"; after {view.recurrences} it is {percent(distance[last])} away" if last > there else ""
    sentence = f"{'No, it is still moving' if far or moving else 'Yes'}. {state}{later}." + _loss_sentence(
        view, trained, evidence
    )
    limits = []
    if view.horizon <= trained:
        limits.append("The horizon is no deeper than the training was, so it cannot show what happens beyond.")
    if view.recurrences == trained:
        limits.append("Nothing beyond the trained depth was measured but the horizons.")
    return Answer(
        key="trained_depth",
        question=_QUESTION,
        outcome=Outcome.NO if far or moving else Outcome.YES,
        verdict="no, still moving" if far or moving else "yes",
        sentence=sentence,
        evidence=evidence,
        figure="step",
        limits=limits,
        criterion=criterion,
    )


def _median_by_recurrence(view: StudyView, name: str) -> list[float]:
    """Of the layer with the largest value, median over the finite prompts."""
    values = view.finite[name].max("layer").transpose("recurrence", "prompt").values
    return [median(row) for row in values]


def _loss_sentence(view: StudyView, trained: int, evidence: dict[str, float | str]) -> str:
    """What the loss does beyond the trained depth, if it was read out at both ends."""
    if "loss" not in view.finite:
        return ""
    loss = view.finite["loss"]
    readouts = [int(value) for value in loss["readout_recurrence"].values]
    if trained not in readouts or readouts[-1] <= trained:
        return ""
    means = [mean(loss.sel(readout_recurrence=at).values) for at in (trained, readouts[-1])]
    evidence |= {"loss_at_trained": means[0], "loss_at_last": means[1]}
    return f" The loss is {significant(means[0], 3)} nats there and {significant(means[1], 3)} after {readouts[-1]}."


def _unanswered(verdict: str, sentence: str, criterion: Criterion) -> Answer:
    return Answer(
        key="trained_depth",
        question=_QUESTION,
        outcome=Outcome.NOT_APPLICABLE,
        verdict=verdict,
        sentence=sentence,
        figure="step",
        criterion=criterion,
    )
