"""The two expensive searches for a shape, of motions that nothing simple explains: closed curves of any form, and
approaches in several modes at once, as a linear map makes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.dynamics.trajectories.fitting import Fit
from loopscope.dynamics.trajectories.narrowing import SPARE, best_on_grid, narrow
from loopscope.dynamics.trajectories.shapes import (
    ShapeFamily,
    explained_energy,
    many_harmonics,
    shape_coefficients,
    shape_columns,
    together,
    without_trends,
)
from loopscope.dynamics.trajectories.tail import Components

_CHUNK_ENTRIES = 2**21
"""Of distances that are gathered at a time: 16 MiB."""
_HARMONICS = (6, 9, 13, 18, 25, 32, 38)
"""Of closed curves of any form; a relaxation oscillation of period 20 takes about 25."""
_MOST_COLUMNS = 0.6
"""Of the recurrences of the window. What they leave of other motion is far more than what counts as explained."""
_SCATTERED = 0.25
"""Mean squared distance of neighbours in phase, over twice the variance, from which on there is no curve."""
_PHASE = 0.03
"""By how much of a period neighbours on the grid differ over the whole window."""
_STEPS = 6
"""Slow motion has its neighbours in phase this many recurrences on, at most, if it almost repeats; that is no
orbit."""
_GAP, _JUMP = 3, 2.0
"""A harmonic has at most this many times the energy of the strongest of this many before it: a curve may have odd
harmonics alone. Those of relaxation oscillations have 0.1 to 1 times; of two rotations that nearly close, one has
thousands."""
SINGLE_MODES = ("exponential", "alternating", "spiral")
_MOST = 3
_FAR = 3.0
"""What is left to go at the end of the tail, over the root mean square of the motion within it: 2 for one exponential
of a time constant within the tail, 5 for half of one. Exponentials that cancel fit any drift, its limit far away.
"""
_CANCELS = 10.0
"""Root mean square of a column of several modes over that of the motion, at most: columns that are nearly the same, and
cancel, make any smooth way.
"""
_MOST_NUMBERS = 0.4
"""Columns and numbers per recurrence of the window."""
_ITERATIONS = 30
"""Numbers of modes that are alike are found slowly."""
_Kinds = tuple[str, ...]
_Groups = dict[_Kinds, tuple[Tensor, Tensor]]
"""By the kinds of their modes, the motions (row,) and their numbers (row, number)."""


def fit_curves(parts: Components, rows: Int[Tensor, " row"], least_periods: float, enough: float) -> list[Fit]:
    """Closed curves of as many harmonics as they need, about the period at which states of like phase are nearest.

    The search is expensive: only some motions, those that no shape explains, are worth it, and each until at most the
    share `enough` is left. Of the others, and of what is no smooth curve, everything is left.
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
        # Enough harmonics follow anything: what is no smooth curve counts as not explained at all.
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
    # All distances once; every turn on the grid then only says which of them to add up.
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
    # In the order of the phase, each with the next and the last with the first: the way is closed.
    order = (turns[:, None] / (2 * math.pi) * torch.arange(window)).remainder(1.0).argsort(-1)
    return turns, (order * window + order.roll(-1, -1)).flatten()


def gradual(coefficients: Float[Tensor, "motion column component"]) -> Bool[Tensor, " motion"]:
    """Whether the harmonics of closed curves, a cosine and a sine each, fade as those of a smooth curve do.

    Two or more rotations nearly repeat after some period as well; of its harmonics only some are there.
    """
    energy = coefficients.square().sum(-1).unflatten(1, (-1, 2)).sum(-1)
    before = torch.nn.functional.pad(energy, (_GAP, 0)).unfold(1, _GAP, 1)[:, :-1].amax(-1)
    leads: Tensor = energy[:, :_GAP].amax(-1) >= energy[:, _GAP:].amax(-1)
    fade: Tensor = (energy[:, _GAP:] <= _JUMP * before[:, _GAP:]).all(-1)
    return leads.logical_and(fade)


