"""Does this model reach a fixed point?"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.criterion import Criterion
from loopscope.answers.limits import diverged_prompts, few_prompts
from loopscope.answers.settling import (
    SUMMABLE_RATIO,
    Settling,
    prompt_settling,
    settling,
    settling_by_layer,
    step_ratio,
)
from loopscope.answers.statistics import Share, median
from loopscope.answers.view import StudyView
from loopscope.answers.wording import listed, percent, significant

__all__ = ["SETTLED", "common_settling", "fixed_point_answer"]

SETTLED = (Settling.FIXED_POINT, Settling.AT_FLOOR)
"""What counts as having reached a fixed point as far as the arithmetic can show."""

_VERDICTS = {
    Settling.FIXED_POINT: (Outcome.YES, "yes"),
    Settling.AT_FLOOR: (Outcome.PARTLY, "down to rounding"),
    Settling.STILL_CONVERGING: (Outcome.CANNOT_TELL, "cannot tell yet"),
    Settling.DIRECTION_ONLY: (Outcome.PARTLY, "in direction only"),
    Settling.NO_FIXED_POINT: (Outcome.NO, "no"),
    Settling.DIVERGED: (Outcome.NO, "no, it diverges"),
}
_SEEN_IN_THE_NORM = (Settling.DIRECTION_ONLY, Settling.DIVERGED)


def common_settling(view: StudyView, criterion: Criterion) -> Settling | None:
    """What enough of the prompts have in common, or None if it depends on the prompt.

    Prompts that are at the floor and prompts that settle above it agree on the matter: together they count as at
    the floor.
    """
    kinds = prompt_settling(settling(view, criterion))
    needed = criterion.prompts_needed * len(kinds)
    kind, count = Counter(kinds).most_common(1)[0]
    if count >= needed:
        return kind
    return Settling.AT_FLOOR if sum(one in SETTLED for one in kinds) >= needed else None


def fixed_point_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Judge by both horizons."""
    ranks = settling(view, criterion)
    kinds = prompt_settling(ranks)
    common = common_settling(view, criterion)
    alike = [kind in SETTLED if common in SETTLED else kind is common for kind in kinds]
    share = Share(sum(alike), view.prompts)
    evidence = _evidence(view)
    tokens = _settled_tokens(view, criterion)
    if math.isfinite(tokens):
        evidence["share_of_tokens_settled"] = tokens

    limits = few_prompts(view, criterion) + diverged_prompts(view)
    if common is Settling.NO_FIXED_POINT:
        limits.append("An approach too slow for these horizons to show cannot be excluded.")
    if common is None:
        outcome, verdict, sentence = Outcome.PARTLY, "depends on the prompt", _mixed_sentence(kinds)
    else:
        outcome, verdict = _VERDICTS[common]
        sentence = _sentence(common, view, criterion, share, evidence)
        low, high = share.interval
        evidence |= {"prompts": str(share), "share_low": low, "share_high": high}
    if common in SETTLED and tokens < criterion.tokens_needed:
        outcome, verdict = Outcome.PARTLY, "on average, not every token"
        sentence += f" But only {percent(tokens)} of the tokens settle one by one."
    return Answer(
        key="fixed_point",
        question="Does it reach a fixed point?",
        outcome=outcome,
        verdict=verdict,
        sentence=sentence,
        evidence={**evidence, **settling_by_layer(ranks, criterion)},
        figure="norm-growth" if common in _SEEN_IN_THE_NORM else "horizon-drift",
        limits=limits,
        criterion=criterion,
    )


