"""After how many recurrences has the state arrived?"""

from __future__ import annotations

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.answers.answer import Answer, Outcome
from loopscope.answers.criterion import Criterion
from loopscope.answers.fixed_point import SETTLED, common_settling
from loopscope.answers.settling import Settling
from loopscope.answers.statistics import median
from loopscope.answers.view import StudyView
from loopscope.answers.wording import percent, plural

__all__ = ["arrival", "arrival_answer"]


def arrival(relative_distance: xarray.DataArray, level: float) -> NDArray[np.float64]:
    """Recurrences, counted from 1, after which the distance is within `level` and stays there to the end of what was
    measured. Shape (layer, prompt); infinite where that does not happen.
    """
    within = relative_distance.transpose("recurrence", "layer", "prompt").values <= level
    stays = np.logical_and.accumulate(within[::-1], axis=0)[::-1]
    return np.where(stays[-1], stays.argmax(axis=0) + 1.0, np.inf)


def arrival_answer(view: StudyView, criterion: Criterion) -> Answer:
    """Count to the slowest layer, and take the median over prompts. Asked only where there is a point to arrive
    at."""
    settled = common_settling(view, criterion)
    question = "After how many recurrences is it there?"
    if settled not in SETTLED:
        reasons: dict[Settling | None, str] = {
            Settling.STILL_CONVERGING: "It has not settled by the horizon, so there is no known point to arrive at.",
            Settling.DIRECTION_ONLY: "Only its direction settles: there is no point at a finite distance to arrive at.",
            None: "Too few prompts reach a fixed point for a common number.",
        }
        return Answer(
            key="arrival",
            question=question,
            outcome=Outcome.NOT_APPLICABLE,
            verdict="no point to reach" if settled is not Settling.STILL_CONVERGING else "not by this horizon",
            sentence=reasons.get(settled, "There is no fixed point to arrive at."),
            figure="distance",
            criterion=criterion,
        )

    floor = median(view.finite["noise_floor"].max("layer").values)
    rounding = criterion.floor_factor * floor if np.isfinite(floor) else 0.0
    level = max(criterion.reached_level, rounding)
    by_layer = arrival(view.finite["relative_distance"], level)
    slowest = by_layer.max(axis=0)
    reached = slowest[np.isfinite(slowest)]
    evidence: dict[str, float | str] = {"level": level, "prompts_reached": f"{len(reached)} of {len(slowest)}"}
    limits: list[str] = []
    if rounding > criterion.reached_level:
        limits.append(
            f"Rounding in {view.dtype} forced the level up from {percent(criterion.reached_level)} to {percent(level)}."
        )
    if view.recurrences == view.horizon:
        limits.append("The last distance measured is 0 by construction: it is taken at the horizon itself.")

    within = f"within {percent(level)} of its state at the horizon, for good and in every layer"
    middle = _middle(slowest)
    if np.isfinite(middle):
        outcome, verdict = Outcome.YES, f"about {middle:.0f}"
        layers = [_middle(row) for row in by_layer]
        extent = f"range {reached.min():.0f} to {reached.max():.0f}" if reached.min() < reached.max() else "all alike"
        sentence = f"After {plural(int(middle), 'recurrence')} the state is {within} (median over prompts; {extent})."
        if min(layers) < max(layers):
            sentence += f" By layer the medians run from {min(layers):.0f} to {max(layers):.0f}."
        evidence |= {
            "recurrences_median": middle,
            "recurrences_least": float(reached.min()),
            "recurrences_most": float(reached.max()),
            "medians_by_layer": ", ".join(f"{value:.0f}" for value in layers),
        }
        if len(reached) < len(slowest):
            limits.append(
                f"{plural(len(slowest) - len(reached), 'prompt')} did not arrive within the {view.recurrences} "
                "recurrences measured; the median counts them as later, the range leaves them out."
            )
    else:
        outcome, verdict = Outcome.CANNOT_TELL, f"more than {view.recurrences}"
        sentence = (
            f"More than the {view.recurrences} measured: by then only {len(reached)} of {len(slowest)} prompts are "
            f"{within}. Measure more recurrences to see it arrive."
        )
    return Answer(
        key="arrival",
        question=question,
        outcome=outcome,
        verdict=verdict,
        sentence=sentence,
        evidence=evidence,
        figure="distance",
        limits=limits,
        criterion=criterion,
    )


def _middle(counts: NDArray[np.float64]) -> float:
    """Median that is itself one of the counts, so that prompts which never arrive (infinite) need no averaging."""
    return float(np.quantile(counts, 0.5, method="inverted_cdf"))
