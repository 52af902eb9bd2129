"""Shares of prompts with their intervals, and medians with their ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

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

    @property
    def value(self) -> float:
        """The fraction, 0 of no prompts at all."""
        return self.count / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the fraction."""
        return wilson_interval(self.count, self.total)

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
    """Half of the 95 % interval (normal approximation); infinite for fewer than two prompts."""

    def exceeds(self, tolerance: float) -> bool:
        """Larger than the tolerance, and not by chance of the prompts alone (a single prompt cannot say)."""
        certain = not math.isfinite(self.half_width) or self.mean > self.half_width
        return self.mean > tolerance and certain


def paired_difference(first: NDArray[np.floating], second: NDArray[np.floating]) -> PairedDifference:
    """Of `first - second`, both of shape (prompt,), over the prompts where both are finite."""
    differences = first - second
    differences = differences[np.isfinite(differences)]
    if differences.size == 0:
        return PairedDifference(math.nan, math.inf)
    if differences.size == 1:
        return PairedDifference(float(differences[0]), math.inf)
    error = float(differences.std(ddof=1)) / math.sqrt(differences.size)
    return PairedDifference(float(differences.mean()), _Z * error)
