"""Shares with their intervals, medians, paired differences, and how many of many findings survive."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import special

_Z = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion, as fractions (Wilson, Journal of the American Statistical
    Association 22, 1927). Unlike the textbook interval it is sensible for few trials and for shares of 0 or 1. No
    trials: (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 / (1 + _Z**2 / trials)
    centre = scale * (share + _Z**2 / (2 * trials))
    half = scale * _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    # At the ends the bound is the share itself; rounding must not push it past.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


@dataclass(frozen=True)
class Share:
    """That many of the prompts."""

    count: int
    total: int
    undecided: int = 0
    """Others of them that may belong to it, which widen the interval."""

    @property
    def value(self) -> float:
        """The fraction, 0 of no prompts at all."""
        return self.count / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the fraction, up to that of all that may belong to it."""
        return wilson_interval(self.count, self.total)[0], wilson_interval(self.count + self.undecided, self.total)[1]

    def __str__(self) -> str:
        low, high = self.interval
        # Outwards to whole percent, so that the printed interval holds at least what it promises.
        span = f"{math.floor(100 * low + 1e-9)}–{math.ceil(100 * high - 1e-9)} %"
        return f"{self.count} of {self.total} prompts (95 % interval {span})"


def finite_or_none(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def median(values: NDArray[np.floating]) -> float:
    """Median of the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def quantile(values: NDArray[np.floating], level: float) -> float:
    """Quantile of the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(np.quantile(finite, level)) if finite.size else math.nan


def mean(values: NDArray[np.floating]) -> float:
    """Mean of the finite values; NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(np.mean(finite)) if finite.size else math.nan


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences of the same prompts under two conditions."""

    mean: float
    half_width: float
    """Half of the 95 % interval (Student's t); infinite for fewer than two prompts."""

    def exceeds(self, tolerance: float) -> bool:
        """Larger than the tolerance, and not by chance of the prompts alone: a single prompt cannot say so."""
        return self.mean > max(tolerance, self.half_width)


def paired_difference(first: NDArray[np.floating], second: NDArray[np.floating]) -> PairedDifference:
    """Of `first - second`, both of shape (prompt,), over the prompts where both are finite."""
    differences = first - second
    differences = differences[np.isfinite(differences)]
    count = differences.size
    mean = float(differences.mean()) if count else math.nan
    if count < 2:
        return PairedDifference(mean, math.inf)
    error = float(differences.std(ddof=1)) / math.sqrt(count)
    return PairedDifference(mean, float(special.stdtrit(count - 1, 0.975)) * error)


def clopper_pearson(successes: int | float, trials: int | float, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a proportion, as fractions (Clopper and Pearson, Biometrika 26, 1934).

    It covers the true share with at least the probability `level`, however rare it is; from no trials, (0, 1). Numbers
    that are not whole are effective ones.
    """
    if trials == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, trials - successes + 1, tail))
    high = 1.0 if successes == trials else float(special.betaincinv(successes + 1, trials - successes, 1 - tail))
    return low, high


def cluster_interval(found: NDArray[np.integer], total: NDArray[np.integer]) -> tuple[float, float]:
    """95 % interval of `found.sum() / total.sum()`, both of shape (cluster,): things of one cluster depend on each
    other, clusters do not.

    The Clopper-Pearson interval of as many independent things as would scatter as the clusters do (Korn and Graubard,
    Survey Methodology 24, 1998). Where none or all were found nothing scatters; then clusters are counted, since what
    one cluster has, all of it may have. A single cluster tells nothing: (0, 1).
    """
    there = total > 0
    found, total = found[there].astype(np.float64), total[there].astype(np.float64)
    count, things = len(total), float(total.sum())
    if count < 2:
        return 0.0, 1.0
    share = float(found.sum()) / things
    if share in (0.0, 1.0):
        return clopper_pearson(share * count, count)
    variance = count / (count - 1) * float(np.square(found - share * total).sum()) / things**2
    # Student's t instead of the normal quantile, for a variance that is itself estimated.
    factor = (_Z / float(special.stdtrit(count - 1, 0.975))) ** 2
    effective = min(things, share * (1 - share) / variance * factor) if variance > 0 else things
    return clopper_pearson(share * effective, effective)


def surviving(p_values: NDArray[np.floating], rate: float = 0.05) -> NDArray[np.bool_]:
    """Which of some tests are found at this false discovery rate (Benjamini and Hochberg, Journal of the Royal
    Statistical Society B 57, 1995); a NaN is a test that found nothing."""
    flat = np.where(np.isnan(p_values), 1.0, p_values).ravel()
    order = np.sort(flat)
    below = np.flatnonzero(order <= rate * np.arange(1, flat.size + 1) / max(flat.size, 1))
    return np.asarray(np.where(np.isnan(p_values), 1.0, p_values) <= (order[below[-1]] if below.size else -1.0))
