"""What another run of the same tokens, which began a little or far away, tells of their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.dynamics.trajectories.noise import Noise, innovation_step
from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.trajectories.tail import decompose, tail_length, take_tails
from loopscope.models.inspection.facts import Dtype

PARTED = 0.1
"""Distance of the twins, over the norm, from which on a run's numbers are those of its rounding, and no longer of the
model alone."""
_STILL_GREW = 5.0
"""Factor of the second half of the time from which on growth that is exponential shows that the twins part."""
_GREW = 30.0
"""Factor by which the distance must have grown for the growth to be a rate, rather than noise that adds up."""
_NEAR = 30.0
"""Roundings: runs that begin no further apart differ by rounding. What becomes of their distance is the model's."""
_TOGETHER = 0.25
"""Share of the motion: runs of which no more than this is not common move together."""
_ALIKE = 0.5
"""Correlation from which on two motions may be one, at different times."""
_FEW = 64
"""Tokens that are compared at a time."""


def noise_of_twins(
    states: Float[Tensor, "token recurrence width"],
    twins: Sequence[Float[Tensor, "token recurrence width"]],
    dtype: Dtype,
    settings: DisplacementSettings,
    first_recurrence: int = 1,
) -> Noise:
    """What other runs of the same tokens say of the noise of each, of all the loudest; NaN where none says anything.

    Runs that begin within some roundings of each other tell as the twin of a study does: they part or they stay, at the
    distance that noise makes. Runs from other initial states end at different points, or at different phases of one
    orbit. They tell in two cases, by how much their difference fluctuates. Where most of the motion is common to both,
    and the difference is no other phase of it, what is not is noise. Where the two motions have nothing in common at
    any lag, and little enough of them is new in a recurrence to be rounding, all of it is noise. Runs that became the
    same to the bit share their rounding and say nothing.
    """
    found, rounding = [], rounding_step(dtype)
    window = tail_length(states.shape[1], settings.window, first_recurrence)
    for rows in torch.arange(len(states)).split(_FEW):
        new = innovation_step(decompose(take_tails(states[rows], window, first_recurrence)))
        small = new <= settings.may_be_new * rounding
        each = [_of_twin(states[rows], twin[rows], small, window, rounding, settings.gain) for twin in twins]
        floors = torch.stack([noise.floor for noise in each])
        loudest = floors.nan_to_num(-1.0).amax(0)
        parted = torch.stack([noise.parted for noise in each]).any(0)
        found.append(Noise(rounding, torch.where(loudest < 0, math.nan, loudest), parted))
    return Noise.together(found)