def _evidence(view: StudyView) -> dict[str, float | str]:
    """Medians over the finite prompts, each of the layer that moves most."""
    data = view.finite
    steps = data["horizon_relative_step"]
    cosine = data["horizon_drift_cosine"].clip(-1, 1)
    return {
        "drift_between_horizons": median(data["horizon_drift"].max("layer").values),
        "relative_step_at_first_horizon": median(steps.sel(horizon="first").max("layer").values),
        "relative_step_at_second_horizon": median(steps.sel(horizon="second").max("layer").values),
        "ratio_of_step_lengths": median(step_ratio(data).max("layer").values),
        "norm_growth_between_horizons": median(data["horizon_norm_growth"].max("layer").values),
        "turn_between_horizons": median(np.degrees(np.arccos(cosine.min("layer").values))),
        "rounding_floor": median(data["noise_floor"].max("layer").values),
    }


def _settled_tokens(view: StudyView, criterion: Criterion) -> float:
    """Share of the finite prompts' tokens whose state after the last layer drifts within the tolerance, or as
    rounding does."""
    if "token_horizon_drift" not in view.finite:
        return math.nan
    drift = view.finite["token_horizon_drift"].sel(site="last_layer").transpose("prompt", "token").values
    floor = view.finite["noise_floor"].isel(layer=-1).fillna(0).values[:, None]
    allowed = np.maximum(criterion.drift_tolerance, np.sqrt(view.horizon) * criterion.floor_factor * floor)
    present = np.isfinite(drift)
    return float((drift <= allowed)[present].mean()) if present.any() else math.nan


def _sentence(
    kind: Settling, view: StudyView, criterion: Criterion, share: Share, evidence: dict[str, float | str]
) -> str:
    first, second = view.horizon, 2 * view.horizon
    drift, step, floor, ratio, growth = (
        float(evidence[name])
        for name in (
            "drift_between_horizons",
            "relative_step_at_second_horizon",
            "rounding_floor",
            "ratio_of_step_lengths",
            "norm_growth_between_horizons",
        )
    )
    between = f"Between {first} and {second} recurrences the state moves by {percent(drift)} of its norm"
    match kind:
        case Settling.FIXED_POINT:
            steps = f"are down to {significant(step)}"
            if step <= criterion.floor_factor * floor:
                steps = f"are at the rounding floor of {view.dtype} ({significant(floor)})"
            elif math.isfinite(floor):
                steps += f", above the rounding floor of {view.dtype} ({significant(floor)})"
            return f"Yes: every layer's state stops, in {share}. {between}, and its relative steps {steps}."
        case Settling.AT_FLOOR:
            return (
                f"As far as {view.dtype} can show: in {share} the steps that are left are rounding, and what lies "
                f"below it cannot be seen. {between}; rounding alone makes relative steps of {significant(floor)}."
            )
        case Settling.STILL_CONVERGING:
            pace = (
                "faster than 1/t, as they must to add up to a limit" if ratio < SUMMABLE_RATIO else "no faster than 1/t"
            )
            return (
                f"Cannot tell at this horizon: the state still moves, but is slowing down, in {share}. {between}; "
                f"the step into recurrence {second} is {percent(ratio)} as long as that into {first}: steps shrink "
                f"{pace}."
            )
        case Settling.DIRECTION_ONLY:
            return (
                f"Only in direction: the norm keeps growing, in {share}. Between {first} and {second} recurrences "
                f"it grows {significant(growth, 3)}-fold, while the state turns by "
                f"{significant(float(evidence['turn_between_horizons']))} degrees. Relative steps shrink "
                "although the state goes on."
            )
        case Settling.NO_FIXED_POINT:
            return (
                f"No: the state keeps moving, in {share}. {between}, and the step into recurrence {second} is "
                f"{percent(ratio)} as long as that into {first}."
            )
        case Settling.DIVERGED:
            start = view.dataset["diverged_at"].values
            start = start[start >= 0]
            return f"No: states become infinite or undefined in {share}" + (
                f", the first after {int(start.min()) + 1} recurrences." if start.size else "."
            )


def _mixed_sentence(kinds: list[Settling]) -> str:
    counts = Counter(kinds)
    parts = [f"{kind.value} in {counts[kind]}" for kind in Settling if counts[kind]]
    return f"It depends on the prompt. Of {len(kinds)} prompts: {listed(parts)}."