def fit_modes(parts: Components, rows: Int[Tensor, " row"], fits: Sequence[Fit], least_rate: float) -> list[Fit]:
    """Two and three modes for some motions: the best one, then the best in what that leaves, then all together.

    `fits` are those of other shapes, and of one mode, the last number of which is its rate in e-folds per window. Each
    mode has to shrink by `least_rate` at least. The numbers of what is found end with the slowest rate. Of
    other motions, and of those that do not come near a point, everything is left.
    """
    singles = {fit.name: fit for fit in fits if fit.name in SINGLE_MODES}
    known = {name: _full_turns(fit.family, parts.window) for name, fit in singles.items() if fit.family is not None}
    names = list(known)
    first = torch.stack([singles[name].left[rows] for name in names]).argmin(0)
    groups: _Groups = {}
    for place, name in enumerate(names):
        some = rows[first == place]
        if len(some):
            # Its own fit may turn more slowly than modes are allowed to.
            groups[(name,)] = some, singles[name].numbers[some].clamp(known[name].low, known[name].high)
    found = []
    for _ in range(1, _MOST):
        groups = _with_one_more(groups, known, parts)
        for kinds, (some, numbers) in groups.items():
            fit = _as_fit(kinds, some, numbers, known, parts, least_rate)
            if fit.columns[0] + numbers.shape[-1] <= _MOST_NUMBERS * parts.window:
                found.append(fit)
    return found


@lru_cache(maxsize=64)
def _full_turns(family: ShapeFamily, window: int) -> ShapeFamily:
    """Of rotations, only those that complete a turn within the tail: with slower ones, modes make any smooth way."""
    if family.name != "spiral":
        return family
    slowest = 2 * math.pi / window
    grid = family.grid[family.grid[:, 0] >= slowest]
    return replace(family, grid=grid, low=torch.tensor([slowest, float(family.low[1])], dtype=torch.float64))


def _with_one_more(groups: _Groups, known: Mapping[str, ShapeFamily], parts: Components) -> _Groups:
    longer: dict[_Kinds, list[tuple[Tensor, Tensor]]] = {}
    for kinds, (rows, numbers) in groups.items():
        scores = parts.scores[rows]
        # The next mode is looked for in what the others leave: a grid of all of them together would have too many
        # points.
        basis = shape_columns(together(tuple(known[kind] for kind in kinds)), numbers, parts.times)
        rest = scores - basis @ (basis.mT @ scores)
        starts = {name: best_on_grid(family, parts.times, rest)[0] for name, family in known.items()}
        values = [explained_energy(known[name], start, parts.times, rest) for name, start in starts.items()]
        best = torch.stack(values).argmax(0)
        for place, (name, start) in enumerate(starts.items()):
            some = best == place
            if bool(some.any()):
                added = (rows[some], torch.cat((numbers[some], start[some]), dim=-1))
                longer.setdefault((*kinds, name), []).append(added)
    found: _Groups = {}
    for kinds, pieces in longer.items():
        family = together(tuple(known[kind] for kind in kinds))
        rows, numbers = (torch.cat([piece[place] for piece in pieces]) for place in (0, 1))
        scores = parts.scores[rows][..., -family.columns - SPARE :]
        # Then all together, since what the first explained alone was partly the new one's.
        found[kinds] = rows, narrow(family, parts.times, scores, numbers, _ITERATIONS)
    return found


def _as_fit(
    kinds: _Kinds,
    rows: Tensor,
    numbers: Tensor,
    known: Mapping[str, ShapeFamily],
    parts: Components,
    least_rate: float,
) -> Fit:
    family = together(tuple(known[kind] for kind in kinds))
    ends = torch.tensor([known[kind].grid.shape[-1] for kind in kinds]).cumsum(0) - 1
    rates, scores, energy = numbers[:, ends], parts.scores[rows], parts.energy[rows]
    left = (energy - explained_energy(family, numbers, parts.times, scores)).clamp_min(0.0)
    coefficients = shape_coefficients(family, numbers, parts.times, scores)
    # Columns that shrink tend to 0, so their sum at the end of the tail is what is still to go.
    columns, size = family.design(numbers, parts.times)[0], (energy / parts.window).sqrt()
    ahead = torch.linalg.vector_norm((columns[:, -1:] @ coefficients)[:, 0], dim=-1)
    each = columns.square().mean(-2).sqrt() * torch.linalg.vector_norm(coefficients, dim=-1)
    shrinking: Bool[Tensor, " row"] = (rates <= -least_rate).all(-1)
    near = shrinking & (ahead <= _FAR * size) & (each.amax(-1) <= _CANCELS * size)
    slowest = torch.cat((numbers, rates.amax(-1, keepdim=True)), dim=-1)
    return Fit(
        name="modes",
        family=family,
        left=parts.energy.index_copy(0, rows, torch.where(near, left, energy)),
        numbers=torch.zeros(len(parts.energy), slowest.shape[-1], dtype=numbers.dtype).index_copy(0, rows, slowest),
        columns=torch.full_like(parts.energy, float(family.columns)),
        tried=sum(len(known[kind].grid) for kind in kinds),
    )
