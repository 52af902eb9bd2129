"""A quantity of every visit as figures draw it: its middle over prompts, and a band around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray
from jaxtyping import Float64
from numpy.typing import NDArray

from loopscope.answers.quantities import StageQuantity
from loopscope.report.figures.curves import per_row
from loopscope.study import Readings, median_over_prompts, quantile_over, sites_of

BAND_LEVELS = (0.05, 0.95)
"""What lies outside a band are the outer 5 % on either side: quantiles that every study keeps."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Low edge, middle and high edge at every visit; NaN where there is none."""

    title: str
    """Of the y axis."""
    block: Float64[np.ndarray, "3 layer recurrence"]
    prelude: Float64[np.ndarray, "3 prelude"]
    coda: Float64[np.ndarray, "3 coda"]

    @property
    def recurrences(self) -> int:
        return int(self.block.shape[2])

    def along_depth(self, recurrences: int) -> Float64[np.ndarray, "3 visit"]:
        """Through all visits in order, up to a recurrence; the coda follows the last recurrence only."""
        loop = self.block[:, :, :recurrences].transpose(0, 2, 1).reshape(3, -1)
        last = [self.coda] if recurrences == self.recurrences else []
        return np.concatenate([self.prelude, loop, *last], axis=1)


def state_curve(readings: Readings, name: str, title: str, *, one_minus: bool = False) -> Curve:
    """A variable with dimensions (layer, recurrence, prompt): median over prompts.

    The band is the study's quantiles over tokens, medians over prompts; of a variable that has none there is no band.
    `one_minus` turns a cosine into its distance from 1.
    """
    middle = median_over_prompts(readings.variable(name))
    edges = [xarray.full_like(middle, np.nan)] * 2
    if f"{name}_quantile" in readings.shown:
        quantiles = readings.variable(f"{name}_quantile")
        edges = [median_over_prompts(quantiles.sel(quantile=level, drop=True)) for level in BAND_LEVELS]
    values = _stacked([edges[0], middle, edges[1]], ("layer", "recurrence"))
    return _of_block(readings, title, 1 - values[::-1] if one_minus else values)


def attention_curve(readings: Readings, name: str, title: str) -> Curve:
    """A Frobenius distance of attention maps per row: mean over heads, median over prompts; the band is over heads and
    prompts."""
    distance = per_row(readings.shown, name)
    every = distance.stack(place=("head", "prompt"))
    low, high = (quantile_over(every, level, "place") for level in BAND_LEVELS)
    return _of_block(
        readings, title, _stacked([low, median_over_prompts(distance.mean("head")), high], ("layer", "recurrence"))
    )


def visit_curve(readings: Readings, quantity: StageQuantity) -> Curve:
    """A stage measure of every visit: median over prompts, the band over prompts where there are several."""
    of_prompt = quantity.of_prompt(readings.shown)
    levels = [BAND_LEVELS[0], 0.5, BAND_LEVELS[1]]
    values = _stacked([median_over_prompts(of_prompt, level) for level in levels], ("depth",))
    if of_prompt.sizes["prompt"] == 1:
        values[[0, 2]] = np.nan
    sites = sites_of(readings.shown)
    stages = {
        stage: values[:, [index for index, site in enumerate(sites) if site.stage == stage]]
        for stage in ("prelude", "recurrent", "coda")
    }
    loop = stages["recurrent"].reshape(3, -1, max(1, readings.recurrent)).transpose(0, 2, 1)
    return Curve(
        title=quantity.y_title,
        block=loop if readings.recurrent else np.empty((3, 0, 0)),
        prelude=stages["prelude"],
        coda=stages["coda"],
    )


def _of_block(readings: Readings, title: str, values: NDArray[np.float64]) -> Curve:
    """A quantity of the recurrent layers alone: gaps stand for the others, so that depth counts every layer."""
    gaps = {name: np.full((3, getattr(readings, name)), np.nan) for name in ("prelude", "coda")}
    return Curve(title=title, block=values, **gaps)


def _stacked(arrays: Sequence[xarray.DataArray], dims: tuple[str, ...]) -> NDArray[np.float64]:
    return np.stack([array.transpose(*dims).values.astype(np.float64) for array in arrays])
