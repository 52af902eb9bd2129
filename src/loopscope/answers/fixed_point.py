"""Does this model reach a fixed point? What the state of every layer and prompt does between the horizons, what prompts
have in common, and the answer."""

from __future__ import annotations

import math
from collections import Counter
from enum import StrEnum
from itertools import groupby

import numpy as np
import xarray

from loopscope._util.statistics import Share, median
from loopscope._util.wording import listed, percent, significant, spans
from loopscope.answers.answer import Answer, Criterion, Evidence, Outcome, Question, diverged_prompts, few_prompts
from loopscope.study import StudyView

FIXED_POINT = Question(key="fixed_point", text="Does it reach a fixed point?", figure="horizon-drift")
SUMMABLE_RATIO = 0.5
"""The ratio of two steps, at 2H and at H, that shrink like 1/t. Steps that shrink faster than that add up to a
finite way; others to a way without end. No setting: it follows from the harmonic series."""


class Settling(StrEnum):
    """How a state behaves towards the second horizon, from the best to the worst."""

    FIXED_POINT = "fixed point"
    AT_FLOOR = "at the rounding floor"
    STILL_CONVERGING = "cannot tell: still slowing"
    DIRECTION_ONLY = "direction only: the norm grows"
    NO_FIXED_POINT = "no fixed point"
    DIVERGED = "diverged"

    @property
    def settles(self) -> bool:
        """It reaches a fixed point, as far as the arithmetic can show."""
        return self in (Settling.FIXED_POINT, Settling.AT_FLOOR)

    @property
    def words(self) -> str:
        """For a reader; the value is what results files hold."""
        return "at the noise floor" if self is Settling.AT_FLOOR else str(self)


_ORDER = tuple(Settling)
_VERDICTS = {
    Settling.FIXED_POINT: (Outcome.YES, "yes"),
    Settling.AT_FLOOR: (Outcome.PARTLY, "down to rounding"),
    Settling.STILL_CONVERGING: (Outcome.CANNOT_TELL, "cannot tell yet"),
    Settling.DIRECTION_ONLY: (Outcome.PARTLY, "in direction only"),
    Settling.NO_FIXED_POINT: (Outcome.NO, "no"),
    Settling.DIVERGED: (Outcome.NO, "no, it diverges"),
}


