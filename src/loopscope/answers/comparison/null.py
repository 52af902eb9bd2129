"""How alike two curves over depth are: their correlation, what it would be if the layers stood in another order, and
how far their levels are apart."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray

from loopscope.answers.comparison.curves import StageCurves, correlated, relative_depth
from loopscope.answers.comparison.settings import CompareSettings

NULL_LEVELS = (0.05, 0.5, 0.95)
_FLAT = 1e-6
"""A curve whose spread is below this share of its size does not vary: float32 makes 1e-7 of nothing."""
_TIE = 1e-9
"""Correlations this close are the same: an order may only exchange equal values."""


@dataclass(frozen=True)
class Likeness:
    """Correlations with a reference, one per measure, and last the mean over the measures that can be judged."""

    value: Float64[np.ndarray, " entry"]
    """Pearson correlation on the common grid. NaN: cannot tell."""
    reversed: Float64[np.ndarray, " entry"]
    """The same with the curve's layers in reversed order."""
    p_value: Float64[np.ndarray, " entry"]
    """Share of the orders of the layers, the true one included, that correlate at least as well."""
    null: Float64[np.ndarray, "level entry"]
    """Quantiles of the correlation over those orders, at `NULL_LEVELS`."""


def curve_similarity(
    curves: Float64[np.ndarray, "measure point"],
    reference: Float64[np.ndarray, "measure reference_point"],
    settings: CompareSettings,
    orders: Int64[np.ndarray, "order point"] | None = None,
) -> Likeness:
    """Correlate each measure's curve with the reference's, both on relative depth.

    Both are interpolated linearly to a common grid; their points are the layers, evenly from 0 to 100 %. The null is a
    permutation test (Fisher, The Design of Experiments, 1935): the values of a curve keep to their measure, the layers
    change places, the same way in all measures, so that the mean over measures has an exact null as well however the
    measures hang together. It asks whether the order of the layers matters; a null of shuffled layers is rougher than
    curves that vary smoothly, for which it is too easy to beat. `orders` are those of `layer_orders`, made here unless
    given.

    A curve with fewer than `fewest_points` points, with a gap, or without variance is not judged: NaN.
    """
    points, measures = curves.shape[1], curves.shape[0]
    needed = fewest_points(settings.alpha)
    judged = varies(curves) & varies(reference)
    if min(points, reference.shape[1]) < needed or not judged.any():
        nothing = np.full(measures + 1, np.nan)
        return Likeness(nothing, nothing, nothing, np.full((len(NULL_LEVELS), measures + 1), np.nan))
    orders = layer_orders(points, settings) if orders is None else orders
    # At least a grid point between any two layers, so that no layer is overlooked.
    grid = max(settings.grid, 2 * points, 2 * reference.shape[1])
    correlation = _Correlation(reference[judged], points, grid)
    values = _standard(curves[judged])
    shuffled = _with_mean(correlation.of(values[:, orders]))
    value, backwards = shuffled[:, 0], _with_mean(correlation.of(values[:, None, ::-1]))[:, 0]
    place = np.append(np.flatnonzero(judged), measures)
    return Likeness(
        value=_spread(value, place, measures),
        reversed=_spread(backwards, place, measures),
        p_value=_spread((shuffled >= value[:, None] - _TIE).mean(axis=1), place, measures),
        null=np.stack([_spread(row, place, measures) for row in np.quantile(shuffled, NULL_LEVELS, axis=1)]),
    )


def layer_orders(points: int, settings: CompareSettings) -> Int64[np.ndarray, "order point"]:
    """Orders of that many layers, the true one first: all of them, or a sample with `settings.shuffles` others."""
    if points <= 1 or math.factorial(points) <= settings.shuffles:
        return np.array(list(itertools.permutations(range(points))), dtype=np.int64)
    rng = np.random.default_rng(settings.seed)
    shuffled = rng.permuted(np.tile(np.arange(points), (settings.shuffles, 1)), axis=1)
    return np.concatenate([np.arange(points)[None], shuffled]).astype(np.int64)


def fewest_points(alpha: float) -> int:
    """The number of points from which on an order can be as rare as `alpha`: n! >= 1 / alpha (4 for 0.05)."""
    return next(points for points in itertools.count(2) if math.factorial(points) * alpha >= 1)


