"""What a motion of a given shape tends to, and the numbers that describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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
    def hardly_shrinks(self) -> bool:
        """Whether it oscillates, and less than twice as much at the beginning of the tail as at its end."""
        return self.family in ("alternating", "spiral") and -math.log(2) < self.numbers[-1] < 0

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


def closed_periods(
    turns: Float[Tensor, "motion turn"], window: int, least_periods: float, slip: Float[Tensor, " motion"]
) -> Float[Tensor, " motion"]:
    """The period after which rotations by these turns (radians a recurrence) are all round again; NaN if there is none
    that the window holds `least_periods` times, or two turns are too close to tell apart.

    `slip` is the phase, in radians, by which a turn may miss a multiple of the common one over the whole window.
    """
    longest = window / least_periods
    common = turns[:, :1] / torch.arange(1, int(longest / 2) + 1)
    period = 2 * math.pi / common
    # How far a turn is from the nearest multiple of the common one, as recurrences show it: folded back at half a
    # round.
    turns, each = turns[:, None], common[..., None]
    nearest, beyond = (turns / each).round() * each, ((2 * math.pi - turns) / each).round() * each
    missed = torch.minimum((turns - nearest).abs(), (2 * math.pi - turns - beyond).abs()).amax(-1)
    closes = (missed * window <= slip[:, None]) & (period <= longest)
    least = torch.where(closes, period, math.inf).amin(-1)
    return torch.where(least.isfinite(), least, math.nan)


def separate(turns: Float[Tensor, "motion turn"], window: int) -> Bool[Tensor, " motion"]:
    """Whether the window can tell the turns apart: nearer ones are one rotation whose size changes."""
    return (turns.sort(-1).values.diff(dim=-1) >= 2 * math.pi / window).all(-1)


def limits_of(
    family: str, numbers: Float[Tensor, "motion number"], window: int, settings: DisplacementSettings
) -> Int[Tensor, " motion"]:
    """What motions of exactly these shapes tend to, as places in `KINDS`."""
    first, last, grows = numbers[:, 0], numbers[:, -1], math.log(settings.growth)
    point, orbit, slider, away = (kind.code for kind in (Kind.FIXED_POINT, Kind.ORBIT, Kind.SLIDER, Kind.DIVERGING))
    if family == "power":
        # By how much the steps lengthen while time doubles.
        on = torch.where(2 ** (first - 1) >= settings.growth, away, slider)
        return torch.where(first <= settings.summable, point, on)
    if family == "exponential":
        return torch.where(first >= grows, away, torch.where(first > -grows, slider, point))
    if family in ("alternating", "spiral"):
        period = 2 * math.pi / first if family == "spiral" else torch.full_like(first, 2.0)
        # Half a turn at one size leads back, but a few may be chance.
        on = torch.where(window >= settings.least_periods * period, orbit, Kind.UNKNOWN.code)
        return torch.where(last < -math.log(settings.settling), point, torch.where(last >= grows, away, on))
    if family == "arc":
        return torch.where(first * window > math.pi, Kind.UNKNOWN.code, slider)
    if family == "modes":
        kind = point
    elif family in ("logarithm", "logarithmic arc", "drift after transient"):
        kind = slider
    else:
        kind = Kind.BOUNDED.code if family.endswith("rotations") else orbit
    return torch.full((len(numbers),), kind)
