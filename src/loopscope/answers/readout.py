"""Does the loss get better with recurrences?"""

from __future__ import annotations

import numpy as np

from loopscope._util.statistics import mean, paired_difference
from loopscope._util.wording import plural, significant
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question, measured
from loopscope.study import StudyView

LOSS = Question(
    key="loss",
    text="Does the loss improve with more recurrences?",
    figure="loss",
    needs=(measured("loss", "The analysis was told to skip the readout."),),
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
        if best < len(at) - 1:
            sentence += f" It then stays level: {last}."
    elif worsens:
        outcome, verdict = Outcome.NO, "no, it gets worse"
        sentence = f"No: it is lowest, {significant(means[best], 3)} nats, after {at[best]} and rises to {last}."
    elif max(gain.mean, decline.mean) > criterion.loss_tolerance:
        outcome, verdict = Outcome.CANNOT_TELL, "cannot tell: it may be chance"
        sentence = (
            f"Cannot tell: with {plural(loss.sizes['prompt'], 'prompt')}, the differences between {first}, {lowest} "
            f"and {last} may be chance (Student's t, 95 %)."
        )
    else:
        outcome, verdict = Outcome.NO, "no clear difference"
        sentence = f"No: {first} and {last} differ by no more than {criterion.loss_tolerance:g} nats."
    limits = ["The loss is measured on the prompts' own tokens, not on answers to them."]
    if loss.sizes["prompt"] == 1:
        limits.append("With one prompt, nothing shows whether a difference is due to chance.")
    return LOSS.says(outcome, verdict, sentence, evidence, limits)