def own_similarity(curves: StageCurves) -> Float64[np.ndarray, "measure recurrence"]:
    """Pearson correlation of each pass through the block with the pass at `home`.

    They are the same layers, so that it takes no grid and no null. NaN where a curve does not vary.
    """
    block = correlated(curves.block)
    centred = block - block.mean(axis=2, keepdims=True)
    home = centred[:, curves.home, None]
    known = varies(block) & varies(block[:, curves.home, None])
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (centred * home).sum(axis=2) / (np.linalg.norm(centred, axis=2) * np.linalg.norm(home, axis=2))
    return np.where(known, found, np.nan)


def drift(curves: StageCurves) -> Float64[np.ndarray, "measure recurrence"]:
    """Root mean square difference of each pass through the block from the pass at `home`, over the root mean square of
    that."""
    home = curves.block[:, curves.home, None]
    return _over(curves.block - home, home)


def level_difference(
    curves: Float64[np.ndarray, "measure point"], reference: Float64[np.ndarray, "measure reference_point"], grid: int
) -> Float64[np.ndarray, " measure"]:
    """Root mean square difference on the common grid, over the root mean square of the reference.

    A correlation is blind to level and scale: two curves of the same shape may lie a factor of ten apart.
    """
    where = np.linspace(0, 100, grid)
    here, there = (
        np.stack([np.interp(where, relative_depth(rows.shape[1]), row) for row in rows]) for rows in (curves, reference)
    )
    return _over(here - there, there)


def varies(curves: Float64[np.ndarray, "*rest point"]) -> Bool[np.ndarray, "*rest"]:
    """Whether each curve is finite and not flat."""
    finite = np.isfinite(curves).all(axis=-1)
    known = np.where(finite[..., None], curves, 0.0)
    return np.asarray(finite & (np.ptp(known, axis=-1) > _FLAT * np.abs(known).max(axis=-1)))


class _Correlation:
    """Pearson correlation with a reference on the grid, as a function of the values at a curve's own points.

    Interpolation is linear in these values: with W from points to grid, without its column means, the covariance is
    (W^T r) y and the variance y^T (W^T W) y, so that no shuffled curve has to be interpolated.
    """

    def __init__(self, reference: Float64[np.ndarray, "measure reference_point"], points: int, grid: int) -> None:
        there = _standard(reference) @ _interpolation(reference.shape[1], grid).T
        there -= there.mean(axis=1, keepdims=True)
        weights = _interpolation(points, grid)
        weights -= weights.mean(axis=0)
        self._covariance = there / np.linalg.norm(there, axis=1, keepdims=True) @ weights
        self._variance = weights.T @ weights

    def of(self, values: Float64[np.ndarray, "measure order point"]) -> Float64[np.ndarray, "measure order"]:
        covariance = (values @ self._covariance[:, :, None])[..., 0]
        variance = np.vecdot(values @ self._variance, values)
        return np.asarray(covariance / np.sqrt(variance))


def _interpolation(points: int, grid: int) -> Float64[np.ndarray, "grid point"]:
    """The matrix of linear interpolation from evenly spaced points to the grid."""
    where, at = np.linspace(0, 100, grid), relative_depth(points)
    return np.stack([np.interp(where, at, unit) for unit in np.eye(points)], axis=1)


def _standard(curves: Float64[np.ndarray, "measure point"]) -> Float64[np.ndarray, "measure point"]:
    """Without mean and with unit norm, which changes no correlation and keeps magnitudes from swamping digits."""
    centred = curves - curves.mean(axis=1, keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))


def _with_mean(
    correlations: Float64[np.ndarray, "judged order"],
) -> Float64[np.ndarray, "entry order"]:
    return np.concatenate([correlations, correlations.mean(axis=0, keepdims=True)])


def _spread(
    values: Float64[np.ndarray, " known"], place: NDArray[np.int64], measures: int
) -> Float64[np.ndarray, " entry"]:
    """To one entry per measure and the mean; NaN for those that were not judged."""
    spread = np.full(measures + 1, np.nan)
    spread[place] = values
    return spread


def _over(
    difference: Float64[np.ndarray, "*rest point"], reference: Float64[np.ndarray, "*other point"]
) -> Float64[np.ndarray, "*rest"]:
    """Ratio of root mean squares along the last axis; for a reference of 0, 0 without a difference, else infinite."""
    apart, size = (np.sqrt((values**2).mean(axis=-1)) for values in (difference, reference))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(apart == 0, 0.0, apart / size)
