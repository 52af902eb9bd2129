"""What a motion of a given shape tends to, and the numbers that describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.verdicts import Kind


@dataclass(frozen=True, slots=True)
class Shape:
    """One member of a family of shapes, fitted to a tail of `window` recurrences."""

    family: str
    numbers: tuple[float, ...]
    window: int

    @property
    def period(self) -> float:
        """Of periodic motion, in recurrences; NaN for other shapes. Of several rotations, the strongest one's."""
        if self.family in ("cycle", "approached cycle", "closed curve"):
            return self.numbers[0]
        if self.family == "alternating":
            return 2.0
        if self.family == "spiral" or self.family.startswith("orbit") or self.family.endswith("rotations"):
            return 2 * math.pi / self.numbers[0]
        return math.nan

    @property
    def rate(self) -> float:
        """Factor per recurrence by which the distance to the limit shrinks, or grows; NaN for shapes without one."""
        if self.family in ("exponential", "alternating", "spiral", "modes"):
            return math.exp(self.numbers[-1] / self.window)
        return math.nan

    @property
    def words(self) -> str:
        """The shape in words, for a sentence."""
        if self.family == "power":
            return "a logarithm of time" if abs(self.numbers[0]) < 0.1 else f"time to the power {self.numbers[0]:.2g}"
        if self.family == "exponential":
            return f"an exponential of {self.rate:.4g} a recurrence"
        if self.family == "alternating":
            return f"a flip of sign that changes by {self.rate:.4g} a recurrence"
        if self.family == "spiral":
            return f"a rotation of period {self.period:.4g} that changes by {self.rate:.4g} a recurrence"
        if self.family == "modes":
            return f"several modes, the slowest of which changes by {self.rate:.4g} a recurrence"
        if self.family in ("arc", "logarithmic arc"):
            return "an arc"
        if self.family == "logarithm":
            return "a logarithm of time"
        if self.family == "drift after transient":
            return "a straight drift after a transient"
        if self.family.endswith("rotations"):
            periods = ", ".join(f"{2 * math.pi / turn:.4g}" for turn in self.numbers)
            return f"rotations of periods {periods}"
        slowly = "slowly moving " if self.family == "approached cycle" else ""
        return f"a {slowly}closed curve of period {self.period:.4g}"


def closed_period(turns: tuple[float, ...], window: int, least_periods: float, slip: float) -> float | None:
    """The period after which rotations by these turns (radians a recurrence) are all round again; None if there is none
    that the window holds `least_periods` times, or two turns are too close to tell apart.

    `slip` is the phase, in radians, by which a turn may miss a multiple of the common one over the whole window.
    """
    longest = window / least_periods
    for harmonic in range(1, int(longest / 2) + 1):
        period = 2 * math.pi * harmonic / turns[0]
        if period > longest:
            return None
        common = turns[0] / harmonic
        if all(_missed_by(turn, common) * window <= slip for turn in turns):
            return period
    return None


def _missed_by(turn: float, common: float) -> float:
    """How far a turn is from the nearest multiple of the common one, as recurrences show it: folded back at half a
    round."""
    nearest = round(turn / common) * common
    beyond = round((2 * math.pi - turn) / common) * common
    return min(abs(turn - nearest), abs(2 * math.pi - turn - beyond))


def separate(turns: Float[Tensor, "motion turn"], window: int) -> Bool[Tensor, " motion"]:
    """Whether the window can tell the turns apart: nearer ones are one rotation whose size changes."""
    return (turns.sort(-1).values.diff(dim=-1) >= 2 * math.pi / window).all(-1)


def limit_of(shape: Shape, settings: DisplacementSettings) -> Kind:
    """What a motion of exactly this shape tends to."""
    family, numbers = shape.family, shape.numbers
    grows = math.log(settings.growth)
    if family == "power":
        if numbers[0] <= settings.summable:
            return Kind.FIXED_POINT
        # By how much the steps lengthen while time doubles.
        return Kind.DIVERGING if 2 ** (numbers[0] - 1) >= settings.growth else Kind.SLIDER
    if family == "exponential":
        if numbers[0] >= grows:
            return Kind.DIVERGING
        return Kind.SLIDER if numbers[0] > -grows else Kind.FIXED_POINT
    if family in ("alternating", "spiral"):
        if numbers[-1] < -math.log(settings.settling):
            return Kind.FIXED_POINT
        if numbers[-1] >= grows:
            return Kind.DIVERGING
        # Less than a few turns at one size are a way, not a cycle.
        return Kind.ORBIT if shape.window >= settings.least_periods * shape.period else Kind.SLIDER
    if family == "modes":
        return Kind.FIXED_POINT
    if family in ("arc", "logarithm", "logarithmic arc", "drift after transient"):
        return Kind.SLIDER
    return Kind.BOUNDED if family == "none" or family.endswith("rotations") else Kind.ORBIT
