"""Does a looped model keep its stages beyond the recurrences it was trained for?"""

from __future__ import annotations

import math

from loopscope.answers import Answer, Outcome
from loopscope.answers.wording import listed, percent
from loopscope.comparison.result import Comparison

__all__ = ["drift_answer"]


def drift_answer(comparison: Comparison, label: str, index: int) -> Answer:
    """Every later pass against the pass at the trained number of recurrences, measure by measure.

    A measure is kept if neither its level nor the order of the layers has changed in any later pass; where all layers
    share one value there is no order, and the level decides.
    """
    study, settings = comparison.studies[label], comparison.settings
    trained, measured = study["trained_recurrences"], study["recurrences"]
    if trained is None or trained >= measured:
        reason = (
            "The model does not say how many recurrences it was trained with."
            if trained is None
            else f"It was trained with {trained} recurrences, and {measured} were measured."
        )
        return _answer(label, index, Outcome.NOT_APPLICABLE, "not measured", reason)
    later = comparison.dataset.sel(study=label).isel(recurrence=slice(trained, measured))
    names = [str(name) for name in later["measure"].values]
    levels = {name: float(later["drift"].sel(measure=name).max()) for name in names}
    shapes = {name: float(later["own_similarity"].sel(measure=name).min()) for name in names}
    known = [name for name in names if not math.isnan(levels[name])]
    if not known:
        return _answer(label, index, Outcome.CANNOT_TELL, "cannot tell", "No stage measure was taken in its passes.")
    evidence: dict[str, float | str] = {f"largest change of level, {name}": levels[name] for name in known}
    evidence |= {f"least own similarity, {name}": shapes[name] for name in known if math.isfinite(shapes[name])}
    kept = [
        name
        for name in known
        if levels[name] <= settings.level_tolerance and not shapes[name] < settings.kept_similarity
    ]
    lost = [name for name in known if name not in kept]
    most = max(known, key=lambda name: levels[name])
    far = f"between recurrences {trained} and {measured}"
    furthest = f"{most} moves most, by {percent(levels[most])}"
    if math.isinf(levels[most]):
        furthest = f"{most} leaves 0"
    if not lost:
        outcome, verdict = Outcome.YES, "yes"
        sentence = f"Every measure stays as it is {far} ({furthest})."
    elif kept:
        outcome, verdict = Outcome.PARTLY, f"{len(kept)} of {len(known)} measures"
        sentence = f"It keeps {listed(kept)} {far}, but not {listed(lost)} ({furthest})."
    else:
        outcome, verdict = Outcome.NO, "no, they drift"
        sentence = f"No measure stays as it is {far} ({furthest})."
    return _answer(label, index, outcome, verdict, sentence, evidence)


def _answer(
    label: str,
    index: int,
    outcome: Outcome,
    verdict: str,
    sentence: str,
    evidence: dict[str, float | str] | None = None,
) -> Answer:
    return Answer(
        key=f"drift-{index}",
        question=f"{label}: do the stages stay beyond the recurrences of its training?",
        outcome=outcome,
        verdict=verdict,
        sentence=sentence,
        evidence=evidence or {},
        figure=f"drift-{index}",
    )
