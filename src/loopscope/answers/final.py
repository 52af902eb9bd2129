"""When is the answer final, token by token?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope._util.statistics import mean
from loopscope._util.wording import percent, plural, significant, spans
from loopscope.answers.answer import Answer, Criterion, Evidence, Need, Outcome, Question, some_finite
from loopscope.study import StudyView

FINAL = Question(
    key="final",
    text="After how many recurrences is the answer final?",
    figure="final-token",
    needs=(
        Need(
            lambda view: "token_top1" in view.finite and view.finite.sizes["readout_recurrence"] > 1,
            "The answer was read out once or not at all.",
        ),
        some_finite("there is no answer to follow"),
    ),
)


def final_answer(view: StudyView, criterion: Criterion) -> Answer:
    """The first readout from which each token's most probable next token stays that of the last readout."""
    counts = [int(count) for count in view.finite["readout_recurrence"].values]
    top = view.finite["token_top1"].transpose("readout_recurrence", "prompt", "token").values
    there = top[-1] >= 0
    place = final_from(top)[there]
    share = [float((place <= index).mean()) for index in range(len(counts))]
    enough = next(index for index, value in enumerate(share) if value >= criterion.tokens_needed)
    divergence = view.finite["token_kl_to_last"].transpose("readout_recurrence", "prompt", "token").values
    evidence: Evidence = {}
    for index, count in enumerate(counts):
        if count & (count - 1) and count != view.trained and index not in (enough, len(counts) - 1):
            continue  # of many readouts those at powers of two are enough to see the course
        evidence[f"tokens_final_after_{count}"] = share[index]
        evidence[f"kl_to_last_after_{count}"] = mean(divergence[index])
    last = counts[-1]
    if enough == len(counts) - 1:
        outcome, verdict = Outcome.NO, f"not before {last}"
        sentence = (
            f"Not before the last readout: after {plural(counts[-2], 'recurrence')} {percent(share[-2])} of the tokens "
            f"already have the most probable next token that they have after {last}."
        )
    else:
        outcome, verdict = Outcome.YES, f"after {counts[enough]}"
        away = significant(mean(divergence[enough]))
        sentence = (
            f"From {plural(counts[enough], 'recurrence')} on, {percent(share[enough])} of the tokens keep their most "
            f"probable next token up to the last readout, after {last}. The prediction is then {away} nats from the "
            "last one (KL divergence, mean over tokens)."
        )
    limits = [f"The model was read out after {spans(counts)} recurrences only; in between the answer may differ."]
    return FINAL.says(outcome, verdict, sentence, evidence, limits)


def final_from(top: NDArray[np.integer]) -> NDArray[np.int64]:
    """Index of the first readout from which the top token stays the last one's; `top` is (readout, ...)."""
    same = top == top[-1]
    # How many readouts, counted from the end, agree without a break.
    unbroken = np.cumprod(same[::-1], axis=0).sum(axis=0)
    return np.asarray(len(top) - unbroken, dtype=np.int64)
