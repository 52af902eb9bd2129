"""A study as curves: each stage measure along the depth of one pass, for every recurrence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from loopscope._util.wording import layout_text
from loopscope.answers.quantities import STAGE_QUANTITIES
from loopscope.errors import StudyError
from loopscope.study import Study, view_study

MEASURES = tuple(quantity.name for quantity in STAGE_QUANTITIES)
"""The names of the measures, in the order of every array here."""


@dataclass(frozen=True, kw_only=True)
class StageCurves:
    """Medians over the finite prompts of one study."""

    values: Float64[np.ndarray, "measure recurrence position"]
    """One pass is prelude, block and coda. Prelude and coda run once and are the same in every pass; a feed-forward
    model is one pass. NaN where a measure is missing."""
    of_prompts: Float64[np.ndarray, "measure visit prompt"]
    """Of which `values` are medians, through all visits in order."""
    prelude: int
    recurrent: int
    coda: int
    trained: int | None
    """Recurrences that the model was trained with, if known."""

    @property
    def looped(self) -> bool:
        return self.recurrent > 0

    @property
    def recurrences(self) -> int:
        return int(self.values.shape[1])

    @property
    def home(self) -> int:
        """Index of the recurrence that a looped model is judged at: the last one of its training, or the last one
        measured where that is not known or not reached. 0 for a feed-forward model."""
        return min(self.trained or self.recurrences, self.recurrences) - 1

    def pass_of_prompts(self, recurrence: int, *, block: bool) -> Float64[np.ndarray, "measure position prompt"]:
        """One pass, from prelude to coda or of the `block` alone."""
        if not self.looped:
            return self.of_prompts
        start = self.prelude + self.recurrent * recurrence
        inner = self.of_prompts[:, start : start + self.recurrent]
        outer = self.of_prompts[:, : self.prelude], self.of_prompts[:, self.of_prompts.shape[1] - self.coda :]
        return inner if block else np.concatenate([outer[0], inner, outer[1]], axis=1)

    @property
    def block(self) -> Float64[np.ndarray, "measure recurrence layer"]:
        """The recurrent block alone; the whole of a feed-forward model."""
        if not self.looped:
            return self.values
        return self.values[..., self.prelude : self.prelude + self.recurrent]


def stage_curves(study: Study, name: str) -> StageCurves:
    """The curves of a study; `name` is what messages call it.

    Of a study without stage measures, or without a prompt that stayed finite, all are NaN. Raises `StudyError` for
    visits that do not fit the layout.
    """
    view = view_study(study)
    try:
        prelude, recurrent, coda = (
            int(study.manifest["model"]["layout"][stage]) for stage in ("prelude", "recurrent", "coda")
        )
    except KeyError as error:
        raise StudyError(f"The manifest of the study {name} has no entry {error}; analyze the model again.") from error
    recurrences = view.recurrences if recurrent else 1
    visits = prelude + recurrent * recurrences + coda
    if view.finite.sizes.get("depth", visits) != visits:
        raise StudyError(
            f"The study {name} has {view.finite.sizes['depth']} visits, but its layout "
            f"{layout_text(prelude, recurrent, coda, recurrences)} has {visits}; analyze the model again."
        )
    of_prompts = np.full((len(MEASURES), visits, view.finite.sizes["prompt"]), np.nan)
    for rows, quantity in zip(of_prompts, STAGE_QUANTITIES, strict=True):
        if quantity.variable in view.finite:
            rows[:] = quantity.of_prompt(view.finite).transpose("depth", "prompt").values
    along_depth = medians(of_prompts)
    loop = along_depth[:, prelude : visits - coda].reshape(len(MEASURES), recurrences, -1)
    before, after = (
        np.repeat(part[:, None], recurrences, axis=1)
        for part in (along_depth[:, :prelude], along_depth[:, visits - coda :])
    )
    passes = np.concatenate([before, loop, after], axis=-1) if recurrent else along_depth[:, None]
    return StageCurves(
        values=passes, of_prompts=of_prompts, prelude=prelude, recurrent=recurrent, coda=coda, trained=view.trained
    )


def correlated(values: Float64[np.ndarray, "measure ..."]) -> Float64[np.ndarray, "measure ..."]:
    """What correlations are taken of: the values, or their logarithm where a measure spans orders of magnitude."""
    rows = [
        np.log10(np.where(row > 0, row, np.nan)) if quantity.logarithmic else row
        for row, quantity in zip(values, STAGE_QUANTITIES, strict=True)
    ]
    return np.stack(rows)


def relative_depth(points: int) -> NDArray[np.float64]:
    """Where that many layers lie, in percent: the first at 0, the last at 100, evenly."""
    return np.linspace(0, 100, points)


def medians(values: Float64[np.ndarray, "*rest prompt"]) -> Float64[np.ndarray, "*rest"]:
    """Over the prompts that are finite there; NaN where none is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of rows without a finite value
        return np.asarray(np.nanmedian(np.where(np.isfinite(values), values, np.nan), axis=-1))
