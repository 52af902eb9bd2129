"""Does the model forget its initial state?"""

from __future__ import annotations

import numpy as np

from loopscope._util.statistics import Share, median
from loopscope._util.wording import percent
from loopscope.answers.answer import Answer, Criterion, Evidence, Need, Outcome, Question, measured, some_finite
from loopscope.answers.settling import noise_floor
from loopscope.study import StudyView

INITIAL_STATE = Question(
    key="initial_state",
    text="Does it forget its initial state?",
    figure="path-independence",
    needs=(
        Need(
            lambda view: view.injection != "none",
            "There is no input injection: the prompt enters through the initial state alone, and a model that forgot "
            "it would forget the prompt.",
            "not a fair question",
        ),
        Need(
            lambda view: view.injection != "unknown",
            "The model is seen from outside, where its initial state cannot be set.",
            "cannot be tried",
        ),
        measured("path_distance", "The analysis was told to skip path independence."),
        some_finite("there are no trajectories to compare"),
    ),
    drawn=lambda view: "path_distance" in view.dataset,
)


def initial_state_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Path independence: two trajectories of a prompt, from different initial states, end together or not.

    The notion is that of Anil et al., "Path Independent Equilibrium Models Can Better Exploit Test-Time
    Computation" (NeurIPS 2022).
    """
    distance = view.finite["path_distance"].max("layer").transpose("recurrence", "prompt").values
    # Half way against the end: a distance that has stopped shrinking by then will not vanish later.
    end, half = distance[-1], distance[(len(distance) - 1) // 2]
    floor = noise_floor(view.finite).max("layer").fillna(0).values
    together = Share(int((end <= np.maximum(criterion.reached_level, criterion.floor_factor * floor)).sum()), len(end))
    evidence: Evidence = {
        "path_distance_at_first": median(distance[0]),
        "path_distance_at_half": median(half),
        "path_distance_at_last": median(end),
        "prompts_that_forget": str(together),
    }
    apart = (
        f"After {view.recurrences} recurrences two runs from different initial states are "
        f"{percent(median(end))} apart, after the first they were {percent(median(distance[0]))} apart "
        "(medians over prompts)."
    )
    limits = ["One other initial state was tried, not all."]
    if together.value >= criterion.prompts_needed:
        outcome, verdict, sentence = Outcome.YES, "yes", f"Yes, in {together}. {apart}"
    elif together.count and 1 - together.value < criterion.prompts_needed:
        outcome, verdict = Outcome.PARTLY, "depends on the prompt"
        sentence = f"It depends on the prompt: the runs meet in {together}. {apart}"
    elif median(end) < criterion.slowing_ratio * median(half):
        outcome, verdict = Outcome.NOT_YET, "not yet"
        sentence = f"Not within the recurrences measured, but the runs still draw closer. {apart}"
        limits.insert(0, "Measure more recurrences to see whether the runs meet.")
    else:
        outcome, verdict, sentence = Outcome.NO, "no", f"No: the runs stay apart. {apart}"
    return INITIAL_STATE.says(outcome, verdict, sentence, evidence, limits)
