"""Do the stages of inference repeat in every pass through the block?"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope._util.wording import listed, percent
from loopscope.answers.answer import Answer, Criterion, Outcome
from loopscope.answers.quantities import STAGE_QUANTITIES
from loopscope.study import StudyView

_QUESTION = "Do the stages of inference repeat in every pass?"

_ASKED = ("concentration", "mixing", "entropy", "magnitude")
"""The others jump between few values, so that their variance says little."""


def stages_answer(view: StudyView, criterion: Criterion) -> Answer:
    """How much of each quantity's variation within the loop goes with the layer, whatever the recurrence.

    The first recurrence is left out: it starts from another kind of state than all that follow.
    """
    asked = [quantity for quantity in STAGE_QUANTITIES if quantity.anchor in _ASKED]
    quantities = {entry.name: entry.of_prompt for entry in asked if entry.variable in view.finite}
    if not quantities:
        return _unanswered("not measured", "The analysis was told to skip the stages.", criterion)
    if view.recurrent < 2 or view.recurrences < 3:
        return _unanswered(
            "not measured", "It takes two layers and three recurrences to see a pattern repeat.", criterion
        )
    if not view.finite.sizes["prompt"]:
        return _unanswered("it diverges", "Every prompt diverged, so there are no stages to compare.", criterion)
    shares = {name: repetition(_by_recurrence(view, how)) for name, how in quantities.items()}
    known = {name: share for name, share in shares.items() if math.isfinite(share)}
    evidence: dict[str, float | str] = {f"repetition of {name}": share for name, share in shares.items()}
    if not known:
        return _unanswered("cannot tell", "The layers do not differ in any of the quantities.", criterion)
    repeated = [name for name, share in known.items() if share >= criterion.repetition_needed]
    others = [name for name in known if name not in repeated]
    least = min(known, key=lambda name: known[name])
    numbers = f"{percent(known[least])} for {least}, the least"
    if not others:
        outcome, verdict = Outcome.YES, "yes"
        sentence = (
            f"Yes: from the second pass on, which layer it is decides nearly all of {listed(repeated)} ({numbers})."
        )
    elif repeated:
        outcome, verdict = Outcome.PARTLY, "some of them"
        verb = "repeats" if len(repeated) == 1 else "repeat"
        sentence = f"In part: {listed(repeated)} {verb} from pass to pass, but not {listed(others)} ({numbers})."
    else:
        outcome, verdict = Outcome.NO, "no"
        sentence = f"No: {listed(others)} change from pass to pass more than such a repetition allows ({numbers})."
    return Answer(
        key="stages",
        question=_QUESTION,
        outcome=outcome,
        verdict=verdict,
        sentence=sentence,
        evidence=evidence,
        figure="entropy-by-recurrence" if "relative_residual_entropy" in view.finite else "concentration-by-recurrence",
        limits=["Means over heads, tokens and prompts are compared; single heads may do otherwise."],
        criterion=criterion,
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


def _unanswered(verdict: str, sentence: str, criterion: Criterion) -> Answer:
    return Answer(
        key="stages",
        question=_QUESTION,
        outcome=Outcome.CANNOT_TELL if verdict == "cannot tell" else Outcome.NOT_APPLICABLE,
        verdict=verdict,
        sentence=sentence,
        criterion=criterion,
    )
