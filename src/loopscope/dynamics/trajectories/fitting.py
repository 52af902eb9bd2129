"""The best member of every family of shapes for each motion, and what it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from scipy import special
from torch import Tensor

from loopscope.dynamics.trajectories.narrowing import SPARE, best_on_grid, narrow
from loopscope.dynamics.trajectories.shapes import (
    ShapeFamily,
    explained_energy,
    families,
    many_harmonics,
    rotations,
    shape_columns,
)
from loopscope.dynamics.trajectories.tail import Components

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
    family: ShapeFamily | None
    """None for a cycle, whose number is its period."""
    left: Float[Tensor, " token"]
    """Sum of squares that it leaves."""
    numbers: Float[Tensor, "token number"]
    columns: Float[Tensor, " token"]
    """Coefficients per component, beside the constant and the numbers."""
    tried: int
    """Members of the family that were compared, for the correction of the significance."""


def fit_shapes(parts: Components, least_periods: float, unresolved: Float[Tensor, " token"]) -> list[Fit]:
    """The best fit of every family; `unresolved` of a motion's sum of squares cannot be told from 0."""
    known = families(parts.window, least_periods)
    found: list[Fit] = []
    for family in known:
        start, value = best_on_grid(family, parts.times, parts.scores)
        found.append(_fit_from(family, start, value, parts, len(family.grid), found))
    single = next((fit for fit in found if fit.name == "orbit 1"), None)
    if single is not None:
        _add_rotations(found, single, parts, least_periods)
        _add_many_harmonics(found, parts, least_periods)
    cycles = _fit_cycles(parts, least_periods, unresolved)
    return found if cycles is None else [*found, cycles]


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """What one fit of each motion leaves."""

    directions: Float[Tensor, " token"]
    """How many it takes: participation ratio of its principal components."""
    independent: Float[Tensor, " token"]
    """Share of the recurrences that count as independent, from the correlation of neighbouring ones. What rounding
    makes of a slow motion is the same for many recurrences on end."""


def residuals(
    fits: Sequence[Fit], chosen: Int[Tensor, " token"], parts: Components, unresolved: Float[Tensor, " token"]
) -> Residuals:
    """What each motion's chosen fit leaves; `unresolved` as in `fit_shapes`."""
    directions, correlation = torch.empty_like(parts.energy), torch.empty_like(parts.energy)
    for place in chosen.unique().tolist():
        rows = (chosen == place).nonzero()[:, 0]
        basis = _fitted_basis(fits[place], rows, parts)
        scores, gram = parts.scores[rows], parts.gram[rows]
        # The components that were left out take part by their sums of squares: they are what noise fills.
        rest = scores - basis @ (basis.mT @ scores)
        inner = rest.mT @ rest
        energy = _trace(inner) + parts.rest_energy[rows]
        square = inner.square().sum((-1, -2)) + parts.rest_square[rows]
        directions[rows] = energy.square() / square.clamp_min(1e-300)
        # (1 - P) G (1 - P), the projection P = B B^T never formed: products of what is left at any two times.
        half = gram - basis @ (basis.mT @ gram)
        whole = half - (half @ basis) @ basis.mT
        neighbours = whole.diagonal(1, dim1=-2, dim2=-1).sum(-1)
        # What cannot be told from 0 counts as uncorrelated, or the digits that an exact fit leaves would decide.
        correlation[rows] = (neighbours / (_trace(whole) + unresolved[rows])).clamp(0.0, 0.999)
    # The effective number of observations of a first-order autoregression, over their number.
    return Residuals(directions, (1 - correlation) / (1 + correlation))


def significance(
    left: Float[Tensor, " token"], columns: Float[Tensor, " token"], tried: Float[Tensor, " token"], parts: Components
) -> Float[Tensor, " token"]:
    """Probability that noise would be explained so well by so many columns, corrected for the members tried: an F
    test."""
    rest = (parts.window - 1 - columns).clamp_min(1.0)
    explained = (parts.energy - left).clamp_min(0.0)
    ratio = (explained / columns.clamp_min(1.0)) / (left / rest).clamp_min(1e-300)
    # fdtrc(a, b, x) is the upper tail of the F distribution. A column has a coefficient in each direction that noise
    # takes, hence the degrees of freedom.
    freedom = (each * parts.noise_directions for each in (columns, rest))
    tail = special.fdtrc(*(each.numpy() for each in (*freedom, ratio.clamp(max=1e200))))
    return (torch.from_numpy(tail) * tried).clamp(max=1.0)