def fixed_point_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Judge by both horizons."""
    ranks = settling(view, criterion)
    kinds = prompt_settling(ranks)
    common = common_settling(view, criterion)
    settles = common is not None and common.settles
    share = Share(sum(kind.settles if settles else kind is common for kind in kinds), view.prompts)
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
    if settles and tokens < criterion.tokens_needed:
        outcome, verdict = Outcome.PARTLY, "on average, not every token"
        sentence += f" But only {percent(tokens)} of the tokens settle one by one."
    in_the_norm = common in (Settling.DIRECTION_ONLY, Settling.DIVERGED)
    evidence |= settling_by_layer(ranks, criterion)
    return FIXED_POINT.says(outcome, verdict, sentence, evidence, limits, figure="norm-growth" if in_the_norm else None)


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
    return Settling.AT_FLOOR if sum(one.settles for one in kinds) >= needed else None


def settling(view: StudyView, criterion: Criterion) -> xarray.DataArray:
    """The `Settling` of every layer and prompt, as an array of its integer rank, dimensions (layer, prompt).

    Rank r stands for `list(Settling)[r]`. A state is settled if it stays within the tolerances from H to 2H and in
    the steps into both. If not, and the direction is settled while the norm grows, in steps that add up without
    limit and make most of the movement, only the direction has settled. If rounding alone explains the steps that
    are left, it is at the floor. Otherwise the lengths of the two steps (not divided by the norm, whose growth
    would make steps look smaller) say whether it slows down.
    """
    data = view.dataset
    drift = data["horizon_drift"].transpose("layer", "prompt")
    step = data["horizon_relative_step"].max("horizon", skipna=False)
    growth = data["horizon_norm_growth"]
    movement = np.maximum(drift, step)
    rounding = criterion.floor_factor * data["noise_floor"].fillna(0)
    turned = np.arccos(data["horizon_drift_cosine"].clip(-1, 1))

    norm_settled = abs(growth - 1) <= criterion.norm_growth_tolerance
    fixed = (movement <= criterion.drift_tolerance) & norm_settled
    # Rounding errors that nothing pulls back add up like a random walk: to sqrt(H) times one of them.
    floor = (step <= rounding) & (drift <= np.sqrt(view.horizon) * rounding)
    ratio = step_ratio(data)
    outwards = turned * growth < growth - 1  # as shares of the norm at H: way around against way out
    direction = (
        (growth > 1 + criterion.norm_growth_tolerance)
        & (turned <= criterion.direction_tolerance)
        & outwards
        & ~(ratio < SUMMABLE_RATIO)
    )
    slowing = ratio < criterion.slowing_ratio
    missing = (data["diverged_at"] >= 0) | ~np.isfinite(movement + growth + turned)

    cases = [
        (missing, Settling.DIVERGED),
        (fixed, Settling.FIXED_POINT),
        (direction, Settling.DIRECTION_ONLY),
        (floor, Settling.AT_FLOOR),
        (slowing, Settling.STILL_CONVERGING),
    ]
    ranks = np.select(
        [np.broadcast_to(case.transpose("layer", "prompt").values, drift.shape) for case, _ in cases],
        [_ORDER.index(kind) for _, kind in cases],
        default=_ORDER.index(Settling.NO_FIXED_POINT),
    )
    return xarray.DataArray(ranks, dims=("layer", "prompt"), coords={"layer": data["layer"]}, name="settling")


def prompt_settling(ranks: xarray.DataArray) -> list[Settling]:
    """The settling of each prompt: that of its worst layer."""
    return [_ORDER[rank] for rank in ranks.max("layer").values]


def settling_by_layer(ranks: xarray.DataArray, criterion: Criterion) -> dict[str, str]:
    """`{"layers 0–2": "fixed point (64 of 64 prompts)"}`: what most prompts show, neighbours that agree drawn
    together. A layer on which too few prompts agree is said to depend on the prompt."""
    total = ranks.sizes["prompt"]

    def describe(layer: int) -> str:
        counts = np.bincount(ranks.values[layer], minlength=len(_ORDER))
        most = int(counts.argmax())
        if counts[most] < criterion.prompts_needed * total:
            parts = (f"{count} {_ORDER[rank].words}" for rank, count in enumerate(counts) if count)
            return f"depends on the prompt ({', '.join(parts)})"
        return f"{_ORDER[most].words} ({counts[most]} of {total} prompts)"

    described = {}
    for text, group in groupby(range(ranks.sizes["layer"]), describe):
        layers = list(group)
        described[f"{'layer' if len(layers) == 1 else 'layers'} {spans(layers)}"] = text
    return described


def step_ratio(data: xarray.Dataset) -> xarray.DataArray:
    """Length of the step into 2H over that of the step into H, dimensions (layer, prompt)."""
    length = data["horizon_relative_step"] * data["horizon_residual_norm"]
    with np.errstate(divide="ignore", invalid="ignore"):  # a state that is exactly fixed makes steps of length 0
        return length.sel(horizon="second", drop=True) / length.sel(horizon="first", drop=True)


def _evidence(view: StudyView) -> Evidence:
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
        "noise_floor": median(data["noise_floor"].max("layer").values),
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


def _sentence(kind: Settling, view: StudyView, criterion: Criterion, share: Share, evidence: Evidence) -> str:
    first, second = view.horizon, 2 * view.horizon
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
    parts = [f"{kind.words} in {counts[kind]}" for kind in Settling if counts[kind]]
    return f"It depends on the prompt. Of {len(kinds)} prompts: {listed(parts)}."
