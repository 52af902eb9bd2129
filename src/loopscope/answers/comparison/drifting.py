"""Does a looped model keep its stages beyond the recurrences it was trained for, and what limits a comparison?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loopscope._util.statistics import wilson_interval
from loopscope._util.wording import listed, percent, plural
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question
from loopscope.answers.comparison.result import Comparison
from loopscope.answers.limits import LIMITS


def drift_answer(comparison: Comparison, label: str, index: int) -> Answer:
    """Every later pass against the pass at the trained number of recurrences, measure by measure.

    A measure is kept if neither its level nor the order of the layers has changed in any later pass; where all layers
    share one value there is no order, and the level decides.
    """
    question = Question(
        key=f"drift-{index}",
        text=f"{label}: do its stages persist beyond the trained recurrences?",
        figure=f"drift-{index}",
    )
    study, settings = comparison.studies[label], comparison.settings
    trained, measured = study["trained_recurrences"], study["recurrences"]
    if trained is None or trained >= measured:
        reason = (
            "The model does not say how many recurrences it was trained with."
            if trained is None
            else f"It was trained with {trained} recurrences, and {measured} were measured."
        )
        return question.says(Outcome.NOT_APPLICABLE, "not measured", reason)
    later = comparison.dataset.sel(study=label).isel(recurrence=slice(trained, measured))
    names = [str(name) for name in later["measure"].values]
    levels = {name: float(later["drift"].sel(measure=name).max()) for name in names}
    shapes = {name: float(later["own_similarity"].sel(measure=name).min()) for name in names}
    known = [name for name in names if not math.isnan(levels[name])]
    if not known:
        return question.says(Outcome.CANNOT_TELL, "cannot tell", "No stage measure of its passes was taken.")
    evidence: Evidence = {f"largest change of level, {name}": levels[name] for name in known}
    evidence |= {f"least own similarity, {name}": shapes[name] for name in known if math.isfinite(shapes[name])}
    kept = [
        name
        for name in known
        if levels[name] <= settings.level_tolerance and not shapes[name] < settings.kept_similarity
    ]
    lost = [name for name in known if name not in kept]
    most = max(known, key=lambda name: levels[name])
    far = f"between recurrences {trained} and {measured}"
    furthest = f"{most} changes most, by {percent(levels[most])}"
    if math.isinf(levels[most]):
        furthest = f"{most} was 0 and is not any more"
    if not lost:
        outcome, verdict = Outcome.YES, "yes"
        sentence = f"No measure changes noticeably {far} ({furthest})."
    elif kept:
        outcome, verdict = Outcome.PARTLY, f"{len(kept)} of {len(known)} measures"
        sentence = (
            f"Between recurrences {trained} and {measured} there is no noticeable change of {listed(kept)}, but of "
            f"{listed(lost)} there is ({furthest})."
        )
    else:
        outcome, verdict = Outcome.NO, "no, they drift"
        sentence = f"Every measure changes {far} ({furthest})."
    return question.says(outcome, verdict, sentence, evidence)


def limits_answer(comparison: Comparison) -> Answer:
    """What these studies themselves show first, then the limits of the method."""
    of_method = [
        "Alike means that curves rise and fall at the same depths, not that the models compute the same. At most 6 in "
        "100 unrelated pairs (independent, wandering or monotone curves) are called alike, and few of the pairs that "
        "share a rise and little else.",
        f"Each p is for one comparison; of many, {100 * comparison.settings.alpha:g} in 100 fall below "
        f"{comparison.settings.alpha:g} by chance. The mean over measures is a single comparison.",
        "Correlation does not see level and scale; the level difference beside it does.",
    ]
    caveats = [sentence for label in comparison.labels for sentence in _caveats(comparison, label)]
    return LIMITS.says(
        Outcome.NOT_APPLICABLE,
        plural(len(caveats), "caveat") if caveats else "those of the method",
        " ".join(caveats) or "Nothing that shows in these studies themselves.",
        limits=[*caveats, *of_method],
    )


def _caveats(comparison: Comparison, label: str) -> list[str]:
    study = comparison.studies[label]
    reference = comparison.studies[comparison.reference]
    found = []
    if label != comparison.reference and not study["same_prompts_as_reference"]:
        if not study["same_model_as_reference"]:
            found.append(f"{label} and {comparison.reference} read different prompts: differences mix model and text.")
        tokens = [_tokens_a_prompt(entry) for entry in (study, reference)]
        if tokens[0] and tokens[1] and not 2 / 3 < tokens[0] / tokens[1] < 3 / 2:
            found.append(
                f"The prompts of {label} have {tokens[0]:.0f} tokens on average, those of {comparison.reference} "
                f"{tokens[1]:.0f}; the levels of attention concentration and sink rate depend on length."
            )
    if changes := study.get("interventions"):
        found.append(f"{label} was changed while it ran ({', '.join(changes)}).")
    count, needed = study["prompts"]["count"], Criterion().min_prompts
    if count and count < needed:
        low, _ = wilson_interval(count, count)
        found.append(
            f"{label} has {plural(count, 'prompt')}: what all of them show may still fail for up to "
            f"{math.ceil(100 - 100 * low)} % of such prompts (95 % Wilson interval)."
        )
    if study["dtype"] != reference["dtype"]:
        found.append(f"{label} ran in {study['dtype']}, {comparison.reference} in {reference['dtype']}.")
    if study["missing"]:
        found.append(f"{label} has no {listed(study['missing'])}.")
    if study["diverged_prompts"]:
        found.append(f"{plural(study['diverged_prompts'], 'prompt')} of {label} diverged and are left out.")
    if study["recurrences"] and study["trained_recurrences"] is None:
        found.append(
            f"{label} does not say how many recurrences it was trained with, so its last measured one is judged."
        )
    return found


def _tokens_a_prompt(study: Mapping[str, Any]) -> float:
    prompts = study["prompts"]
    return prompts["tokens"] / prompts["count"] if prompts["tokens"] and prompts["count"] else 0.0