def _add_rotations(found: list[Fit], single: Fit, parts: Components, least_periods: float) -> None:
    """Two and three rotations of unrelated periods: the strongest one, then the strongest in what that leaves."""
    assert single.family is not None
    family, numbers, tried = single.family, single.numbers, single.tried
    for count in (2, 3):
        # With a column for fewer than two or three recurrences a shape follows noise as well.
        if 2 * count + 1 > 0.4 * parts.window:
            break
        basis = shape_columns(family, numbers, parts.times)
        # A grid over two or three turns would have their product of points; one at a time it has their sum, and all of
        # them are narrowed together afterwards.
        rest = parts.scores - basis @ (basis.mT @ parts.scores)
        added, _ = best_on_grid(single.family, parts.times, rest)
        family, numbers = rotations(count, parts.window, least_periods), torch.cat((numbers, added), dim=-1)
        value, tried = explained_energy(family, numbers, parts.times, parts.scores), tried * single.tried
        found.append(_fit_from(family, numbers, value, parts, tried, found))
        numbers = found[-1].numbers


def _add_many_harmonics(found: list[Fit], parts: Components, least_periods: float) -> None:
    few = [fit for fit in found if fit.name in ("orbit 2", "orbit 3", "orbit 4")]
    counts = [count for count in (6, 9) if 2 * count + 1 <= 0.4 * parts.window]
    if not few or not counts:
        return
    best = torch.stack([fit.left for fit in few]).argmin(0)
    turns = torch.stack([fit.numbers for fit in few])[best, torch.arange(len(best))]
    tried = sum(fit.tried for fit in few)
    for count in counts:
        family = many_harmonics(count, parts.window, least_periods)
        value = explained_energy(family, turns, parts.times, parts.scores)
        found.append(_fit_from(family, turns, value, parts, tried, found, _NEARLY))


def _fit_from(
    family: ShapeFamily,
    numbers: Tensor,
    value: Tensor,
    parts: Components,
    tried: int,
    others: list[Fit],
    promising: float = _PROMISING,
) -> Fit:
    """The best member near the one given for each motion, which explains `value`, looked for where that promises
    something and as long as others do not leave far less."""
    rows = (value >= promising * parts.energy).nonzero()[:, 0]
    if len(rows):
        # What such a shape explains is in few components; the others would only cost time.
        scores = parts.scores[rows]
        least = torch.stack([parts.energy, *(fit.left for fit in others)]).amin(0)[rows]
        found = narrow(family, parts.times, scores[..., -family.columns - SPARE :], numbers[rows], rivals=least)
        numbers = numbers.index_copy(0, rows, found)
        value = value.index_copy(0, rows, explained_energy(family, found, parts.times, scores))
    columns = torch.full_like(value, float(family.columns))
    return Fit(family.name, family, (parts.energy - value).clamp_min(0.0), numbers, columns, tried)


def _trace(squares: Tensor) -> Tensor:
    return squares.diagonal(dim1=-2, dim2=-1).sum(-1)


def _fitted_basis(fit: Fit, rows: Tensor, parts: Components) -> Tensor:
    if fit.family is not None:
        return shape_columns(fit.family, fit.numbers[rows], parts.times)
    periods = fit.numbers[rows, 0].long()
    basis = parts.gram.new_zeros(len(rows), parts.window, int(periods.max()))
    for period in periods.unique().tolist():
        phase = _phases(parts.times, period)
        # The last column is what the others and a constant leave none of.
        basis[periods == period, :, : period - 1] = torch.linalg.qr(phase - phase.mean(0))[0][:, :-1]
    return basis


def _fit_cycles(parts: Components, least_periods: float, unresolved: Tensor) -> Fit | None:
    """A cycle through arbitrary points, of a whole period: the means of the states of equal phase."""
    longest = min(_LONGEST_CYCLE, int(parts.window / least_periods))
    if longest < 2:
        return None
    # tr(P G) for the projections of all periods at once; G has every direction, as the points of a cycle may have.
    explained = parts.gram.flatten(1) @ _cycle_projections(parts.window, longest)
    rest = (parts.energy[:, None] - explained).clamp_min(0.0)
    # The longer of two periods must pay for its points.
    prices = torch.arange(1, longest, dtype=rest.dtype) * math.log(parts.window)
    best = (parts.window * torch.maximum(rest, unresolved[:, None]).log() + prices).argmin(-1)
    period = (best + 2).double()
    return Fit("cycle", None, rest.gather(-1, best[:, None])[:, 0], period[:, None], period - 1, longest - 1)


@lru_cache(maxsize=16)
def _cycle_projections(window: int, longest: int) -> Float[Tensor, "entry period"]:
    """Onto the means of equal phase, for periods from 2 on. Where a cycle begins does not matter."""
    phases = [_phases(torch.arange(window), period) for period in range(2, longest + 1)]
    return torch.stack([(phase / phase.sum(0) @ phase.mT).flatten() for phase in phases], dim=-1)


def _phases(times: Tensor, period: int) -> Float[Tensor, "time phase"]:
    return torch.nn.functional.one_hot(times.long() % period, period).double()
