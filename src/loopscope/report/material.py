"""What the report is drawn from: the readings of a study, and the report's settings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.drawing import Readings, median_over_prompts, positive, read_study
from loopscope.report.settings import ReportSettings
from loopscope.study import Study

__all__ = ["Material", "gather_material", "median_over_prompts", "positive"]


@dataclass(frozen=True, kw_only=True)
class Material(Readings):
    """A study as the report's figures need it."""

    settings: ReportSettings

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


def gather_material(study: Study, settings: ReportSettings) -> Material:
    """Raises `StudyError` for a study that lacks what the quick answers need."""
    return Material(**vars(read_study(study)), settings=settings)
