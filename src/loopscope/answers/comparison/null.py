"""How alike two curves over depth are: their correlation, what it would be of curves that have nothing to do with each
other, and how far their levels are apart."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Complex128, Float64, Int64
from numpy.typing import NDArray

from loopscope.answers.comparison.curves import StageCurves, correlated, medians, relative_depth
from loopscope.answers.comparison.settings import CompareSettings

NULL_LEVELS = (0.05, 0.5, 0.95)
NULLS = ("shuffled layers", "random phases", "bent depth")
_MOST_SMOOTH = 1999
"""Curves of each smooth null; an error of 0.005 of a p-value of 0.05."""
_BEND = 2.5
"""Depth is bent by powers between this and its inverse. With 2.5, curves that are powers of depth, drawn between 1/4
and 4, are alike in 4 to 6 % of pairs, with 3 in 5 to 7 %; with less bending less is found of what is there."""
_RESAMPLED, _AT_A_TIME = 200, 25
"""Draws of prompts, from which an interval comes, and how many of them are in memory."""
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
    p_values: Float64[np.ndarray, "null entry"]
    """By each of `NULLS`: the share of its curves, the true one included, that correlate at least as well."""
    null: Float64[np.ndarray, "level entry"]
    """Quantiles of the correlation, at `NULL_LEVELS`, by the null that comes closest: that of the largest p."""

    @property
    def p_value(self) -> Float64[np.ndarray, " entry"]:
        """The largest of `p_values`."""
        return np.asarray(self.p_values.max(axis=0))


@dataclass(frozen=True)
class Surrogates:
    """How curves of a number of points are made into others that have nothing to do with a reference, the same way in
    all measures, so that a mean over measures is judged however these hang together. The first of each is the curve
    itself."""

    orders: Int64[np.ndarray, "order point"]
    """In which the layers may stand: a curve as rough as can be."""
    phases: Complex128[np.ndarray, "phase frequency"]
    """By which the Fourier components of the steps from layer to layer are turned. Their mean stays, and so do the ends
    of the curve, its trend and its smoothness."""
    places: Float64[np.ndarray, "bend point"]
    """Where, in points, the layers are read off instead: values, their order and their turning points stay, a curve
    that rises goes on rising, and what depth it does so at changes."""

    def of(self, curves: Float64[np.ndarray, "measure point"]) -> list[Float64[np.ndarray, "measure surrogate point"]]:
        """For each of `NULLS`."""
        steps = np.diff(curves, axis=1)
        turned = np.fft.irfft(np.fft.rfft(steps)[:, None] * self.phases, steps.shape[1], axis=2).cumsum(axis=2)
        below = np.minimum(self.places.astype(np.int64), curves.shape[1] - 2)
        share = self.places - below
        bent = curves[:, below] * (1 - share) + curves[:, below + 1] * share
        return [curves[:, self.orders], np.pad(turned, ((0, 0), (0, 0), (1, 0))), bent]


def curve_similarity(
    curves: Float64[np.ndarray, "measure point"],
    reference: Float64[np.ndarray, "measure reference_point"],
    settings: CompareSettings,
    made: Surrogates | None = None,
) -> Likeness:
    """Correlate each measure's curve with the reference's, both on relative depth.

    Both are interpolated linearly to a common grid; their points are the layers, evenly from 0 to 100 %. The
    correlation is held against three nulls, and counts by the one that comes closest. Shuffled layers (a permutation
    test: Fisher, The Design of Experiments, 1935) are exact for curves of independent values, and too easy to beat for
    smooth ones. Random phases (Theiler et al., Physica D 58, 1992), here of the steps, are exact for random walks. Both
    are too easy for curves that rise by a law, such as powers of depth: these are alike at other depths too, which bent
    depth tries. `made` are those of `surrogates`, made here unless given.

    A curve with fewer than `fewest_points` points, with a gap, or without variance is not judged: NaN.
    """
    points, measures = curves.shape[1], curves.shape[0]
    needed = fewest_points(settings.alpha)
    judged = varies(curves) & varies(reference)
    if min(points, reference.shape[1]) < needed or not judged.any():
        value, null, levels = (np.full((count, measures + 1), np.nan) for count in (1, len(NULLS), len(NULL_LEVELS)))
        return Likeness(value[0], value[0], null, levels)
    made = made or surrogates(points, settings)
    # At least a grid point between any two layers, so that no layer is overlooked.
    grid = max(settings.grid, 2 * points, 2 * reference.shape[1])
    correlation = _Correlation(reference[judged], points, grid)
    values = _standard(curves[judged])
    by_null = [_with_mean(correlation.of(curves)) for curves in made.of(values)]
    value, backwards = by_null[0][:, 0], _with_mean(correlation.of(values[:, None, ::-1]))[:, 0]
    p_values = np.stack([(found >= value[:, None] - _TIE).mean(axis=1) for found in by_null])
    quantiles = np.stack([np.quantile(found, NULL_LEVELS, axis=1) for found in by_null])
    closest = np.take_along_axis(quantiles, p_values.argmax(axis=0)[None, None], axis=0)[0]
    place = np.append(np.flatnonzero(judged), measures)
    return Likeness(
        value=_spread(value, place, measures),
        reversed=_spread(backwards, place, measures),
        p_values=np.stack([_spread(row, place, measures) for row in p_values]),
        null=np.stack([_spread(row, place, measures) for row in closest]),
    )


def surrogates(points: int, settings: CompareSettings) -> Surrogates:
    """For curves of that many points: all orders of the layers, or `settings.shuffles` of them; smooth curves to match,
    as many as that or `_MOST_SMOOTH`."""
    rng = np.random.default_rng(settings.seed)
    smooth = min(settings.shuffles, _MOST_SMOOTH)
    phases = np.exp(2j * np.pi * rng.random((smooth, (points - 1) // 2 + 1)))
    phases[:, 0] = 1
    if points % 2:  # an even number of steps, whose highest frequency is real
        phases[:, -1] = np.where(rng.random(smooth) < 0.5, 1, -1)
    # 1 - (1 - x^a)^b (Kumaraswamy, 1980) from either end, so that neither is favoured.
    one, other = np.exp(rng.uniform(-1, 1, size=(2, smooth, 1)) * math.log(_BEND))
    turned = rng.random((smooth, 1)) < 0.5
    depth = np.linspace(0, 1, points)
    bent = 1 - (1 - np.where(turned, 1 - depth, depth) ** one) ** other
    bent = np.where(turned, 1 - bent, bent)
    return Surrogates(
        orders=layer_orders(points, settings),
        phases=np.concatenate([np.ones((1, phases.shape[1]), dtype=np.complex128), phases]),
        places=np.concatenate([depth[None], bent]) * (points - 1),
    )


def prompt_interval(
    curves: Float64[np.ndarray, "measure point prompt"],
    reference: Float64[np.ndarray, "measure reference_point reference_prompt"],
    settings: CompareSettings,
    *,
    paired: bool,
) -> Float64[np.ndarray, "bound entry"]:
    """95 % interval of the similarity of each measure, and of their mean, over draws of prompts (a bootstrap of the
    medians over prompts). `paired`: both read the same prompts, which are drawn together. NaN with one prompt."""
    entries, counts = len(curves) + 1, (curves.shape[2], reference.shape[2])
    if min(counts) < 2:
        return np.full((2, entries), np.nan)
    rng = np.random.default_rng(settings.seed)
    grid = max(settings.grid, 2 * curves.shape[1], 2 * reference.shape[1])
    weights = [_interpolation(rows.shape[1], grid).T for rows in (curves, reference)]
    found = []
    for _ in range(_RESAMPLED // _AT_A_TIME):
        drawn = rng.integers(counts[0], size=(_AT_A_TIME, counts[0]))
        also = drawn if paired else rng.integers(counts[1], size=(_AT_A_TIME, counts[1]))
        here, there = (
            correlated(medians(rows[..., which])).swapaxes(1, 2) for rows, which in ((curves, drawn), (reference, also))
        )
        known = varies(here) & varies(there)
        with np.errstate(invalid="ignore", divide="ignore"):  # what does not vary, and is left out
            one, other = (_standard(rows @ to) for rows, to in zip((here, there), weights, strict=True))
        found.append(np.where(known, (one * other).sum(axis=-1), np.nan))
    values = np.concatenate(found, axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of what is nowhere finite
        every = np.concatenate([values, np.nanmean(values, axis=0, keepdims=True)])
        interval = np.nanquantile(every, (0.025, 0.975), axis=1)
    return np.where(np.isfinite(every).mean(axis=1) < 0.5, np.nan, interval)


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
        # A curve that is flat but for one layer may be flat throughout at another depth: it is like nothing then.
        flat = variance <= _FLAT**2 * np.square(values).sum(axis=-1)
        return np.asarray(np.where(flat, 0.0, covariance) / np.sqrt(np.where(flat, 1.0, variance)))


def _interpolation(points: int, grid: int) -> Float64[np.ndarray, "grid point"]:
    """The matrix of linear interpolation from evenly spaced points to the grid."""
    where, at = np.linspace(0, 100, grid), relative_depth(points)
    return np.stack([np.interp(where, at, unit) for unit in np.eye(points)], axis=1)


def _standard(curves: Float64[np.ndarray, "*rest point"]) -> Float64[np.ndarray, "*rest point"]:
    """Without mean and with unit norm, which changes no correlation and keeps magnitudes from swamping digits."""
    centred = curves - curves.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.linalg.norm(centred, axis=-1, keepdims=True))


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
