"""What is measured of motions within a tail, before anything is decided."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.dynamics.trajectories.noise import Noise, innovation_step
from loopscope.dynamics.trajectories.selection import BestShapes, best_shapes
from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.tail import Tails, decompose

_PLAIN, _PLAIN_LATE = 30.0, 3.0
"""Steps that shrink by these factors, within the tail and, unless they have come to rest, within its later half, are
those of an approach."""
_SHIFTS = 24
"""Of time, tried for steps like a power of it."""
_STEADY = 8.0
"""Standard errors by which the slope of the logarithm of the steps must differ from 0, in each half of the tail by half
as much."""
_SLOWING_MISFIT = 0.05
"""Root mean square of the logarithm of the steps about a power law: 5 % of a step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Motions:
    """Of some tokens, (token,) each but for `displacement`. Lengths are relative to the state's norm, steps root mean
    squares."""

    window: int
    noise: Noise
    """What it makes of each."""
    best: BestShapes
    innovation: Tensor
    """Step of what a linear map of the leading components does not foresee, one recurrence ahead; NaN where there is
    nothing to fit one to."""
    level: Tensor
    """Root mean square displacement at the lag where it is largest."""
    later_level: Tensor
    """The same within the later half of the tail."""
    left: Tensor
    """Step that what the best shape leaves would make, were it noise."""
    unexplained: Tensor
    """Share of the variance that it leaves."""
    amplitude: Tensor
    """Root mean square distance to the centre of what it explains."""
    filling: Tensor
    """Directions that the motion takes, over those of white noise."""
    filling_left: Tensor
    """The same of what the shape leaves."""
    spreading: Tensor
    """Mean squared displacement at lags about W/2 over that at lags about W/16."""
    shrinking: Tensor
    """Step in the first third of the tail over that in the last third."""
    shrinking_late: Tensor
    """The same within the later half."""
    late_step: Tensor
    """Step in the last sixth of the tail."""
    norm_growth: Tensor
    """Norm of the last state over that at half the time since the loop began."""
    slowing: Tensor
    """The power a of steps that shrink like (t + s)^-a; NaN where noise hides it or they do not follow one."""
    trend: Tensor
    """Factor by which the steps change over the tail, if they do so steadily; 1 otherwise."""
    ballistic: Tensor
    """Exponent of the mean squared displacement between lags W/4 and W/2: 2 for a drift, 1 for a random walk."""
    displacement: Float[Tensor, "token lag"]
    """Root mean square, by lag."""

    @property
    def fitted(self) -> Bool[Tensor, " token"]:
        """Whether a shape was looked for."""
        return torch.tensor([shape is not None for shape in self.best.shape], dtype=torch.bool)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The numbers of each token as Python's own, those of its shape and its noise among them."""
        noise = {"floor": self.noise.floor, "unit": self.noise.unit, "measured": self.noise.measured}
        own = {name: getattr(self, name) for name in _NUMBERS}
        best = {field.name: getattr(self.best, field.name) for field in fields(self.best) if field.name != "shape"}
        columns = {name: column.tolist() for name, column in {**best, **noise, **own}.items()}
        for shape, *values in zip(self.best.shape, *columns.values(), strict=True):
            numbers = dict(zip(columns, values, strict=True))
            yield {**numbers, "shape": shape, "window": self.window, "rounding": self.noise.rounding}


_NUMBERS = tuple(field.name for field in fields(Motions) if field.name not in ("window", "noise", "best"))


