"""The rate at which a trajectory settles, read from its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from loopscope._util.ranges import Range, check_ranges
from loopscope.errors import ConfigError

Lengths = Float[ndarray, "*shape recurrence"]

_WIDENED = 4
"""Uncertainty, in differences between the halves of a window."""

_ROUNDOFF = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class RateReason(StrEnum):
    """Why there is a rate, or none."""

    FITTED = "fitted"
    TOO_SHORT = "too few steps above the noise floor"
    AT_REST = "the state does not move"
    NOT_FINITE = "the steps are not finite"


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """Which steps a rate is fitted to. The values are those that came nearest on linear maps with known spectra (24 to
    32 dimensions, rates 0.2 to 0.97, other eigenvalues up to 0.98 of the leading one, noise of float64 to bfloat16).

    Raises `ConfigError` for a value outside its range.
    """

    above_floor: Annotated[float, Range(0)] = 10.0
    """Steps below this many times the noise floor are left out: at ten times, noise adds 0.5 % to a step."""
    explained: Annotated[float, Range(0)] = 300.0
    """Steps that no longer shrink are a floor if they are within this many unit roundoffs of the state. Loops amplify
    rounding, by a hundred in a trained model; steps that stay larger are an orbit or a slider, and have a rate of 1."""
    transient: Annotated[float, Range(0)] = 0.5
    """Share of the usable recurrences that is left out at their beginning, where faster eigenvalues are still seen."""
    least_transient: Annotated[float, Range(0)] = 0.25
    """As little as this is left out where more would leave too few steps: in float32 a rate of 0.2 shows eight steps
    above the floor."""
    least_fall: Annotated[float, Range(0)] = 100.0
    """Where steps end at the floor they must have fallen by this factor on their way to it. A bfloat16 floor leaves
    room for a factor of six or so, which shows little but transients: rates from it were off by 0.08 (median)."""
    fewest: Annotated[int, Range(6, why="so that each half of a window has a slope")] = 6
    """Steps that a fit needs. With fewer, the halves of a window, from which its uncertainty comes, have no slope."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.least_transient <= self.transient < 1:
            raise ConfigError(
                f"transient must be below 1 and no less than least_transient, got {self.transient} and "
                f"{self.least_transient}."
            )


@dataclass(frozen=True, eq=False)
class ObservedRates:
    """One for every trajectory."""

    rate: Float[ndarray, "*shape"]
    """Factor from one step's length to the next's; NaN where there is none."""
    uncertainty: Float[ndarray, "*shape"]
    """The larger of two: four times the difference of the rates in the two halves of the window, which sees a transient
    that is passing; and what a factor of t^2 beside the geometric fall adds, twice the rate over the number of the
    window's middle step: tokens before, and Jacobians that are not normal, make such factors. The halves of a short
    window may agree by chance: alone they cover the error of 87 % of the tokens of a trained model, both 99 %, and of
    96 % of those of random models in float32."""
    first: Int[ndarray, "*shape"]
    """The first step that was fitted, from 0."""
    stop: Int[ndarray, "*shape"]
    """The one after the last."""
    reason: ndarray
    """`RateReason` as text."""
    settings: RateSettings


