"""Do two criteria of the field, the distance to one's own later state and the path that is left against the answer's
margin, agree on which tokens have settled?"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import percent, plural
from loopscope.answers.answer import Answer, Criterion, Evidence, Need, Outcome, Question, measured, some_finite
from loopscope.study import StudyView

CRITERIA = Question(
    key="criteria",
    text="Do two criteria of settling agree?",
    figure="token-distances",
    needs=(
        some_finite("no token settles"),
        measured("token_margin", "The answer's margin was not read out."),
        measured("remaining_path", "How far states still go was not followed."),
        Need(
            lambda view: view.recurrences < view.horizon,
            "The last recurrence measured is the horizon, where distance and remaining path are 0 by construction.",
        ),
    ),
)
_REASONS = (
    "{} an answer so close to a tie that even the distance could change it",
    "{} a long path only because rounding adds up along it",
    "{} a path that turns or hovers",
)


def criteria_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Both after the last measured recurrence, for the loop state of each token.

    - Distance (arXiv 2604.11791): the state is within `reached_level` of its own state at the horizon H.
    - Remaining path against margin (after arXiv 2608.18222): the summed length of the steps that are left until H,
      times how much the margin, the gap between the two largest logits, changes per length, is below the margin. That
      change is the largest that successive readouts have shown.

    A path is never shorter than the distance it covers, and rounding lengthens it in every recurrence.
    """
    distance, path, margin, relative = _numbers(view.finite)
    allowed = margin / sensitivity(view.finite, criterion)
    known = np.isfinite(distance) & np.isfinite(path) & np.isfinite(allowed)
    total = int(known.sum())
    if not total:
        return CRITERIA.unanswered("not measured", "No token has a margin that was seen to change.")
    near, safe = (relative <= criterion.reached_level)[known], (path < allowed)[known]
    first, second = near & ~safe, safe & ~near
    noise = view.finite["noise_floor"].isel(layer=-1).fillna(0).values[:, None] * _at_last(view.finite, "residual_norm")
    rounding = criterion.floor_factor * noise * (view.horizon - view.recurrences)
    close = (distance >= allowed)[known]
    drowned = ~close & (path <= rounding)[known]
    counts = [int((first & kind).sum()) for kind in (close, drowned, ~close & ~drowned)]
    agreeing = int((near == safe).sum())
    agree = agreeing / total >= criterion.tokens_needed
    winding = np.median((path / np.maximum(distance, 1e-300))[known])
    sentence = (
        f"{'Yes' if agree else 'No'}: they agree on {percent(agreeing / total)} of {plural(total, 'token')}. After "
        f"{plural(view.recurrences, 'recurrence')}, {int(near.sum()):,} are within {percent(criterion.reached_level)} "
        f"of their own state at recurrence {view.horizon} (arXiv 2604.11791); {int(safe.sum()):,} have less path left "
        "until then than the margin of their answer allows (after arXiv 2608.18222)."
    )
    if first.any():
        there = sorted(zip(counts, _REASONS, strict=True), key=lambda each: -each[0])
        parts = [reason.format(f"{count:,} {'has' if count == 1 else 'have'}") for count, reason in there if count]
        sentence += f" {plural(int(first.sum()), 'token')} settled by distance alone: {'; '.join(parts)}."
    if second.any():
        sentence += f" {plural(int(second.sum()), 'token')} settled by remaining path alone."
    evidence: Evidence = {
        "tokens_judged": float(total),
        "near_by_distance": float(near.mean()),
        "safe_by_remaining_path": float(safe.mean()),
        "agree": agreeing / total,
        "near_but_close_to_a_tie": float(counts[0]),
        "near_but_path_of_rounding": float(counts[1]),
        "near_but_winding_path": float(counts[2]),
        "remaining_path_over_distance_median": float(winding),
        "margin_median": float(np.median(margin[known])),
    }
    limits = [
        "How much the margin changes per unit of path is the largest seen between successive readouts. That is no "
        "bound: the answer may change by more."
    ]
    verdict = "yes" if agree else f"they differ on {percent(1 - agreeing / total)}"
    return CRITERIA.says(Outcome.YES if agree else Outcome.NO, verdict, sentence, evidence, limits)


def sensitivity(data: xarray.Dataset, criterion: Criterion) -> NDArray[np.float64]:
    """Largest change of a token's margin over the length of the step that it changed in, (prompt, token); NaN where no
    two successive readouts have a step between them that is clear of rounding."""
    counts = [int(count) for count in data["readout_recurrence"].values]
    margins = data["token_margin"].transpose("readout_recurrence", "prompt", "token").values.astype(np.float64)
    step, size = (
        data[f"token_{name}"].isel(site=-1).transpose("recurrence", "prompt", "token").values.astype(np.float64)
        for name in ("successive_difference", "residual_norm")
    )
    floor = criterion.floor_factor * data["noise_floor"].isel(layer=-1).fillna(0).values[:, None]
    largest = np.full(margins.shape[1:], np.nan)
    for place, (before, after) in enumerate(pairwise(counts)):
        if after == before + 1:
            length = step[before]
            clear = length > floor * size[before]
            change = np.abs(margins[place + 1] - margins[place])
            largest = np.fmax(largest, np.where(clear, change / np.where(clear, length, 1.0), np.nan))
    return np.where(largest > 0, largest, np.nan)


def _numbers(data: xarray.Dataset) -> tuple[NDArray[np.float64], ...]:
    """Distance to the horizon's state, path to it, margin, and the relative distance, (prompt, token)."""
    path, margin = (
        each.transpose("prompt", "token").values.astype(np.float64)
        for each in (data["remaining_path"], data["token_margin"].isel(readout_recurrence=-1))
    )
    return _at_last(data, "distance_to_horizon"), path, margin, _at_last(data, "relative_distance")


def _at_last(data: xarray.Dataset, name: str) -> NDArray[np.float64]:
    """Of the loop state after the last measured recurrence, (prompt, token)."""
    last = data[f"token_{name}"].isel(site=-1, recurrence=-1)
    return np.asarray(last.transpose("prompt", "token").values, dtype=np.float64)
