"""What the lengths of the single steps say, whatever the way looks like."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["slowing_power", "steady_trend"]

_SHIFTS = 24
_STEADY = 8.0
"""Standard errors by which the slope of the logarithm of the steps must differ from 0, in each half of the tail by half
as much."""


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
