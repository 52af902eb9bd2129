"""Does this model reach a fixed point? The answer, from what its prompts do between the horizons."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.statistics import Share, median
from loopscope._util.wording import listed, percent, plural, significant
from loopscope.answers.answer import (
    Answer,
    Claim,
    Criterion,
    Evidence,
    Outcome,
    Question,
    diverged_prompts,
    few_prompts,
)
from loopscope.answers.settling import (
    UNRELATED,
    Settling,
    common_settling,
    horizon_settling,
    late_prompts,
    noise_floor,
    parted_prompts,
    prompt_settling,
    settling,
    settling_by_layer,
    step_ratio,
)
from loopscope.answers.token_kinds import token_kinds
from loopscope.dynamics.verdicts import KINDS, MOVING_CODES, SETTLED_CODES
from loopscope.study import StudyView, without_paths

FIXED_POINT = Question(key="fixed_point", text="Does it reach a fixed point?", figure="horizon-drift")
_VERDICTS = {
    Settling.FIXED_POINT: (Outcome.YES, "yes", Claim.STOPS),
    Settling.AT_FLOOR: (Outcome.PARTLY, "to within rounding", Claim.STOPS),
    Settling.NOT_YET: (Outcome.NOT_YET, "not yet", Claim.ON_ITS_WAY),
    Settling.CANNOT_TELL: (Outcome.CANNOT_TELL, "cannot tell", Claim.LEFT_OPEN),
    Settling.DIRECTION_ONLY: (Outcome.PARTLY, "in direction only", Claim.GOES_ON),
    Settling.NO_FIXED_POINT: (Outcome.NO, "no", Claim.GOES_ON),
    Settling.DIVERGED: (Outcome.NO, "no, it diverges", Claim.GOES_ON),
}


def fixed_point_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Judge by both horizons, and by the verdicts of tokens where they were judged."""
    kinds = prompt_settling(view, criterion)
    common = common_settling(view, criterion)
    alike = [_alike(kind, common) for kind in kinds]
    parted = parted_prompts(view, criterion)
    undecided = 0 if common is None or not common.decided else sum(not kind.decided for kind in kinds)
    share = Share(sum(alike), view.prompts, undecided)
    chosen = np.flatnonzero(alike if common is not None else np.ones(len(kinds), dtype=bool))
    data = without_paths(view.dataset).isel(prompt=chosen)
    evidence = _evidence(data)
    tokens = _settled_tokens(view, chosen, criterion)
    if math.isfinite(tokens):
        evidence["share_of_tokens_settled"] = tokens

    limits = few_prompts(view, criterion) + diverged_prompts(view)
    limits += [
        f"In {plural(count, 'prompt')} the horizons say “{kind.words}” and the verdicts of the tokens the opposite; "
        "such prompts count as undecided."
        for kind, count in _contradicted(view, criterion).items()
    ]
    if common is Settling.NO_FIXED_POINT:
        limits.append("An approach that is too slow to show at these horizons cannot be excluded.")
    if common is None:
        outcome, verdict, claim = Outcome.PARTLY, "depends on the prompt", None
        sentence = f"It depends on the prompt. {_counted(kinds)}"
    else:
        outcome, verdict, claim = _VERDICTS[common]
        sentence = _sentence(common, view, criterion, share, evidence)
        low, high = share.interval
        evidence |= {"prompts": str(share), "share_low": low, "share_high": high}
        if common is Settling.NOT_YET and late_prompts(view, criterion)[chosen].all():
            verdict, sentence = f"not by {view.horizon}", _came_to_rest(view, share, evidence)
        if common is Settling.CANNOT_TELL and 2 * parted.sum() > share.count:
            outcome, verdict, claim = Outcome.PARTLY, "not every token", None
            where = Share(int(parted.sum()), view.prompts)
            sentence = f"Not every token: in {where}, {_tokens_of(view, parted)}. {_last_steps(view, evidence)}"
        elif undecided:
            sentence += (
                f" {undecided} of {len(kinds)} prompts {'is' if undecided == 1 else 'are'} undecided at this horizon."
            )
            if parted.any():
                sentence += f" In {parted.sum()} of these, {_tokens_of(view, parted)}."
        if undecided > (1 - criterion.prompts_needed) * len(kinds):
            verdict += "; some prompts undecided"
    if common is not None and common.settles and tokens < criterion.tokens_needed:
        outcome, verdict, claim = Outcome.PARTLY, "on average, not every token", None
        sentence = sentence.replace("Yes: every layer's", "On average every layer's")
        sentence = sentence.replace("the steps that are left are", "the steps that are left are on average")
        sentence += f" But only {percent(tokens)} of the tokens settle individually."
    in_the_norm = common in (Settling.DIRECTION_ONLY, Settling.DIVERGED)
    evidence |= settling_by_layer(settling(view, criterion), criterion)
    return FIXED_POINT.says(
        outcome,
        verdict,
        sentence,
        evidence,
        limits,
        figure="norm-growth" if in_the_norm else None,
        claims=[claim] if claim else [],
    )


