"""What figures are drawn from: the study, read once, and medians over its prompts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.answers.view import StudyView, view_study
from loopscope.report.settings import ReportSettings
from loopscope.study import Study

__all__ = ["Material", "gather_material", "median_over_prompts", "positive"]


@dataclass(frozen=True, kw_only=True)
class Material:
    """A study as the figures need it."""

    view: StudyView
    shown: xarray.Dataset
    """The finite prompts; all of them, up to where they diverge, if none stayed finite."""
    tokens: Sequence[Mapping[str, Any]]
    settings: ReportSettings
    prelude: int
    recurrent: int
    coda: int

    @property
    def counts(self) -> NDArray[np.int64]:
        """The recurrences to draw, counted from 1: all of them, or a selection that is denser at the start."""
        total, most = self.view.recurrences, self.settings.most_recurrences
        if total <= most:
            return np.arange(1, total + 1)
        spaced = np.geomspace(1, total, most)
        return np.unique(np.concatenate([np.arange(1, most // 4), spaced.round().astype(np.int64)]))

    def curve(self, name: str) -> xarray.DataArray:
        """Median over prompts of a variable, at the recurrences to draw: dimensions (layer, recurrence)."""
        return median_over_prompts(self.shown[name].isel(recurrence=self.counts - 1)).transpose("layer", "recurrence")

    def depth_percent(self, layer: int) -> float:
        """Relative depth, in percent of prelude + block + coda, at which recurrent layer `layer` ends."""
        return 100 * (self.prelude + layer + 1) / (self.prelude + self.recurrent + self.coda)


def gather_material(study: Study, settings: ReportSettings) -> Material:
    """Raises `StudyError` for a study that lacks what the quick answers need."""
    view = view_study(study)
    layout = study.manifest["model"]["layout"]
    return Material(
        view=view,
        shown=view.finite if view.finite.sizes["prompt"] else view.dataset,
        tokens=study.tokens,
        settings=settings,
        prelude=int(layout["prelude"]),
        recurrent=int(layout["recurrent"]),
        coda=int(layout["coda"]),
    )


def median_over_prompts(array: xarray.DataArray, level: float = 0.5) -> xarray.DataArray:
    """Median (or another quantile) of what is finite; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of slices without a finite value
        found = array.where(np.isfinite(array)).quantile(level, "prompt")
    return found.drop_vars("quantile")


def positive(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """For a logarithmic axis: 0 becomes a gap instead of a fall to minus infinity."""
    return np.where(values > 0, values, np.nan).astype(np.float32)
