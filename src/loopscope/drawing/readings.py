"""A study, read once for drawing: its finite prompts, and medians over them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.answers.view import StudyView, view_study
from loopscope.errors import StudyError
from loopscope.study import Study

__all__ = ["Readings", "median_over_prompts", "positive", "quantile_over", "read_study"]


@dataclass(frozen=True, kw_only=True)
class Readings:
    """A study as figures need it."""

    view: StudyView
    shown: xarray.Dataset
    """The finite prompts; all of them, up to where they diverge, if none stayed finite."""
    manifest: Mapping[str, Any]
    tokens: Sequence[Mapping[str, Any]]
    prelude: int
    recurrent: int
    coda: int

    @property
    def layout(self) -> str:
        """(p, k ⊗ R, c), or the number of layers of a feed-forward model."""
        if not self.view.looped:
            return f"{self.prelude + self.coda} layers, feed-forward"
        return f"({self.prelude}, {self.recurrent} ⊗ R, {self.coda})"

    def variable(self, name: str) -> xarray.DataArray:
        """Of the prompts shown. Raises `StudyError` where the study has none of that name."""
        if name not in self.shown:
            raise StudyError(f"The study has no variable {name}, from which this is drawn; docs/study.md says why.")
        return self.shown[name]

    def depth_percent(self, layer: int) -> float:
        """Relative depth, in percent of prelude + block + coda, at which recurrent layer `layer` ends."""
        return 100 * (self.prelude + layer + 1) / (self.prelude + self.recurrent + self.coda)


def read_study(study: Study) -> Readings:
    """Raises `StudyError` for a study that lacks what the quick answers need."""
    view = view_study(study)
    layout = study.manifest["model"]["layout"]
    return Readings(
        view=view,
        shown=view.finite if view.finite.sizes["prompt"] else view.dataset,
        manifest=study.manifest,
        tokens=study.tokens,
        prelude=int(layout["prelude"]),
        recurrent=int(layout["recurrent"]),
        coda=int(layout["coda"]),
    )


def median_over_prompts(array: xarray.DataArray, level: float = 0.5) -> xarray.DataArray:
    """Median (or another quantile) of what is finite; NaN where nothing is."""
    return quantile_over(array, level, "prompt")


def quantile_over(array: xarray.DataArray, level: float, dim: str) -> xarray.DataArray:
    """Quantile, along a dimension, of what is finite; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of slices without a finite value
        found = array.where(np.isfinite(array)).quantile(level, dim)
    return found.drop_vars("quantile")


def positive(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """For a logarithmic axis: 0 becomes a gap instead of a fall to minus infinity."""
    return np.where(values > 0, values, np.nan).astype(np.float32)