def _alike(kind: Settling, common: Settling | None) -> bool:
    """Whether a prompt shows what is said of the model."""
    if common is None:
        return False
    if common.settles:
        return kind.settles
    return kind is common


def _contradicted(view: StudyView, criterion: Criterion) -> Counter[Settling]:
    """By what the horizons say: prompts of which the verdicts of the tokens say what cannot be true beside it."""
    pairs = zip(horizon_settling(view, criterion), prompt_settling(view, criterion), strict=True)
    return Counter(kind for kind, agreed in pairs if kind is not agreed is Settling.CANNOT_TELL)


def _counted(kinds: list[Settling]) -> str:
    counts = Counter(kinds)
    parts = [f"{kind.words} in {counts[kind]}" for kind in Settling if counts[kind]]
    return f"Of {plural(len(kinds), 'prompt')}: {listed(parts)}."


def _evidence(data: xarray.Dataset) -> Evidence:
    """Medians over prompts, each of the layer that moves most."""
    steps = data["horizon_relative_step"]
    cosine = data["horizon_drift_cosine"].clip(-1, 1)
    return {
        "drift_between_horizons": median(data["horizon_drift"].max("layer").values),
        "relative_step_at_first_horizon": median(steps.sel(horizon="first").max("layer").values),
        "relative_step_at_second_horizon": median(steps.sel(horizon="second").max("layer").values),
        "ratio_of_step_lengths": median(step_ratio(data).max("layer").values),
        "norm_growth_between_horizons": median(data["horizon_norm_growth"].max("layer").values),
        "turn_between_horizons": median(np.degrees(np.arccos(cosine.min("layer").values))),
        "noise_floor": median(noise_floor(data).max("layer").values),
    }


def _settled_tokens(view: StudyView, chosen: NDArray[np.int64], criterion: Criterion) -> float:
    """Share of these prompts' tokens that settle by their verdict or, where that is open, whose state after the last
    layer drifts within the tolerance, or as rounding does: what turns twice between the horizons does not drift."""
    data = without_paths(view.dataset).isel(prompt=chosen)
    if "token_horizon_drift" not in data:
        return math.nan
    drift = data["token_horizon_drift"].sel(site="last_layer").transpose("prompt", "token").values
    floor = noise_floor(data).isel(layer=-1).fillna(0).values[:, None]
    allowed = np.maximum(criterion.drift_tolerance, np.sqrt(view.horizon) * criterion.floor_factor * floor)
    settled, present = drift <= allowed, np.isfinite(drift)
    if "verdict" in data:
        kinds = token_kinds(view.study)[chosen]
        settled = (settled | np.isin(kinds, SETTLED_CODES)) & ~np.isin(kinds, MOVING_CODES)
    return float(settled[present].mean()) if present.any() else math.nan


def _tokens_of(view: StudyView, parted: NDArray[np.bool_]) -> str:
    """What the tokens of these prompts do by their verdicts."""
    codes = token_kinds(view.study)[parted]
    total, settle, move = (
        int(each.sum()) for each in (codes >= 0, np.isin(codes, SETTLED_CODES), np.isin(codes, MOVING_CODES))
    )
    kinds = listed([str(KINDS[code]) for code in MOVING_CODES if (codes == code).any()])
    left = f", and {total - settle - move} are undecided" if total > settle + move else ""
    return (
        f"{settle} of {plural(total, 'token')} settle{'s' if settle == 1 else ''} and {move} "
        f"keep{'s' if move == 1 else ''} moving ({kinds}){left}"
    )


