"""Numbers that are counted or scaled before they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray
from jaxtyping import Float64
from numpy.typing import NDArray

from loopscope.answers.final import final_from
from loopscope.report.settings import ReportSettings
from loopscope.study import Readings, Study, median_over_prompts, read_study


def per_row(shown: xarray.Dataset, name: str) -> xarray.DataArray:
    """A Frobenius distance of attention maps over sqrt(T), so that prompts of different length compare."""
    return shown[name] / np.sqrt(shown["token_count"])


def stable_share(stable_from: xarray.DataArray, counts: NDArray[np.int64]) -> Float64[np.ndarray, "layer count"]:
    """Share of a layer's (head, prompt) pairs that are stable after so many recurrences, from `head_stable_from`."""
    settled = [(stable_from < count).where(np.isfinite(stable_from), other=False) for count in counts]
    shares = [one.mean([dim for dim in one.dims if dim != "layer"]).values for one in settled]
    return np.stack(shares, axis=-1).astype(np.float64)


def final_shares(top: xarray.DataArray) -> tuple[Float64[np.ndarray, " readout"], Float64[np.ndarray, " readout"]]:
    """Of all tokens, the share whose most probable next token is the last readout's at each readout, and the share that
    keeps it from there; from `token_top1`."""
    rows = top.transpose("readout_recurrence", "prompt", "token").values
    there = rows[-1] >= 0
    place = final_from(rows)[there]
    agrees = np.array([(row == rows[-1])[there].mean() for row in rows])
    return agrees, np.array([(place <= index).mean() for index in range(len(rows))])


@dataclass(frozen=True, kw_only=True, eq=False)
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
    return Material(
        **{name: value for name, value in vars(read_study(study)).items() if name != "_medians"}, settings=settings
    )
