"""Do the stages of inference repeat in every pass through the block?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import listed, percent
from loopscope.answers.answer import Answer, Criterion, Need, Outcome, Question, some_finite
from loopscope.answers.quantities import STAGE_QUANTITIES, StageQuantity
from loopscope.study import StudyView

_ASKED = [
    quantity for quantity in STAGE_QUANTITIES if quantity.anchor in ("concentration", "mixing", "entropy", "magnitude")
]
"""The others jump between few values, so that their variance says little."""


def _asked(view: StudyView) -> list[StageQuantity]:
    return [quantity for quantity in _ASKED if quantity.variable in view.finite]


STAGES = Question(
    key="stages",
    text="Do the stages of inference repeat in every pass?",
    needs=(
        Need(lambda view: bool(_asked(view)), "The analysis was told to skip the stages."),
        Need(
            lambda view: view.recurrent > 1 and view.recurrences > 2,
            "It takes two layers and three recurrences to see a pattern repeat.",
        ),
        some_finite("there are no stages to compare"),
    ),
)


def stages_answer(view: StudyView, criterion: Criterion) -> Answer:
    """How much of each quantity's variation within the loop goes with the layer, whatever the recurrence.

    The first recurrence is left out: it starts from another kind of state than all that follow.
    """
    shares = {quantity.name: repetition(_by_recurrence(view, quantity.of_prompt)) for quantity in _asked(view)}
    known = {name: share for name, share in shares.items() if math.isfinite(share)}
    if not known:
        nothing = "The layers do not differ in any of these quantities."
        return STAGES.unanswered("cannot tell", nothing, outcome=Outcome.CANNOT_TELL)
    repeated = [name for name, share in known.items() if share >= criterion.repetition_needed]
    others = [name for name in known if name not in repeated]
    least = min(known, key=lambda name: known[name])
    numbers = f"least for {least}: {percent(known[least])}"
    if not others:
        outcome, verdict = Outcome.YES, "yes"
        sentence = (
            f"Yes: from the second pass on, the layer explains nearly all of the variance of {listed(repeated)} "
            f"({numbers})."
        )
    elif repeated:
        outcome, verdict = Outcome.PARTLY, "some of them"
        verb = "repeats" if len(repeated) == 1 else "repeat"
        sentence = f"In part: {listed(repeated)} {verb} from pass to pass, but not {listed(others)} ({numbers})."
    else:
        outcome, verdict = Outcome.NO, "no"
        vary = "varies" if len(others) == 1 else "vary"
        sentence = f"No: {listed(others)} {vary} from pass to pass; the layer explains too little of it ({numbers})."
    drawn = "entropy" if "relative_residual_entropy" in view.finite else "concentration"
    return STAGES.says(
        outcome,
        verdict,
        sentence,
        {f"repetition of {name}": share for name, share in shares.items()},
        ["Means over heads, tokens and prompts are compared; single heads may behave differently."],
        figure=f"{drawn}-by-recurrence",
    )


def repetition(values: NDArray[np.floating]) -> float:
    """Share of the variance of `values` (recurrence, layer) that the layers' means explain (eta squared).

    1: every pass goes through the same values; without any pattern about (k - 1) / (k R - 1). NaN where nothing varies.
    """
    finite = values[np.isfinite(values).all(-1)]
    if finite.shape[0] < 2:
        return math.nan
    total = float(((finite - finite.mean()) ** 2).sum())
    between = float(finite.shape[0] * ((finite.mean(0) - finite.mean()) ** 2).sum())
    # Rounding alone would decide where all values are equal.
    return between / total if total > 1e-12 * float((finite**2).sum()) else math.nan


def _by_recurrence(view: StudyView, how: Callable[[xarray.Dataset], xarray.DataArray]) -> NDArray[np.floating]:
    """Median over prompts, (recurrence, layer), from the second recurrence on."""
    loop = view.finite.isel(depth=np.flatnonzero(view.finite["depth_stage"].values == "recurrent"))
    middle = how(loop).median("prompt").values.astype(np.float64)
    return middle.reshape(view.recurrences, view.recurrent)[1:]
