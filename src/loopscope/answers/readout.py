"""Does the loss get better with recurrences, and when is the answer final, token by token?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loopscope._util.statistics import mean, paired_difference
from loopscope._util.wording import listed, percent, plural, significant, spans
from loopscope.answers.answer import Answer, Criterion, Evidence, Need, Outcome, Question, measured, some_finite
from loopscope.study import StudyView

LOSS = Question(
    key="loss",
    text="Does the loss improve with more recurrences?",
    figure="loss",
    needs=(measured("loss", "The loss was not read out"),),
)


def loss_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Compare the best readout with the first and the last one, prompt by prompt (paired), so that easy and hard
    prompts do not blur the difference."""
    loss = view.finite["loss"].transpose("readout_recurrence", "prompt")
    means = np.array([mean(row) for row in loss.values])
    if not np.isfinite(means).all():
        return LOSS.unanswered("no loss", "No prompt has a finite loss at every readout.")
    at = [int(count) for count in loss["readout_recurrence"].values]
    if not view.looped or len(at) < 2:
        what = "A feed-forward model has one readout" if not view.looped else f"It was read out once, after {at[0]}"
        nats = f"{significant(means[-1], 3)} nats"
        said = f"{what}; its mean loss is {nats} a token."
        return LOSS.says(Outcome.NOT_APPLICABLE, nats, said, {"loss": float(means[-1])})

    best = int(means.argmin())
    gain = paired_difference(loss.values[0], loss.values[best])
    decline = paired_difference(loss.values[-1], loss.values[best])
    improves, worsens = gain.exceeds(criterion.loss_tolerance), decline.exceeds(criterion.loss_tolerance)
    enough = at[int(np.argmax(means <= means[best] + criterion.loss_tolerance))]
    evidence: Evidence = {
        "best_at": float(at[best]),
        "loss_at_best": float(means[best]),
        "loss_at_first_readout": float(means[0]),
        "loss_at_last_readout": float(means[-1]),
        "gain_first_to_best": gain.mean,
        "gain_half_width": gain.half_width,
        "loss_best_to_last": decline.mean,
        "within_tolerance_from": float(enough),
    }
    first = f"{significant(means[0], 3)} nats after {plural(at[0], 'recurrence')}"
    lowest = f"{significant(means[best], 3)} after {at[best]}"
    last = f"{significant(means[-1], 3)} after {at[-1]}"
    if improves and worsens:
        outcome, verdict = Outcome.PARTLY, f"yes, then worse beyond {at[best]}"
        sentence = f"Up to a point: from {first} to {lowest}, then up to {last}."
    elif improves:
        outcome = Outcome.YES
        verdict = f"yes, up to about {enough}" if enough < at[-1] else "yes, to the last readout"
        sentence = f"Yes: from {first} to {lowest}."
        if enough < at[best]:
            sentence += f" After {enough} it is within {criterion.loss_tolerance:g} nats of that."
        if decline.mean > criterion.loss_tolerance:
            sentence += f" It then rises to {last}, which may be chance with {plural(loss.sizes['prompt'], 'prompt')}."
        elif best < len(at) - 1:
            sentence += f" It then stays level: {last}."
    elif worsens:
        outcome, verdict = Outcome.NO, "no, it gets worse"
        sentence = f"No: it is lowest, {significant(means[best], 3)} nats, after {at[best]} and rises to {last}."
    elif max(gain.mean, decline.mean) > criterion.loss_tolerance:
        outcome, verdict = Outcome.CANNOT_TELL, "cannot tell: it may be chance"
        told = [first, *([lowest] if 0 < best < len(at) - 1 else []), last]
        sentence = (
            f"Cannot tell: with {plural(loss.sizes['prompt'], 'prompt')}, the "
            f"{'differences' if len(told) > 2 else 'difference'} between {listed(told)} may be chance (Student's t, "
            "95 %)."
        )
    else:
        outcome, verdict = Outcome.NO, "no clear difference"
        sentence = f"No: {first} and {last} differ by no more than {criterion.loss_tolerance:g} nats."
    limits = ["The loss is measured on the prompts' own tokens, not on answers to them."]
    if loss.sizes["prompt"] == 1:
        limits.append("With one prompt, nothing shows whether a difference is due to chance.")
    return LOSS.says(outcome, verdict, sentence, evidence, limits)


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
