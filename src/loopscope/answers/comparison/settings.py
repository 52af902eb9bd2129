"""How curves of studies are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from loopscope._util.ranges import Count, Range, Seed, check_ranges
from loopscope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """How curves of studies are compared, and when they count as alike."""

    alpha: Annotated[float, Range(above=0, below=1)] = 0.05
    """Curves are alike if at most this share of each null correlates as well. The nulls are the curve with its layers
    shuffled, with random phases, and on bent depth. Curves with too few points for any order to be that rare are not
    judged."""
    shuffles: Count = 9999
    """Number of layer orders to try; all of them if there are no more. Each smooth null gets as many curves, at most
    1999."""
    seed: Seed = 0
    """Seed of the curves of the nulls, and of the draws of prompts."""
    grid: Annotated[int, Range(3, 10**4)] = 101
    """Points of the common grid of relative depth, from the first layer to the last."""

    level_tolerance: Annotated[float, Range(above=0, most=1)] = 0.1
    """Curves have the same level if their root mean square difference is at most this share of the other's root mean
    square. 10 % is what a figure shows at a glance."""
    kept_similarity: Annotated[float, Range(above=0, most=1)] = 0.9
    """A pass keeps the stages of the trained one if the curves of its layers correlate at least this well."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")
        if self.shuffles < 1 / self.alpha:
            raise ConfigError(
                f"--shuffles must be at least 1 / alpha = {1 / self.alpha:g}, or nothing could be that rare, got "
                f"{self.shuffles}."
            )
