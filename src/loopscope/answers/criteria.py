"""Do two criteria of the field, the distance to one's own later state and the path that is left against the answer's
margin, agree on which tokens have settled?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray
from jaxtyping import Bool
from numpy import ndarray
from numpy.typing import NDArray

from loopscope._util.statistics import median
from loopscope._util.wording import percent, plural
from loopscope.answers.answer import Answer, Criterion, Evidence, Need, Outcome, Question, measured, some_finite
from loopscope.answers.settling import noise_floor
from loopscope.study import StudyView

CRITERIA = Question(
    key="criteria",
    text="Do two criteria of settling agree?",
    figure="token-distances",
    needs=(
        some_finite("no token settles"),
        measured("token_margin", "The answer's margin was not read out"),
        measured("remaining_path", "How far states still go was not followed"),
        Need(
            lambda view: view.recurrences < view.horizon,
            "The last recurrence measured is at the horizon or beyond, where distance and remaining path are 0 by "
            "construction.",
        ),
    ),
)
_REASONS = (
    "{} an answer so close to a tie that even the distance could change it",
    "{} a long path only because rounding adds up along it",
    "{} a path that turns or hovers",
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Both criteria after the last measured recurrence, for the loop state of each token of which they can be known.

    - Distance (arXiv 2604.11791): the state is within `reached_level` of its own state at the horizon H, or within what
      rounding alone keeps up, where that is more, as in the answer about arrival.
    - Remaining path against margin (after arXiv 2608.18222, Proposition 1): the summed length of the steps that are
      left until H is below the radius within which the answer stays the same. For that stands the gap between the two
      largest logits over how much it changes per length, the most that successive readouts have shown.

    A path is never shorter than the distance it covers, and rounding lengthens it in every recurrence.
    """

    known: Bool[ndarray, "prompt token"]
    near: Bool[ndarray, " known"]
    """By distance; this and the rest of those that are known."""
    safe: Bool[ndarray, " known"]
    """By remaining path."""
    reasons: tuple[int, int, int]
    """Why tokens are near and not safe, counted as in `_REASONS`."""
    level: float
    """Of the distance, as a share of the norm; median over prompts."""
    winding: float
    """Remaining path over distance, median over tokens."""
    margin: float
    """Gap between the two largest logits, median over tokens."""

    @property
    def total(self) -> int:
        return self.near.size

    @classmethod
    def of(cls, view: StudyView, criterion: Criterion) -> Tokens:
        data = view.finite
        distance, relative, size = (
            _at_last(data, name) for name in ("distance_to_horizon", "relative_distance", "residual_norm")
        )
        path, margin = (
            each.transpose("prompt", "token").values.astype(np.float64)
            for each in (data["remaining_path"], data["token_margin"].isel(readout_recurrence=-1))
        )
        allowed = margin / sensitivity(data, criterion)
        known = np.isfinite(distance) & np.isfinite(path) & np.isfinite(allowed)
        floor = criterion.floor_factor * noise_floor(data).isel(layer=-1).fillna(0).values[:, None]
        near, safe = (relative <= np.maximum(criterion.reached_level, floor))[known], (path < allowed)[known]
        close = (distance >= allowed)[known]
        drowned = ~close & (path <= floor * size * (view.horizon - view.recurrences))[known]
        first, second, third = (int((near & ~safe & why).sum()) for why in (close, drowned, ~close & ~drowned))
        return cls(
            known=known,
            near=near,
            safe=safe,
            reasons=(first, second, third),
            level=max(criterion.reached_level, median(floor)),
            winding=median((path / np.maximum(distance, 1e-300))[known]),
            margin=median(margin[known]),
        )


def criteria_answer(view: StudyView, criterion: Criterion) -> Answer:
    """See `Tokens`."""
    found = Tokens.of(view, criterion)
    if not found.total:
        return CRITERIA.unanswered("not measured", "No token has a margin that was seen to change.")
    near, safe, total, level = found.near, found.safe, found.total, found.level
    agreeing = int((near == safe).sum())
    agree = agreeing / total >= criterion.tokens_needed
    sentence = (
        f"{'Yes' if agree else 'No'}: they agree on {percent(agreeing / total)} of {plural(total, 'token')}. After "
        f"{plural(view.recurrences, 'recurrence')}, {int(near.sum()):,} are within {percent(level)} of their own state "
        f"at recurrence {view.horizon} (arXiv 2604.11791); {int(safe.sum()):,} have less path left until then than the "
        "margin of their answer allows (after arXiv 2608.18222)."
    )
    first, second = int((near & ~safe).sum()), int((safe & ~near).sum())
    if first:
        there = sorted(zip(found.reasons, _REASONS, strict=True), key=lambda each: -each[0])
        parts = [reason.format(f"{count:,} {'has' if count == 1 else 'have'}") for count, reason in there if count]
        sentence += f" {plural(first, 'token')} settled by distance alone: {'; '.join(parts)}."
    if second:
        sentence += f" {plural(second, 'token')} settled by remaining path alone."
    evidence: Evidence = {
        "tokens_judged": float(total),
        "level": level,
        "near_by_distance": float(near.mean()),
        "safe_by_remaining_path": float(safe.mean()),
        "agree": agreeing / total,
        "near_but_close_to_a_tie": float(found.reasons[0]),
        "near_but_path_of_rounding": float(found.reasons[1]),
        "near_but_winding_path": float(found.reasons[2]),
        "remaining_path_over_distance_median": found.winding,
        "margin_median": found.margin,
    }
    limits = [
        "How much the margin changes per unit of path is the largest seen between successive readouts. That is no "
        "bound: the answer may change by more.",
        "A path below the margin says that the answer stays, and not that the state does. arXiv 2608.18222 calls a "
        "token settled by something else, a leading finite-time exponent below -0.05 (loopscope.lyapunov_exponents).",
    ]
    if level > criterion.reached_level:
        limits.append(
            f"Rounding in {view.dtype} forced the level up from {percent(criterion.reached_level)} to {percent(level)}."
        )
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


def _at_last(data: xarray.Dataset, name: str) -> NDArray[np.float64]:
    """Of the loop state after the last measured recurrence, (prompt, token)."""
    last = data[f"token_{name}"].isel(site=-1, recurrence=-1)
    return np.asarray(last.transpose("prompt", "token").values, dtype=np.float64)
