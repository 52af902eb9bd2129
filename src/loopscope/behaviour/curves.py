"""Closed curves of any form: the period at which the states, put in the order of their phase, make the shortest way."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.behaviour.fitting import SPARE, Fit
from loopscope.behaviour.narrowing import narrow
from loopscope.behaviour.shapes import explained_energy, many_harmonics, shape_coefficients, without_trends
from loopscope.behaviour.tail import Components

__all__ = ["fit_curves", "gradual", "shortest_turns"]

_HARMONICS = (6, 9, 13, 18, 25, 32, 38)
"""Of closed curves of any form; a relaxation oscillation of period 20 takes about 25."""
_MOST_COLUMNS = 0.6
"""Of the recurrences of the window. What they leave of other motion is far more than what counts as explained."""
_SCATTERED = 0.25
"""Mean squared distance of neighbours in phase, over twice the variance, from which on there is no curve."""
_PHASE = 0.03
"""By how much of a period neighbours on the grid differ over the whole window."""
_CHUNK_ENTRIES = 2**21
"""Of distances that are gathered at a time: 16 MiB."""
_STEPS = 6
"""Slow motion has its neighbours in phase so many recurrences on, at most, if they come round almost; that is no
orbit."""
_GAP, _JUMP = 3, 2.0
"""A harmonic has at most so many times the energy of the strongest of so many before it: a curve may have odd harmonics
alone. Those of relaxation oscillations have 0.1 to 1 times; of two rotations that nearly close, one has thousands."""


def fit_curves(parts: Components, rows: Int[Tensor, " row"], least_periods: float, enough: float) -> list[Fit]:
    """Closed curves of as many harmonics as they need, about the period at which states of like phase are nearest.

    The search is dear: only some motions, those that no shape explains, are worth it, and each until so large a share
    as `enough` is left at most. Of the others, and of what is no smooth curve, everything is left.
    """
    counts = [count for count in _HARMONICS if 2 * count + 1 <= _MOST_COLUMNS * parts.window]
    if not counts:
        return []
    turns, distance = shortest_turns(parts.gram[rows], least_periods)
    rows, turns = rows[distance <= _SCATTERED], turns[distance <= _SCATTERED, None]
    found = []
    for count in counts:
        if not len(rows):
            break
        family = many_harmonics(count, parts.window, least_periods)
        scores, energy = parts.scores[rows], parts.energy[rows]
        numbers = narrow(family, parts.times, scores[..., -family.columns - SPARE :], turns)
        left = (energy - explained_energy(family, numbers, parts.times, scores)).clamp_min(0.0)
        left = torch.where(gradual(shape_coefficients(family, numbers, parts.times, scores)), left, energy)
        found.append(
            Fit(
                name=family.name,
                family=family,
                left=parts.energy.index_copy(0, rows, left),
                numbers=torch.ones_like(parts.energy)[:, None].index_copy(0, rows, numbers),
                columns=torch.full_like(parts.energy, float(family.columns)),
                tried=parts.window,
            )
        )
        rows, turns = rows[left > enough * energy], turns[left > enough * energy]
    return found


def shortest_turns(
    gram: Float[Tensor, "motion time time"], least_periods: float
) -> tuple[Float[Tensor, " motion"], Float[Tensor, " motion"]]:
    """Radians a recurrence of the closed curve on which neighbours in phase are nearest, and how far they are.

    The second is the mean squared distance of neighbours over twice the variance: near 0 on a smooth curve, about 1
    where the phase says nothing. The search is Lafler's and Kinman's (1965), for vectors.
    """
    window = gram.shape[-1]
    turns, pairs = _phase_neighbours(window, least_periods)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    distances = (squares[:, :, None] + squares[:, None, :] - 2 * gram).flatten(1)
    best, place = [], []
    for some in distances.split(max(1, _CHUNK_ENTRIES // len(pairs))):
        way = some[:, pairs].view(len(some), len(turns), window).sum(-1)
        least = way.min(-1)
        best.append(least.values)
        place.append(least.indices)
    return turns[torch.cat(place)], torch.cat(best) / (2 * squares.sum(-1)).clamp_min(1e-300)


@lru_cache(maxsize=8)
def _phase_neighbours(window: int, least_periods: float) -> tuple[Tensor, Tensor]:
    """Turns of a grid, and the places in a matrix of distances of the pairs that follow each other in phase."""
    slowest = 2 * math.pi * least_periods / window
    turns = torch.arange(slowest, math.pi, 2 * math.pi * _PHASE / window, dtype=torch.float64)
    turns = turns[without_trends(turns, _STEPS, slowest)]
    order = (turns[:, None] / (2 * math.pi) * torch.arange(window)).remainder(1.0).argsort(-1)
    return turns, (order * window + order.roll(-1, -1)).flatten()


def gradual(coefficients: Float[Tensor, "motion column component"]) -> Bool[Tensor, " motion"]:
    """Whether the harmonics of closed curves, a cosine and a sine each, fade as those of a smooth curve do.

    Two or more rotations nearly come round after some period as well; of its harmonics only some are there.
    """
    energy = coefficients.square().sum(-1).unflatten(1, (-1, 2)).sum(-1)
    before = torch.nn.functional.pad(energy, (_GAP, 0)).unfold(1, _GAP, 1)[:, :-1].amax(-1)
    leads: Tensor = energy[:, :_GAP].amax(-1) >= energy[:, _GAP:].amax(-1)
    fade: Tensor = (energy[:, _GAP:] <= _JUMP * before[:, _GAP:]).all(-1)
    return leads.logical_and(fade)
