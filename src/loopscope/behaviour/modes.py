"""Approaches in several modes at once, as a linear map makes them: exponentials, flips and turns that shrink."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopscope.behaviour.fitting import SPARE, Fit
from loopscope.behaviour.narrowing import best_on_grid, narrow
from loopscope.behaviour.shapes import Family, explained_energy, shape_coefficients, shape_columns, together
from loopscope.behaviour.tail import Components

__all__ = ["SINGLE_MODES", "fit_modes"]

SINGLE_MODES = ("exponential", "alternating", "spiral")

_MOST = 3
_FAR = 3.0
"""What is left to go at the end of the tail, over the root mean square of the motion within it: 2 for one exponential
of a time constant within the tail, 5 for half of one. Exponentials that cancel fit any drift, its limit far away.
"""
_MOST_NUMBERS = 0.4
"""Columns and numbers per recurrence of the window."""
_ITERATIONS = 30
"""Numbers of modes that are alike are found slowly."""

_Kinds = tuple[str, ...]
_Groups = dict[_Kinds, tuple[Tensor, Tensor]]
"""By the kinds of their modes, the motions (row,) and their numbers (row, number)."""


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
def _full_turns(family: Family, window: int) -> Family:
    """Of rotations, only those that come round within the tail: with slower ones, modes make any smooth way."""
    if family.name != "spiral":
        return family
    slowest = 2 * math.pi / window
    grid = family.grid[family.grid[:, 0] >= slowest]
    return replace(family, grid=grid, low=torch.tensor([slowest, float(family.low[1])], dtype=torch.float64))


def _with_one_more(groups: _Groups, known: Mapping[str, Family], parts: Components) -> _Groups:
    longer: dict[_Kinds, list[tuple[Tensor, Tensor]]] = {}
    for kinds, (rows, numbers) in groups.items():
        scores = parts.scores[rows]
        basis = shape_columns(together(tuple(known[kind] for kind in kinds)), numbers, parts.times)
        rest = scores - basis @ (basis.mT @ scores)
        starts = {name: best_on_grid(family, parts.times, rest) for name, family in known.items()}
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
        found[kinds] = rows, narrow(family, parts.times, scores, numbers, _ITERATIONS)
    return found


def _as_fit(
    kinds: _Kinds,
    rows: Tensor,
    numbers: Tensor,
    known: Mapping[str, Family],
    parts: Components,
    least_rate: float,
) -> Fit:
    family = together(tuple(known[kind] for kind in kinds))
    ends = torch.tensor([known[kind].grid.shape[-1] for kind in kinds]).cumsum(0) - 1
    rates, scores, energy = numbers[:, ends], parts.scores[rows], parts.energy[rows]
    left = (energy - explained_energy(family, numbers, parts.times, scores)).clamp_min(0.0)
    coefficients = shape_coefficients(family, numbers, parts.times, scores)
    at_end = family.design(numbers, parts.times)[:, -1:]
    ahead = torch.linalg.vector_norm((at_end @ coefficients)[:, 0], dim=-1)
    shrinking: Bool[Tensor, " row"] = (rates <= -least_rate).all(-1)
    near = shrinking & (ahead <= _FAR * (energy / parts.window).sqrt())
    slowest = torch.cat((numbers, rates.amax(-1, keepdim=True)), dim=-1)
    return Fit(
        name="modes",
        family=family,
        left=parts.energy.index_copy(0, rows, torch.where(near, left, energy)),
        numbers=torch.zeros(len(parts.energy), slowest.shape[-1], dtype=numbers.dtype).index_copy(0, rows, slowest),
        columns=torch.full_like(parts.energy, float(family.columns)),
        tried=sum(len(known[kind].grid) for kind in kinds),
    )
