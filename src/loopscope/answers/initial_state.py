"""Does the model forget its initial state?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope._util.statistics import Share, median
from loopscope._util.wording import percent, plural
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
        measured("path_distance", "No other initial state was tried"),
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
    starts, ends = _ends(view, np.maximum(criterion.reached_level, criterion.floor_factor * floor))
    several = starts > 2
    runs, farthest = (f"{starts} runs", "the two farthest") if several else ("two runs", "they")
    now, at_first = percent(median(end)), percent(median(distance[0]))
    apart = (
        f"After {plural(view.recurrences, 'recurrence')} {runs} from different initial states are {now} apart; after "
        f"the first recurrence {farthest} were {at_first} apart (medians over prompts)."
    )
    if several:
        evidence |= {"initial_states": starts, "most_ends_of_a_token": int(ends.max())}
        there = ends[ends > 0]
        apart += (
            " Every token has one end, whichever of them it starts from."
            if there.max() == 1
            else f" {int((there > 1).sum()):,} of {there.size:,} tokens have several ends, up to {there.max()}."
        )
    others = "one other initial state was" if not several else f"{starts - 1} other initial states were"
    limits = [f"Only {others} tried."]
    if together.value >= criterion.prompts_needed:
        outcome, verdict, sentence = Outcome.YES, "yes", f"Yes, in {together}. {apart}"
    elif together.count and 1 - together.value < criterion.prompts_needed:
        outcome, verdict = Outcome.PARTLY, "depends on the prompt"
        sentence = f"It depends on the prompt: the runs meet in {together}. {apart}"
    elif median(end) < criterion.slowing_ratio * median(half):
        outcome, verdict = Outcome.NOT_YET, "not yet"
        sentence = f"Not within the recurrences measured, but the runs still draw closer. {apart}"
        limits.insert(0, "Measure more recurrences to see whether the runs meet.")
    elif view.recurrences < 3:
        outcome, verdict = Outcome.CANNOT_TELL, "cannot tell"
        sentence = f"Cannot tell: it takes three recurrences to see whether the runs draw closer. {apart}"
    else:
        outcome, verdict, sentence = Outcome.NO, "no", f"No: the runs stay apart. {apart}"
    return INITIAL_STATE.says(outcome, verdict, sentence, evidence, limits)


def _ends(view: StudyView, level: NDArray[np.floating]) -> tuple[int, NDArray[np.integer]]:
    """How many runs there were of a prompt, and in how many places those of each token end, (prompt, token); 0 where
    that is not known. Runs end in one place if a chain of them, each within `level`, (prompt,), of the next, joins
    them."""
    if "start_distance" not in view.finite:
        return 2, np.zeros((len(level), 1), dtype=np.int64)
    apart = view.finite["start_distance"].transpose("start", "start_other", "prompt", "token").values
    joined = apart <= level[:, None]
    # Each round doubles the length of the chains.
    for _ in range(len(joined).bit_length()):
        joined = np.einsum("abpt,bcpt->acpt", joined, joined)
    # A run is the first of its group if no earlier one is joined to it.
    earlier = np.tril(np.ones(joined.shape[:2], dtype=np.bool_), -1)[..., None, None]
    ends = (~(joined & earlier).any(1)).sum(0)
    return len(apart), np.where(np.isfinite(apart).all((0, 1)), ends, 0)
