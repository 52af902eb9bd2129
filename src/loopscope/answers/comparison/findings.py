"""What a comparison says in plain sentences, drawn from its numbers and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from loopscope._util.wording import listed, percent, significant
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question
from loopscope.answers.comparison.drifting import drift_answer, limits_answer
from loopscope.answers.comparison.null import NULLS, fewest_points
from loopscope.answers.comparison.result import Comparison

_LIKE = (Outcome.YES, Outcome.PARTLY)


@dataclass(frozen=True)
class Finding:
    """A similarity with what it has to be held against, or NaN everywhere: cannot tell."""

    value: float
    reversed: float
    """With the layers in reverse order."""
    null_high: float
    """95 % of the curves of the null that comes closest correlate less."""
    p_value: float
    """The largest by any null."""
    alike: bool
    """As rare as `alpha` among the curves of every null, and better than the reversed curve."""
    closest: str
    """The null that comes closest."""
    interval: tuple[float, float]
    """95 % over prompts, where the study is judged; NaN elsewhere and with one prompt."""

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)

    def __str__(self) -> str:
        return (
            f"correlation {self.value:.2f}{self._over_prompts}, where 95 % of curves with {self.closest} stay below "
            f"{self.null_high:.2f} and the reversed curve has {self.reversed:.2f} (p {p_text(self.p_value)})"
        )

    @property
    def _over_prompts(self) -> str:
        low, high = self.interval
        return f" ({low:.2f} to {high:.2f} over prompts)" if math.isfinite(low) else ""


def finding_of(
    comparison: Comparison, label: str, span: str, measure: str | None = None, recurrence: int | None = None
) -> Finding:
    """The similarity of one study's pass with the reference: of a measure, or the mean over those that can be judged;
    at a recurrence (from 1), or where the study is judged."""
    data = comparison.dataset.sel(study=label, span=span)
    at = (recurrence or comparison.studies[label]["judged_at"] or 1) - 1
    prefix, data = ("overall_", data) if measure is None else ("", data.sel(measure=measure))
    value, backwards, p_value = (
        float(data[f"{prefix}{name}"].isel(recurrence=at)) for name in ("similarity", "reversed_similarity", "p_value")
    )
    null = data[f"{prefix}null_quantile"].isel(recurrence=at).values
    alike = bool(p_value <= comparison.settings.alpha and value > backwards)  # NaN compares as False
    return Finding(
        value=value,
        reversed=backwards,
        null_high=float(null[-1]),
        p_value=p_value,
        alike=alike,
        closest=_closest(data, f"{prefix}null_p_value", at),
        interval=_interval(data, f"{prefix}similarity_interval") if recurrence is None else (math.nan, math.nan),
    )


def _closest(data: xr.Dataset, name: str, at: int) -> str:
    """The null of the largest p. An older comparison has shuffled layers alone."""
    if name not in data or not np.isfinite(values := data[name].isel(recurrence=at).values).all():
        return NULLS[0]
    return NULLS[int(values.argmax())]


def _interval(data: xr.Dataset, name: str) -> tuple[float, float]:
    low, high = data[name].values.tolist() if name in data else (math.nan, math.nan)
    return low, high


def comparison_answers(comparison: Comparison) -> list[Answer]:
    """The likeness of every study to the reference, the drift of every looped one, and last what limits the answers."""
    others = [label for label in comparison.labels if label != comparison.reference]
    answers = [
        _same_model(comparison, label, index)
        if comparison.studies[label]["same_model_as_reference"]
        else _other_model(comparison, label, index)
        for index, label in enumerate(others)
    ]
    if len(answers) > 1:
        answers.insert(0, _overview(comparison, others, answers))
    looped = [label for label in comparison.labels if comparison.studies[label]["recurrences"]]
    drifts = [drift_answer(comparison, label, index) for index, label in enumerate(looped)]
    return [*answers, *drifts, limits_answer(comparison)]


def p_text(p_value: float) -> str:
    """A sample says no more of small numbers than that they are small."""
    return "below 0.001" if p_value < 0.001 else significant(p_value) if math.isfinite(p_value) else "–"


def _overview(comparison: Comparison, others: list[str], answers: list[Answer]) -> Answer:
    alike = [label for label, answer in zip(others, answers, strict=True) if answer.outcome in _LIKE]
    unknown = [label for label, answer in zip(others, answers, strict=True) if answer.outcome is Outcome.CANNOT_TELL]
    outcome = Outcome.YES if len(alike) == len(others) else Outcome.PARTLY if alike else Outcome.NO
    if len(unknown) == len(others):
        outcome = Outcome.CANNOT_TELL
    rule = (
        "Curves count as alike if few curves with shuffled layers, random phases or bent depth come as close, and if "
        "they correlate better than the reversed curve."
    )
    each = " ".join(f"{label}: {answer.verdict}." for label, answer in zip(others, answers, strict=True))
    question = Question(
        key="overview",
        text=f"Which of the others go through the stages of {comparison.reference}?",
        figure=f"table-{comparison.labels.index(others[0])}",
    )
    return question.says(
        outcome,
        f"{len(alike)} of {len(others)}" if len(unknown) < len(others) else "cannot tell",
        f"{each} {rule}",
        {
            f"{label}, {span}": _short(finding_of(comparison, label, span))
            for label in others
            for span in _spans(comparison, label)
        },
    )


def _short(finding: Finding) -> str:
    return f"r {finding.value:.2f}, p {p_text(finding.p_value)}" if finding.known else "cannot tell"


def _spans(comparison: Comparison, label: str) -> tuple[str, ...]:
    """Block and pass, or the pass alone where there is nothing outside the block."""
    layout = comparison.studies[label]["layout"]
    return ("block", "pass") if layout["recurrent"] and layout["prelude"] + layout["coda"] else ("pass",)


def _other_model(comparison: Comparison, label: str, index: int) -> Answer:
    study, reference = comparison.studies[label], comparison.reference
    looped, spans = bool(study["recurrences"]), _spans(comparison, label)
    whole = finding_of(comparison, label, "pass")
    block = finding_of(comparison, label, "block") if "block" in spans else whole
    passes = _like_passes(comparison, label) if looped else ""
    if not (whole.known or block.known):
        outcome, verdict, sentence = Outcome.CANNOT_TELL, "cannot tell", _why_unknown(comparison, label)
    elif not looped:
        outcome = Outcome.YES if whole.alike else Outcome.NO
        verdict = "yes" if whole.alike else "not shown"
        sentence = f"Over its whole depth: {whole}."
    elif "block" not in spans:
        outcome = Outcome.YES if whole.alike else Outcome.NO
        verdict = "yes, as a whole" if whole.alike else "not shown"
        sentence = f"A pass through the block, on 0 to 100 %: {whole}.{passes}"
    else:
        outcome, verdict = {
            (True, True): (Outcome.YES, "yes, in the block alone too"),
            (True, False): (Outcome.YES, "yes, in the block alone"),
            (False, True): (Outcome.PARTLY, "once, with prelude and coda"),
            (False, False): (Outcome.NO, "not shown"),
        }[block.alike, whole.alike]
        sentence = {
            (True, True): f"A single pass through the block goes through the stages of {reference}, and so does the "
            "whole model once.",
            (True, False): f"A single pass through the block goes through the stages of {reference}; the whole model "
            "is not shown to.",
            (False, True): f"The whole model goes through the stages of {reference} once; a single pass is "
            "not shown to.",
            (False, False): f"Neither a single pass nor the whole model is shown to go through the stages of "
            f"{reference}.",
        }[block.alike, whole.alike]
        sentence += f" The block alone, on 0 to 100 %: {_or_unknown(block)}.{passes} "
        sentence += f"Prelude, block and coda together: {_or_unknown(whole)}."
    sentence += _alone(comparison, label, spans)
    outcome, sentence = _held_back(comparison, label, outcome, sentence)
    if looped and (whole.known or block.known):
        sentence += _repeating(comparison, label)
    who = f"each pass of {label}" if looped else label
    question = _question(comparison, label, index, f"Does {who} go through the stages of {reference}?")
    return question.says(outcome, verdict, sentence, _evidence(comparison, label))


def _same_model(comparison: Comparison, label: str, index: int) -> Answer:
    """The same weights on other prompts, or with other settings."""
    study, tolerance = comparison.studies[label], comparison.settings.level_tolerance
    whole = finding_of(comparison, label, "pass")
    at = (study["judged_at"] or 1) - 1
    apart = comparison.dataset["level_difference"].sel(study=label, span="pass").isel(recurrence=at)
    known = {str(name): float(value) for name, value in zip(apart["measure"].values, apart.values, strict=True)}
    known = {name: value for name, value in known.items() if math.isfinite(value)}
    elsewhere = [f"{name} ({percent(value)})" for name, value in known.items() if value > tolerance]
    if not whole.known:
        outcome, verdict, sentence = Outcome.CANNOT_TELL, "cannot tell", _why_unknown(comparison, label)
    elif not whole.alike:
        outcome, verdict, sentence = Outcome.NO, "not shown", f"Pass against the same pass there: {whole}."
    elif elsewhere:
        outcome, verdict = Outcome.PARTLY, "the same stages, at other levels"
        sentence = f"Pass against the same pass there: {whole}. Other levels: {listed(elsewhere)}."
    else:
        outcome, verdict = Outcome.YES, "yes"
        sentence = (
            f"Pass against the same pass there: {whole}. No measure's level differs by more than {percent(tolerance)}."
        )
    outcome, sentence = _held_back(comparison, label, outcome, sentence)
    text = f"{label}: does {study['model']} go through the same stages as in {comparison.reference}?"
    evidence = _evidence(comparison, label) | {f"level difference, {name}": value for name, value in known.items()}
    return _question(comparison, label, index, text).says(outcome, verdict, sentence, evidence)


def _held_back(comparison: Comparison, label: str, outcome: Outcome, sentence: str) -> tuple[Outcome, str]:
    """No plain yes of a loop that was changed while it ran, or is not seen to settle."""
    changes = comparison.studies[label].get("interventions") or ()
    settles = comparison.cells(label).get("fixed_point")
    reasons = [f"it was changed while it ran ({', '.join(changes)})"] if changes else []
    if settles is not None and (
        settles.outcome in (Outcome.NO, Outcome.NOT_YET, Outcome.CANNOT_TELL)
        or settles.value < Criterion().prompts_needed
    ):
        reasons.append(f"the answer to whether its state settles is “{settles.verdict}”")
    if not reasons:
        return outcome, sentence
    return (
        Outcome.PARTLY if outcome is Outcome.YES else outcome,
        f"{sentence} Note that {listed(reasons)}.",
    )


def _question(comparison: Comparison, label: str, index: int, text: str) -> Question:
    return Question(key=f"stages-{index}", text=text, figure=f"table-{comparison.labels.index(label)}")


def _or_unknown(finding: Finding) -> str:
    return str(finding) if finding.known else "cannot tell"


def _like_passes(comparison: Comparison, label: str) -> str:
    """In how many passes, up to the one that is judged, the block alone is like the reference."""
    judged = int(comparison.studies[label]["judged_at"])
    alike = sum(finding_of(comparison, label, "block", recurrence=at).alike for at in range(1, judged + 1))
    count = "all" if alike == judged else "none" if not alike else f"{alike}"
    return f" The block alone is alike in {count} of the first {judged} passes." if judged > 1 else ""


def _alone(comparison: Comparison, label: str, spans: tuple[str, ...]) -> str:
    """The measures that are alike by themselves."""
    names = [str(name) for name in comparison.dataset["measure"].values]
    alike = [name for name in names if any(finding_of(comparison, label, span, name).alike for span in spans)]
    return f" Alike on their own: {listed(alike)}." if alike else ""


def _repeating(comparison: Comparison, label: str) -> str:
    """Which measures each pass repeats, whatever they look like in the reference."""
    shares = comparison.dataset["repetition"].sel(study=label)
    needed = Criterion().repetition_needed
    known = shares.isel(measure=np.flatnonzero(np.isfinite(shares.values)))
    repeated = [str(name) for name in known["measure"].values[known.values >= needed]]
    if not known.size:
        return ""
    if not repeated:
        return " None of its own curves repeats from pass to pass."
    return f" It repeats its own curves of {listed(repeated)} from pass to pass."


def _why_unknown(comparison: Comparison, label: str) -> str:
    needed = fewest_points(comparison.settings.alpha)
    layers = {name: sum(comparison.studies[name]["layout"].values()) for name in (label, comparison.reference)}
    short = [f"{name} has {count}" for name, count in layers.items() if count < needed]
    if short:
        return f"It takes {needed} layers to tell an order from chance, and {listed(short)}."
    study, reference = comparison.studies[label], comparison.studies[comparison.reference]
    if study["same_model_as_reference"] and (study["judged_at"] or 1) > (reference["recurrences"] or 1):
        return (
            f"{label} is judged at recurrence {study['judged_at']}, and {comparison.reference} was measured up to "
            f"{reference['recurrences']}."
        )
    return "There is no measure that both studies have and that varies along the depth of both."


def _evidence(comparison: Comparison, label: str) -> Evidence:
    """Every measure's correlation and p where the study is judged."""
    return {
        f"{span}, {measure or 'mean'}": _short(finding_of(comparison, label, span, measure))
        for span in _spans(comparison, label)
        for measure in (None, *(str(name) for name in comparison.dataset["measure"].values))
    }