def floor_of(distance: Float[Tensor, "time ..."]) -> Float[Tensor, ...]:
    """Of the second half: before, what slow modes make of the nudges has not added up yet."""
    return distance[len(distance) // 2 :].double().square().mean(0).sqrt()


def have_parted(distance: Float[Tensor, "time ..."], floor: Float[Tensor, ...], rounding: float) -> Bool[Tensor, ...]:
    """Of runs that began to differ by rounding, whether their distance, late of the size of `floor`, grew beyond what
    noise adds up to, to where no amplified rounding reaches; or grows exponentially still."""
    growth, error = growth_of(distance.double())
    far = floor >= min(PARTED, DisplacementSettings().gain * rounding)
    parted = far & (growth >= 3 * error) & (growth * len(distance) >= math.log(_GREW))
    grown: Tensor = (distance[-1].double() >= _GREW * rounding) & grows_exponentially(distance.double())
    return parted | grown


def grows_exponentially(distance: Float[Tensor, "time ..."]) -> Bool[Tensor, ...]:
    """Whether a distance grows by at least `_STILL_GREW` in the second half of the time, and more in proportion to it
    than in the quarter before.

    Nudges that add up along a slow mode, or a chain of them, make the distance grow like a power of the time: by one
    factor in the last half and in the quarter before.
    """
    length = len(distance)
    few = max(1, length // 8)
    logs = distance.clamp_min(1e-300).log()
    quarter, half, end = (logs[place - few : place].mean(0) for place in (length // 4, length // 2, length))
    late: Tensor = end - half
    return (late >= math.log(_STILL_GREW)) & (late >= 1.5 * (half - quarter))


def growth_of(distance: Float[Tensor, "time ..."]) -> tuple[Tensor, Tensor]:
    """Slope of the logarithm of a distance over the recurrences that it grows in, and its standard error, (...).

    It grows until it is a tenth of what it is in the end. Where that is little more than it began with, nothing grows
    but what the nudges add up to, and the slope is that of the second half of the run, about 0. Errors of least squares
    for residuals with the correlation of a first-order autoregression.
    """
    logs = distance.clamp_min(1e-300).log()
    time = torch.arange(len(logs), dtype=logs.dtype, device=logs.device).reshape(-1, *[1] * (logs.dim() - 1))
    end = distance[-max(1, len(logs) // 4) :].square().mean(0).sqrt()
    until = (distance >= end / 10).int().argmax(0)
    grew = end >= 10 * _GREW * distance[0]
    taken = torch.where(grew, time < until.clamp_min(3), time >= len(logs) // 2)
    count = taken.sum(0).clamp_min(1)
    time = torch.where(taken, time - (time * taken).sum(0) / count, 0.0)
    logs = torch.where(taken, logs - torch.where(taken, logs, 0.0).sum(0) / count, 0.0)
    square = time.square().sum(0).clamp_min(1e-300)
    slope = (time * logs).sum(0) / square
    rest = logs - slope * time
    energy = rest.square().sum(0)
    correlation = ((rest[1:] * rest[:-1]).sum(0) / energy.clamp_min(1e-300)).clamp(0.0, 0.99)
    variance = energy / (count - 2).clamp_min(1) / square * (1 + correlation) / (1 - correlation)
    return slope, variance.sqrt()


def _of_twin(states: Tensor, twin: Tensor, may_be_noise: Tensor, window: int, rounding: float, gain: float) -> Noise:
    # A run that is no longer finite says nothing: it is taken for the same run.
    finite = twin.isfinite().all(-1).all(-1)[:, None, None]
    one, other = states.double(), torch.where(finite, twin, states).double()
    norm = torch.linalg.vector_norm(one, dim=-1).clamp_min(1e-300)
    distance = (torch.linalg.vector_norm(one - other, dim=-1) / norm).T
    near = distance[0] <= _NEAR * rounding
    scale = norm[:, -window:].median(-1).values[:, None, None]
    moves, moves_too, difference = (_about_mean(each[:, -window:]) / scale for each in (one, other, one - other))
    apart = _size(difference)
    together = (apart <= _TOGETHER * _size(moves)) & _unlike(difference, moves)
    unlike = _unlike(moves_too, moves) & may_be_noise & (apart <= min(PARTED, gain * rounding))
    late = floor_of(distance)
    floor = torch.where(near, late, apart)
    told = (near | together | unlike) & (floor >= rounding)
    return Noise(rounding, torch.where(told, floor, math.nan), near & have_parted(distance, late, rounding))


def _unlike(one: Tensor, other: Tensor) -> Tensor:
    """Whether two motions have little in common at every lag: two phases of one orbit are alike at some, and so are two
    places on one drift, or what a drift and a later one differ by."""
    sizes = (_size(one) * _size(other)).clamp_min(1e-300)
    products, half = one @ other.mT / sizes[:, None, None], one.shape[1] // 2
    common = torch.stack([products.diagonal(lag, dim1=1, dim2=2).mean(-1) for lag in range(-half, half + 1)])
    return common.abs().amax(0) <= _ALIKE


def _about_mean(states: Tensor) -> Tensor:
    return states - states.mean(1, keepdim=True)


def _size(moves: Tensor) -> Tensor:
    """Root mean square over time, (token,)."""
    return moves.square().sum(-1).mean(-1).sqrt()
