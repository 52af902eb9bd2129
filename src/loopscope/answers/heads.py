"""Do the attention heads stabilise?"""

from __future__ import annotations

import numpy as np

from loopscope._util.statistics import median
from loopscope._util.wording import percent, plural, significant
from loopscope.answers.answer import Answer, Criterion, Evidence, Need, Outcome, Question, measured, some_finite
from loopscope.study import StudyView

HEADS = Question(
    key="heads",
    text="Do the attention heads stabilise?",
    figure="heads-stable",
    needs=(
        measured("head_stable_from", "No head's change was measured"),
        Need(lambda view: view.recurrences > 2, "It takes three recurrences to see whether a change stays small."),
        some_finite("there are no heads to follow"),
    ),
)


def heads_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Shares of (layer, head, prompt) whose map changes by little from some recurrence on, and when."""
    change = view.finite["attention_change"] / np.sqrt(view.finite["token_count"])
    found = view.finite["head_stable_from"].transpose("layer", "head", "prompt")
    seen = np.isfinite(change.isel(recurrence=-1).transpose("layer", "head", "prompt").values)
    if not seen.any():
        return HEADS.unanswered("cannot be seen", "No layer's attention can be seen in this model.")
    stable = np.isfinite(found.values[seen])
    share = float(stable.mean())
    from_count = median(found.values)
    last = change.isel(recurrence=-1)
    middle = last.median("prompt").transpose("layer", "head").fillna(-1).values
    layer, head = (int(place) for place in np.unravel_index(int(middle.argmax()), middle.shape))
    largest = float(last.sel(layer=layer, head=head).median("prompt"))
    evidence: Evidence = {
        "share_of_heads_stable": share,
        "recurrences_median": from_count,
        "threshold": view.head_stable,
        "change_per_row_at_last": median(last.values),
        "most_restless": f"layer {layer}, head {head}",
        "its_change_per_row_at_last": largest,
    }
    over_bound = _largest_over_bound(view)
    if np.isfinite(over_bound):
        evidence["largest_change_over_its_bound"] = over_bound
    said = (
        f"In {percent(share)} of all cases (layer, head and prompt) the attention map changes by less than "
        f"{view.head_stable:g} per row from some recurrence on"
    )
    when = f", in half of them after {plural(int(from_count), 'recurrence')}" if share > 0 else ""
    restless = f" Head {head} of layer {layer} changes most, by {significant(largest)} per row in the last recurrence."
    if share >= criterion.prompts_needed:
        outcome, verdict, answer = Outcome.YES, f"yes, after about {int(from_count)}", "Yes."
    elif share <= 1 - criterion.prompts_needed:
        outcome, verdict, answer = Outcome.NO, "no", "No."
    else:
        outcome, verdict, answer = Outcome.PARTLY, "some of them", "Some do."
    limits = []
    if over_bound > 1:
        limits.append("A map changed by more than its queries and keys allow, an error of loopscope: please report it.")
    if share < 1:
        limits.append(f"A head that is not stable within {view.recurrences} recurrences may become so later.")
    if from_count > 0.75 * view.recurrences:
        limits.append(
            "Half of the stable heads became so in the last quarter of the recurrences measured: measure more of them."
        )
    return HEADS.says(outcome, verdict, f"{answer} {said}{when}.{restless}", evidence, limits)


def _largest_over_bound(view: StudyView) -> float:
    """NaN where no queries and keys were seen."""
    if "attention_bound_ratio" not in view.finite:
        return float("nan")
    ratio = view.finite["attention_bound_ratio"].values
    finite = ratio[np.isfinite(ratio)]
    return float(finite.max()) if finite.size else float("nan")