def observed_rate(
    steps: Lengths,
    *,
    sizes: ndarray | None = None,
    dtype: str = "float32",
    floor: Float[ndarray, "*shape"] | None = None,
    settings: RateSettings | None = None,
) -> ObservedRates:
    """Fit a geometric rate to the lengths of a trajectory's steps, or to its distances from its fixed point.

    **Arguments**

    - `steps`: `|x_(t+1) - x_t|`, the last dimension being t.
    - `sizes`: `|x_t|`, of the shape of `steps`, if the steps are not relative to it already.
    - `dtype`: in which the trajectory was computed: float64, float32, float16 or bfloat16.
    - `floor`: relative step that noise keeps up, if it is known; it is not taken to be less than rounding.

    The rate is `exp` of the median slope of log lengths between steps at least a third of the window apart (Theil and
    Sen): the dips of a rotation, where the length's logarithm falls without bound, and single outliers do not move it.
    The window ends where steps come near the noise floor, and begins after the transient.

    Raises `ConfigError` for a dtype that is none of the four, and for sizes of another shape.
    """
    settings = settings or RateSettings()
    if dtype not in _ROUNDOFF:
        raise ConfigError(f"dtype must be one of {', '.join(_ROUNDOFF)}, got {dtype!r}.")
    if sizes is not None and sizes.shape != steps.shape:
        raise ConfigError(f"sizes has shape {sizes.shape}, and steps {steps.shape}; give one size for each step.")
    shape = steps.shape[:-1]
    relative = steps if sizes is None else _ratio(steps, sizes)
    steps, relative = (np.reshape(each, (-1, steps.shape[-1])).astype(np.float64) for each in (steps, relative))
    known: ndarray = np.all(np.isfinite(steps) & np.isfinite(relative), axis=-1)
    floors = _floors(np.where(known[:, None], relative, 0.0), _ROUNDOFF[dtype], settings)
    floors = np.maximum(floors, np.broadcast_to(0.0 if floor is None else floor, shape).ravel())
    fits = [
        _fit(steps[row], relative[row], floors[row], settings)
        if known[row]
        else (math.nan, math.nan, 0, 0, RateReason.NOT_FINITE.value)
        for row in range(len(steps))
    ]

    def column(place: int, kind: type) -> ndarray:
        return np.array([fit[place] for fit in fits], dtype=kind).reshape(shape)

    return ObservedRates(
        rate=column(0, float),
        uncertainty=column(1, float),
        first=column(2, int),
        stop=column(3, int),
        reason=column(4, str),
        settings=settings,
    )


_Fit = tuple[float, float, int, int, str]


def _fit(steps: ndarray, relative: ndarray, floor: float, settings: RateSettings) -> _Fit:
    if not steps.any():
        return math.nan, math.nan, 0, 0, RateReason.AT_REST.value
    drowned = np.flatnonzero((relative <= settings.above_floor * floor) | (steps <= 0))
    stop = int(drowned[0]) if len(drowned) else len(steps)
    is_short = stop < len(steps) and steps[:stop].max(initial=0.0) < settings.least_fall * steps[stop]
    first = max(min(int(stop * settings.transient), stop - settings.fewest), int(stop * settings.least_transient))
    if is_short or stop - first < settings.fewest:
        return math.nan, math.nan, first, stop, RateReason.TOO_SHORT.value
    logarithms = np.log(steps[first:stop])
    half = len(logarithms) // 2
    early, late = (math.exp(_slope(part)) for part in (logarithms[:half], logarithms[half:]))
    rate = math.exp(_slope(logarithms))
    uncertainty = max(_WIDENED * abs(early - late), 4 * rate / (first + stop))
    return rate, uncertainty, first, stop, RateReason.FITTED.value


def _floors(relative: ndarray, roundoff: float, settings: RateSettings) -> ndarray:
    """The relative step that rounding keeps up: the level of the last quarter if it is flat and so low that rounding
    explains it, and never less than what two rounded states differ by."""
    tail = relative[:, -max(relative.shape[-1] // 4, 4) :]
    half = tail.shape[-1] // 2
    level, early, late = (np.median(each, axis=-1) for each in (tail, tail[:, :half], tail[:, half:]))
    explained = (late > 0.8 * early) & (level < settings.explained * roundoff)
    return np.maximum(2 * roundoff, np.where(explained, level, 0.0))


def _slope(values: ndarray) -> float:
    """Median slope between places at least a third of all apart."""
    earlier, later = _places(len(values))
    return float(np.median((values[later] - values[earlier]) / (later - earlier)))


@lru_cache(maxsize=256)
def _places(count: int) -> tuple[ndarray, ndarray]:
    """All pairs of so many that are at least a third apart."""
    return np.triu_indices(count, max(1, count // 3))


def _ratio(steps: ndarray, sizes: ndarray) -> ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: ndarray = steps / sizes
    return np.where(steps == 0, 0.0, ratio)
