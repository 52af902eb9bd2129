"""Which shape explains a motion best."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from loopscope.behaviour.shapes import Family, explained_energy, families, many_harmonics, rotations, shape_columns
from loopscope.behaviour.tail import Components

__all__ = ["Fit", "Residual", "fit_shapes", "residual", "significance"]

_CHUNK_ENTRIES = 2**24
"""Of projections at a time: 128 MiB."""
_NARROWINGS = 26
"""Steps of the search, each narrower by 0.4 unless it moved: the last are 1e-10 of the grid's."""
_PROMISING = 0.5
"""Motions of which a grid point explains this share have their fits narrowed. What explains less can gain little, and
decides nothing."""
_NEARLY = 0.8
"""Of which few harmonics explain less than about this share is no closed curve."""
_LONGEST_CYCLE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """The best member of one family for each motion."""

    name: str
    family: Family | None
    """None for a cycle, whose number is its period."""
    left: Float[Tensor, " token"]
    """Sum of squares that it leaves."""
    numbers: Float[Tensor, "token number"]
    columns: Float[Tensor, " token"]
    """Coefficients per component, beside the constant and the numbers."""
    tried: int
    """Members of the family that were compared, for the correction of the significance."""


def fit_shapes(parts: Components, least_periods: float) -> list[Fit]:
    """The best fit of every family."""
    known = families(parts.window, least_periods)
    found = [_fit_family(family, parts) for family in known]
    single = next((place for place, family in enumerate(known) if family.name == "orbit 1"), None)
    if single is not None:
        found += _fit_rotations(known[single], found[single], parts, least_periods)
        found += _fit_many_harmonics(found, parts, least_periods)
    cycles = _fit_cycles(parts, least_periods)
    return found if cycles is None else [*found, cycles]


def _fit_rotations(single: Family, first: Fit, parts: Components, least_periods: float) -> list[Fit]:
    """Two and three rotations of unrelated periods: the strongest one, then the strongest in what that leaves."""
    found, numbers, tried = [], first.numbers, first.tried
    fewer, family = single, single
    for count in (2, 3):
        if 2 * count + 1 > 0.4 * parts.window:
            break
        basis = shape_columns(fewer if count > 2 else single, numbers, parts.times)
        rest = dataclasses.replace(parts, scores=parts.scores - basis @ (basis.mT @ parts.scores))
        second, _ = _best_on_grid(single, rest)
        numbers, tried = torch.cat((numbers, second), dim=-1), tried * first.tried
        family = rotations(count, parts.window, least_periods)
        value = explained_energy(family, numbers, parts.times, parts.scores)
        promising = (value >= _PROMISING * parts.energy).nonzero()[:, 0]
        if len(promising):
            narrowed, better = _narrow(family, parts, promising, numbers[promising], value[promising])
            numbers = numbers.index_copy(0, promising, narrowed)
            value = value.index_copy(0, promising, better)
        columns = torch.full_like(value, float(family.columns))
        found.append(Fit(family.name, family, (parts.energy - value).clamp_min(0.0), numbers, columns, tried))
        fewer = family
    return found


def _fit_many_harmonics(fits: list[Fit], parts: Components, least_periods: float) -> list[Fit]:
    few = [fit for fit in fits if fit.name in ("orbit 2", "orbit 3", "orbit 4")]
    counts = [count for count in (6, 9) if 2 * count + 1 <= 0.4 * parts.window]
    if not few or not counts:
        return []
    best = torch.stack([fit.left for fit in few]).argmin(0)
    turns = torch.stack([fit.numbers for fit in few])[best, torch.arange(len(best))]
    found = []
    for count in counts:
        family = many_harmonics(count, parts.window, least_periods)
        numbers, value = turns.clone(), explained_energy(family, turns, parts.times, parts.scores)
        promising = (value >= _NEARLY * parts.energy).nonzero()[:, 0]
        if len(promising):
            narrowed, better = _narrow(family, parts, promising, numbers[promising], value[promising])
            numbers[promising], value[promising] = narrowed, better
        columns = torch.full_like(value, float(family.columns))
        tried = sum(fit.tried for fit in few)
        found.append(Fit(family.name, family, (parts.energy - value).clamp_min(0.0), numbers, columns, tried))
    return found


@dataclass(frozen=True, slots=True)
class Residual:
    """What a fit leaves of one motion."""

    directions: float
    """How many it takes: participation ratio of its principal components."""
    independent: float
    """Share of the recurrences that count as independent, from the correlation of neighbouring ones. What rounding
    makes of a slow motion is the same for many recurrences on end."""


def residual(fit: Fit, row: int, parts: Components) -> Residual:
    basis = _fitted_basis(fit, row, parts)
    scores = parts.scores[row]
    rest = scores - basis @ (basis.mT @ scores)
    inner = rest.mT @ rest
    energy = float(inner.trace() + parts.rest_energy[row])
    square = float(inner.square().sum() + parts.rest_square[row])
    gram = parts.gram[row]
    half = gram - basis @ (basis.mT @ gram)
    whole = half - (half @ basis) @ basis.mT
    neighbours = float(whole.diagonal(1).sum()) / max(float(whole.trace()), 1e-300)
    correlation = min(max(neighbours, 0.0), 0.999)
    return Residual(energy**2 / max(square, 1e-300), (1 - correlation) / (1 + correlation))