def measure_motions(
    tails: Tails,
    noise: Noise,
    settings: DisplacementSettings,
    *,
    kinds_only: bool = False,
    ends: Bool[Tensor, " token"] | None = None,
) -> Motions:
    """Shapes are fitted where a token moves by more than noise; for `kinds_only`, not where its steps shrink so fast
    that it plainly approaches a point, on whatever way. `ends` as in `best_shapes`."""
    displacement = tails.displacement()
    level = displacement.amax(-1).sqrt()
    steps = _step_numbers(tails)
    rest = noise.rest(settings)
    moves = level > rest
    if kinds_only:
        still = (steps["shrinking_late"] >= _PLAIN_LATE) | (steps["late_step"] <= rest)
        moves &= ~((steps["shrinking"] >= _PLAIN) & still)
    moving = moves.nonzero()[:, 0]
    squares = tails.products.diagonal(dim1=-2, dim2=-1).sum(-1)
    energy = (squares - tails.products.mean(-1).sum(-1)).clamp_min(0.0)
    best, innovation = BestShapes.unfitted(None, energy, 0, torch.zeros_like(level)), torch.full_like(level, math.nan)
    if len(moving):
        parts = decompose(tails.last(tails.window, moving))
        innovation[moving] = innovation_step(parts)
        its_ends = None if ends is None else ends[moving]
        best = best.put(moving, best_shapes(parts, displacement[moving], noise.take(moving), settings, its_ends))
    return Motions(
        window=tails.window,
        noise=noise,
        best=best,
        innovation=innovation,
        level=level,
        later_level=tails.displacement(tails.window - tails.window // 2).amax(-1).sqrt(),
        left=(2 * best.left / (tails.window - 1 - best.columns).clamp_min(1.0)).sqrt(),
        unexplained=torch.where(energy > 0, best.left / energy, 1.0),
        amplitude=((energy - best.left).clamp_min(0.0) / tails.window).sqrt(),
        filling=best.directions / tails.white_directions,
        filling_left=best.directions_left / tails.white_directions,
        spreading=_spreading(displacement, tails.window),
        norm_growth=tails.norm_growth,
        ballistic=_ballistic(displacement, tails.window),
        displacement=displacement.sqrt(),
        **steps,
    )


def slowing_power(
    steps: Float[Tensor, "token step"], times: Float[Tensor, " time"]
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """The power a of `|step| = c (t + s)^-a`, fitted to the logarithms, and the root mean square misfit.

    Steps with a <= 1 add up to no limit. Those of an approach at any constant rate are fitted by large s and large a.
    """
    logs = steps.clamp_min(1e-300).log()
    logs = logs - logs.mean(-1, keepdim=True)
    since = times[1:] - times[0]
    first = float(times[0])
    shifts = torch.logspace(math.log10(max(0.5, 0.02 * first)), math.log10(first + 20.0 * len(times)), _SHIFTS)
    base = (since[None] + shifts.double()[:, None]).log()
    base = base - base.mean(-1, keepdim=True)
    square = base.square().sum(-1)
    slope = logs @ base.mT / square
    rest = (logs.square().sum(-1, keepdim=True) - slope.square() * square).clamp_min(0.0)
    best = rest.argmin(-1, keepdim=True)
    misfit = (rest.gather(-1, best)[:, 0] / logs.shape[-1]).sqrt()
    return -slope.gather(-1, best)[:, 0], misfit


def steady_trend(steps: Float[Tensor, "token step"]) -> Float[Tensor, " token"]:
    """Factor by which steps change over the window if they do so steadily, else 1.

    Steadily: the slope of their logarithm is far from 0 for what the scatter allows, its correlation from step to step
    counted, and both halves show it.
    """
    logs = steps.clamp_min(1e-300).log()
    half = logs.shape[-1] // 2
    slope, error = _slope(logs)
    early, late = _slope(logs[:, :half]), _slope(logs[:, half:])
    steady = slope.abs() >= _STEADY * error
    for part, uncertain in (early, late):
        steady &= (part.sign() == slope.sign()) & (part.abs() >= _STEADY / 2 * uncertain)
        steady &= part.abs() >= slope.abs() / 3
    return torch.where(steady, (slope * logs.shape[-1]).exp(), 1.0)


def _slope(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Slope on time, and its standard error with the residuals' correlation taken into account."""
    count = logs.shape[-1]
    time = torch.arange(count, dtype=logs.dtype)
    time = time - time.mean()
    slope = logs @ time / (time @ time)
    rest = logs - logs.mean(-1, keepdim=True) - slope[:, None] * time
    variance = rest.square().sum(-1) / max(1, count - 2)
    neighbours = (rest[:, 1:] * rest[:, :-1]).sum(-1) / rest.square().sum(-1).clamp_min(1e-300)
    correlation = neighbours.clamp(0.0, 0.99)
    return slope, (variance / (time @ time) * (1 + correlation) / (1 - correlation)).sqrt()


def _step_numbers(tails: Tails) -> dict[str, Tensor]:
    """What the lengths of the steps say."""
    slowing, misfit = slowing_power(tails.steps, tails.times)
    square = tails.steps.square()
    third, sixth = max(1, (tails.window - 1) // 3), max(2, (tails.window - 1) // 6)
    early, late = _root_mean(square[:, :third]), _root_mean(square[:, -third:])
    middle, latest = _root_mean(square[:, -3 * sixth : -2 * sixth]), _root_mean(square[:, -sixth:])
    return {
        "shrinking": early / late.clamp_min(1e-300),
        "shrinking_late": middle / latest.clamp_min(1e-300),
        "late_step": latest,
        "slowing": torch.where(misfit <= _SLOWING_MISFIT, slowing, math.nan),
        "trend": steady_trend(tails.steps),
    }


def _root_mean(square: Tensor) -> Tensor:
    mean: Tensor = square.mean(-1)
    return mean.sqrt()


def _spreading(displacement: Tensor, window: int) -> Tensor:
    """Of means over lags, since periodic motion has deep minima."""
    short = displacement[:, : max(1, window // 8)].mean(-1)
    long = displacement[:, 3 * window // 8 : max(3 * window // 8 + 1, 5 * window // 8)].mean(-1)
    return long / short.clamp_min(1e-300)


def _ballistic(displacement: Tensor, window: int) -> Tensor:
    quarter, half = max(1, window // 4), max(2, window // 2)
    ratio = displacement[:, half - 1] / displacement[:, quarter - 1].clamp_min(1e-300)
    exponent = ratio.clamp_min(1e-300).log() / math.log(half / quarter)
    # What comes back within these lags goes nowhere, however what is left of it grows.
    return torch.where(displacement[:, half - 1] > displacement[:, 0], exponent, 0.0)
