"""What models of several seeds say together: means with their intervals, and what of many designs the seeds carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from scipy import special

_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean over seeds, with Student's interval of it; with one seed the interval is unknown (infinite). As text
    the values of two seeds stand for it, which say more."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    """Of the seeds."""

    @property
    def count(self) -> int:
        """Seeds."""
        return len(self.values)

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.3f} (one seed)"
        if self.count == 2:
            return f"{self.mean:.3f} (seeds {min(self.values):.3f} and {max(self.values):.3f})"
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"

    @property
    def side(self) -> int:
        """-1 where all of the interval lies below zero, 1 where all of it lies above, 0 where the seeds do not
        tell."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def interval(values: Sequence[float], comparisons: int = 1) -> Interval:
    """The mean of one value a seed, with Student's 95 % interval of it.

    The unit is the seed: its value is a mean over all tokens of the test text, and how much such means differ holds
    the chance within a seed as well. That the text is one and the same is not in it. Of several `comparisons` all
    intervals hold together with 95 % (Bonferroni).
    """
    mean, count = fmean(values), len(values)
    if count < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, values=tuple(values))
    quantile = float(special.stdtrit(count - 1, 1 - (1 - _LEVEL) / 2 / comparisons))
    half = quantile * stdev(values) / math.sqrt(count)
    return Interval(mean=mean, low=mean - half, high=mean + half, values=tuple(values))


@dataclass(frozen=True)
class Told:
    """Of which designs the seeds tell that a number lies below zero or above it; the intervals hold together."""

    intervals: dict[str, Interval] = field(default_factory=dict)
    """By name of the design."""

    @classmethod
    def of(cls, values: Mapping[str, Sequence[float]]) -> Told:
        """From one value a seed of each design; designs without one are left out, and those with a single one tell
        nothing, so that they cost the others no width."""
        comparisons = max(1, sum(len(each) > 1 for each in values.values()))
        return cls({name: interval(each, comparisons) for name, each in values.items() if each})

    def on(self, side: int) -> list[str]:
        """Designs whose interval lies there: -1 below, 1 above, 0 for those that the seeds leave open."""
        return [name for name, each in self.intervals.items() if each.side == side]

    @property
    def seeds(self) -> str:
        """`5 seeds`, or `2 to 5 seeds` of a design."""
        counts = [each.count for each in self.intervals.values()]
        low, high = min(counts, default=0), max(counts, default=0)
        return ("1 seed" if high == 1 else f"{high} seeds") if low == high else f"{low} to {high} seeds"


def fisher_p(first: tuple[int, int], second: tuple[int, int]) -> float:
    """Fisher's exact two-sided p-value that two groups, (with, without) each, have the same share (Fisher, Journal of
    the Royal Statistical Society 85, 1922): the probability, at the same margins, of tables that are no likelier."""
    one, other, having = sum(first), sum(second), first[0] + second[0]
    weights = [
        math.comb(one, count) * math.comb(other, having - count)
        for count in range(max(0, having - other), min(one, having) + 1)
    ]
    seen = math.comb(one, first[0]) * math.comb(other, second[0])
    return sum(each for each in weights if each <= seen) / sum(weights)