def _fitted_basis(fit: Fit, row: int, parts: Components) -> Tensor:
    if fit.family is not None:
        return shape_columns(fit.family, fit.numbers[row], parts.times)
    phase = _phases(parts.times, int(fit.numbers[row, 0]))
    basis: Tensor
    basis, _ = torch.linalg.qr(phase - phase.mean(0))
    return basis[:, :-1]


def _fit_family(family: Family, parts: Components) -> Fit:
    numbers, value = _best_on_grid(family, parts)
    promising = (value >= _PROMISING * parts.energy).nonzero()[:, 0]
    if len(promising):
        narrowed, better = _narrow(family, parts, promising, numbers[promising], value[promising])
        numbers[promising], value[promising] = narrowed, better
    columns = torch.full_like(value, float(family.columns))
    return Fit(family.name, family, (parts.energy - value).clamp_min(0.0), numbers, columns, len(family.grid))


@lru_cache(maxsize=256)
def _grid_basis(family: Family, first: float, window: int) -> Tensor:
    """Every column of every member on the grid, (member and column, time): the same for all tokens of a tail."""
    times = torch.arange(first, first + window, dtype=torch.float64)
    basis = shape_columns(family, family.grid, times)
    return basis.permute(0, 2, 1).reshape(-1, window)


def _best_on_grid(family: Family, parts: Components) -> tuple[Tensor, Tensor]:
    flat = _grid_basis(family, float(parts.times[0]), parts.window)
    candidates, columns = len(family.grid), family.columns
    components = parts.scores.shape[-1]
    size = max(1, _CHUNK_ENTRIES // (candidates * columns * components))
    numbers, values = [], []
    for scores in parts.scores.split(size):
        energy = (flat @ scores).square().sum(-1).reshape(len(scores), candidates, columns).sum(-1)
        best = energy.argmax(-1)
        numbers.append(family.grid[best])
        values.append(energy.gather(-1, best[:, None])[:, 0])
    return torch.cat(numbers), torch.cat(values)


def _narrow(family: Family, parts: Components, rows: Tensor, numbers: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A pattern search around each motion's best grid point."""
    scores = parts.scores[rows]
    step = family.step.expand_as(numbers).clone()
    for _ in range(_NARROWINGS):
        moved = torch.zeros(len(rows), dtype=torch.bool)
        for axis in range(numbers.shape[-1]):
            for sign in (-1.0, 1.0):
                tried = numbers.clone()
                tried[:, axis] = (tried[:, axis] + sign * step[:, axis]).clamp(family.low[axis], family.high[axis])
                energy = explained_energy(family, tried, parts.times, scores)
                better = energy > value
                numbers = torch.where(better[:, None], tried, numbers)
                value = torch.where(better, energy, value)
                moved |= better
        step = torch.where(moved[:, None], step, step * 0.4)
    return numbers, value


def _fit_cycles(parts: Components, least_periods: float) -> Fit | None:
    """A cycle through arbitrary points, of a whole period: the means of the states of equal phase."""
    longest = min(_LONGEST_CYCLE, int(parts.window / least_periods))
    best = torch.full_like(parts.energy, math.inf)
    left, period = parts.energy.clone(), torch.zeros_like(parts.energy)
    for candidate in range(2, longest + 1):
        phase = _phases(parts.times, candidate)
        share = phase / phase.sum(0)
        explained = torch.einsum("nij,ip,jp->n", parts.gram, share, phase)
        rest = (parts.energy - explained).clamp_min(0.0)
        # The longer of two periods must pay for its points.
        cost = parts.window * rest.clamp_min(1e-300).log() + (candidate - 1) * math.log(parts.window)
        better = cost < best
        best = torch.where(better, cost, best)
        left = torch.where(better, rest, left)
        period = torch.where(better, torch.full_like(period, float(candidate)), period)
    if longest < 2:
        return None
    return Fit("cycle", None, left, period[:, None], (period - 1).clamp_min(0.0), longest - 1)


def _phases(times: Tensor, period: int) -> Float[Tensor, "time phase"]:
    return torch.nn.functional.one_hot(times.long() % period, period).double()


def significance(fit: Fit, parts: Components) -> Tensor:
    """Probability that noise would be explained so well, corrected for the members tried,
    (token,): an F test."""
    ours, directions = fit.columns, parts.noise_directions
    rest = (parts.window - 1 - ours).clamp_min(1.0)
    explained = (parts.energy - fit.left).clamp_min(0.0)
    ratio = (explained / ours.clamp_min(1.0)) / (fit.left / rest).clamp_min(1e-300)
    # fdtrc(a, b, x) is the upper tail of the F distribution.
    tail = special.fdtrc((ours * directions).numpy(), (rest * directions).numpy(), ratio.clamp(max=1e200).numpy())
    return (torch.from_numpy(tail) * fit.tried).clamp(max=1.0)