def _last_steps(view: StudyView, evidence: Evidence) -> str:
    first, second = view.horizon, view.second_horizon
    drift, ratio = (percent(float(evidence[name])) for name in ("drift_between_horizons", "ratio_of_step_lengths"))
    return (
        f"Between {first} and {second} recurrences the state moves by {drift} of its norm; the step into recurrence "
        f"{second} is {ratio} as long as that into {first}."
    )


def _came_to_rest(view: StudyView, share: Share, evidence: Evidence) -> str:
    """Of a state that moved at the horizon, and whose step into twice that is as rounding makes it."""
    step = float(evidence["relative_step_at_second_horizon"])
    rest = f"at {view.second_horizon} its steps are rounding alone ({significant(step)} of its norm)"
    if not step:
        rest = f"it stands still at {view.second_horizon}"
    return f"Not by recurrence {view.horizon}, where the state still moved, but {rest}, in {share}. " + _last_steps(
        view, evidence
    )


def _sentence(kind: Settling, view: StudyView, criterion: Criterion, share: Share, evidence: Evidence) -> str:
    first, second = view.horizon, view.second_horizon
    drift, step, floor, ratio, growth = (
        float(evidence[name])
        for name in (
            "drift_between_horizons",
            "relative_step_at_second_horizon",
            "noise_floor",
            "ratio_of_step_lengths",
            "norm_growth_between_horizons",
        )
    )
    between = f"Between {first} and {second} recurrences the state moves by {percent(drift)} of its norm"
    match kind:
        case Settling.FIXED_POINT:
            steps = f"are down to {significant(step)}"
            if step <= criterion.floor_factor * floor:
                steps = f"are at the noise floor of {view.dtype} ({significant(floor)})"
            elif math.isfinite(floor):
                steps += f", above the noise floor of {view.dtype} ({significant(floor)})"
            return f"Yes: every layer's state stops, in {share}. {between}, and its relative steps at {second} {steps}."
        case Settling.AT_FLOOR:
            made = f"rounding alone makes relative steps of {significant(floor)}"
            if not math.isfinite(floor):
                made = f"the noise floor was not measured, and these are steps of {significant(step)}"
            return (
                f"As far as {view.dtype} can show: in {share} the steps that are left are rounding, and "
                f"smaller motion cannot be seen. {between}; {made}."
            )
        case Settling.NOT_YET:
            return (
                f"Not yet: the state still moves, but its steps shrink faster than 1/t, as they must to add up to a "
                f"limit, in {share}. {_last_steps(view, evidence)}"
            )
        case Settling.CANNOT_TELL:
            if 2 * _contradicted(view, criterion).total() > share.count:
                how = "the horizons say one thing and the verdicts of the tokens the opposite"
            elif drift > UNRELATED and ratio < criterion.slowing_ratio:
                how = (
                    "its last steps are shorter, but it has gone farther than its own norm, and they may lengthen again"
                )
            elif ratio < criterion.slowing_ratio:
                how = "the state slows down, but not clearly faster than 1/t, as steps must to add up to a limit"
            else:
                how = "what is left of the motion leads nowhere, and may be rounding that the model amplifies"
            return f"Cannot tell at this horizon, in {share}: {how}. {_last_steps(view, evidence)}"
        case Settling.DIRECTION_ONLY:
            return (
                f"Only in direction: the norm keeps growing, in {share}. Between {first} and {second} recurrences "
                f"it grows {significant(growth, 3)}-fold, while the state turns by "
                f"{significant(float(evidence['turn_between_horizons']))} degrees. Relative steps shrink "
                "although the state goes on."
            )
        case Settling.NO_FIXED_POINT:
            if 2 * drift < step:
                between = f"In recurrence {second} it moves by {percent(step)} of its norm, though it is then "
                between += f"{percent(drift)} from where it was after {first}: it comes back"
            return (
                f"No: the state keeps moving, in {share}. {between}, and the step into recurrence {second} is "
                f"{percent(ratio)} as long as that into {first}."
            )
        case Settling.DIVERGED:
            start = view.dataset["diverged_at"].values
            start = start[start >= 0]
            return f"No: states become infinite or undefined in {share}" + (
                f", the first after {int(start.min())} recurrences." if start.size else "."
            )
