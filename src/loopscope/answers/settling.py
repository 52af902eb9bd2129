"""What each layer's state does in the end, prompt by prompt.

The distance to a state's own last value says nothing: it is 0 there by construction. So the judgement rests on what
happens between two horizons, H and 2H recurrences, on the single steps into them, and on the norm.
"""

from __future__ import annotations

from enum import StrEnum
from itertools import groupby

import numpy as np
import xarray

from loopscope.answers.criterion import Criterion
from loopscope.answers.view import StudyView
from loopscope.answers.wording import spans

__all__ = ["SUMMABLE_RATIO", "Settling", "prompt_settling", "settling", "settling_by_layer", "step_ratio"]


class Settling(StrEnum):
    """How a state behaves towards the second horizon, from the best to the worst; the values are what a reader
    sees."""

    FIXED_POINT = "fixed point"
    AT_FLOOR = "at the rounding floor"
    STILL_CONVERGING = "cannot tell: still slowing"
    DIRECTION_ONLY = "direction only: the norm grows"
    NO_FIXED_POINT = "no fixed point"
    DIVERGED = "diverged"


SUMMABLE_RATIO = 0.5
"""The ratio of two steps, at 2H and at H, that shrink like 1/t. Steps that shrink faster than that add up to a
finite way; others to a way without end. No setting: it follows from the harmonic series."""

_ORDER = tuple(Settling)


def settling(view: StudyView, criterion: Criterion) -> xarray.DataArray:
    """The `Settling` of every layer and prompt, as an array of its integer rank, dimensions (layer, prompt).

    Rank r stands for `list(Settling)[r]`. A state is settled if it stays within the tolerances from H to 2H and in
    the steps into both. If not, and the direction is settled while the norm grows, in steps that add up without
    limit and make most of the movement, only the direction has settled. If rounding alone explains the steps that
    are left, it is at the floor. Otherwise the lengths of the two steps (not divided by the norm, whose growth
    would make steps look smaller) say whether it slows down.
    """
    data = view.dataset
    drift = data["horizon_drift"].transpose("layer", "prompt")
    step = data["horizon_relative_step"].max("horizon", skipna=False)
    growth = data["horizon_norm_growth"]
    movement = np.maximum(drift, step)
    rounding = criterion.floor_factor * data["noise_floor"].fillna(0)
    turned = np.arccos(data["horizon_drift_cosine"].clip(-1, 1))

    norm_settled = abs(growth - 1) <= criterion.norm_growth_tolerance
    fixed = (movement <= criterion.drift_tolerance) & norm_settled
    # Rounding errors that nothing pulls back add up like a random walk: to sqrt(H) times one of them.
    floor = (step <= rounding) & (drift <= np.sqrt(view.horizon) * rounding)
    ratio = step_ratio(data)
    outwards = turned * growth < growth - 1  # as shares of the norm at H: way around against way out
    direction = (
        (growth > 1 + criterion.norm_growth_tolerance)
        & (turned <= criterion.direction_tolerance)
        & outwards
        & ~(ratio < SUMMABLE_RATIO)
    )
    slowing = ratio < criterion.slowing_ratio
    missing = (data["diverged_at"] >= 0) | ~np.isfinite(movement + growth + turned)

    cases = [
        (missing, Settling.DIVERGED),
        (fixed, Settling.FIXED_POINT),
        (direction, Settling.DIRECTION_ONLY),
        (floor, Settling.AT_FLOOR),
        (slowing, Settling.STILL_CONVERGING),
    ]
    ranks = np.select(
        [np.broadcast_to(case.transpose("layer", "prompt").values, drift.shape) for case, _ in cases],
        [_ORDER.index(kind) for _, kind in cases],
        default=_ORDER.index(Settling.NO_FIXED_POINT),
    )
    return xarray.DataArray(ranks, dims=("layer", "prompt"), coords={"layer": data["layer"]}, name="settling")


def step_ratio(data: xarray.Dataset) -> xarray.DataArray:
    """Length of the step into 2H over that of the step into H, dimensions (layer, prompt)."""
    length = data["horizon_relative_step"] * data["horizon_residual_norm"]
    with np.errstate(divide="ignore", invalid="ignore"):  # a state that is exactly fixed makes steps of length 0
        return length.sel(horizon="second", drop=True) / length.sel(horizon="first", drop=True)


def prompt_settling(ranks: xarray.DataArray) -> list[Settling]:
    """The settling of each prompt: that of its worst layer."""
    return [_ORDER[rank] for rank in ranks.max("layer").values]


def settling_by_layer(ranks: xarray.DataArray, criterion: Criterion) -> dict[str, str]:
    """`{"layers 0–2": "fixed point (64 of 64 prompts)"}`: what most prompts show, neighbours that agree drawn
    together. A layer on which too few prompts agree is said to depend on the prompt."""
    total = ranks.sizes["prompt"]

    def describe(layer: int) -> str:
        counts = np.bincount(ranks.values[layer], minlength=len(_ORDER))
        most = int(counts.argmax())
        if counts[most] < criterion.prompts_needed * total:
            parts = (f"{count} {_ORDER[rank]}" for rank, count in enumerate(counts) if count)
            return f"depends on the prompt ({', '.join(parts)})"
        return f"{_ORDER[most]} ({counts[most]} of {total} prompts)"

    described = {}
    for text, group in groupby(range(ranks.sizes["layer"]), describe):
        layers = list(group)
        described[f"{'layer' if len(layers) == 1 else 'layers'} {spans(layers)}"] = text
    return described
