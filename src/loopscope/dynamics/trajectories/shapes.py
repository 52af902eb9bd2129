"""Shapes that a motion can have: families of functions of time, linear in their coefficients.

A family is a design matrix whose columns depend on a few numbers (a rate, a period). How much of a motion it explains
is the energy of the motion's projection on those columns, the mean taken out. The best numbers are found on a grid,
then by a search that narrows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

Design = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(..., number) and times (time,) to columns (..., time, column), without the constant one, and how these change with
each number (..., number, time, column)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapeFamily:
    """One family of shapes."""

    name: str
    design: Design
    grid: Float[Tensor, "candidate number"]
    step: Float[Tensor, " number"]
    """A step of the narrowing search goes by four times this at most, or by half the number where that is more."""
    low: Float[Tensor, " number"]
    high: Float[Tensor, " number"]
    columns: int


def shape_columns(family: ShapeFamily, numbers: Tensor, times: Tensor) -> Tensor:
    """An orthonormal basis of what the family spans beside a constant, (..., time, column)."""
    columns, _ = family.design(numbers, times)
    centred = columns - columns.mean(-2, keepdim=True)
    basis: Tensor
    basis, _ = torch.linalg.qr(centred / centred.norm(dim=-2, keepdim=True).clamp_min(1e-300))
    return basis


def shape_coefficients(
    family: ShapeFamily, numbers: Tensor, times: Tensor, scores: Tensor
) -> Float[Tensor, "motion column component"]:
    """The family's columns times these, and a constant, come nearest to each motion."""
    columns, _ = family.design(numbers, times)
    basis, upper = torch.linalg.qr(columns - columns.mean(-2, keepdim=True))
    found: Tensor = torch.linalg.solve_triangular(upper, basis.mT @ scores, upper=True)
    return found.nan_to_num(0.0, 0.0, 0.0)


def explained_energy(family: ShapeFamily, numbers: Tensor, times: Tensor, scores: Tensor) -> Tensor:
    """Of each motion's scores (motion, time, component): the sum of squares that its own numbers explain, (motion,)."""
    projected: Tensor = shape_columns(family, numbers, times).mT @ scores
    return projected.square().sum((-1, -2))


@lru_cache(maxsize=16)
def families(window: int, least_periods: float) -> tuple[ShapeFamily, ...]:
    """The families for a tail of `window` recurrences. Rates are in e-folds per window, turns in radians per
    recurrence."""
    rates = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0], dtype=torch.float64)
    slowest = 2 * math.pi * least_periods / window
    turns = torch.arange(slowest, math.pi, math.pi / (2 * window), dtype=torch.float64)
    both = torch.cat((-rates, rates))
    # A spiral is told by its shrinking as well, so that less than a turn is enough to see it.
    some = torch.arange(0.7 * 2 * math.pi / window, slowest, math.pi / (2 * window), dtype=torch.float64)
    spins = torch.cat((-rates[3:-1], -rates[:3], torch.zeros(1, dtype=torch.float64), rates[:7]))
    powers = torch.tensor([-3.0, -2.0, -1.5, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25])
    fast = torch.tensor([-2.0, -6.0, -12.0, -25.0])
    arcs = 2 * math.pi / window * torch.tensor([0.1, 0.2, 0.3, 0.45, 0.6, 0.75])
    late, far = math.log(20.0 * window), math.inf
    shifts, bends = torch.linspace(-2.0, math.log(8.0 * window), 8), torch.tensor([0.2, 0.5, 1.0, 1.6])
    found = [
        _family("power", _power, [powers], [0.2], [-4.0], [3.0]),
        _family("arc", _orbit(1), [arcs], [0.2 / window], [0.01 / window], [2 * math.pi / window]),
        _family("exponential", _exponential, [both], [0.3], [-60.0], [60.0]),
        _family("alternating", _alternating, [torch.cat((both, torch.zeros(1)))], [0.3], [-60.0], [60.0]),
        _family("logarithm", _logarithm, [shifts], [0.5], [-4.6], [math.log(20.0 * window)]),
        _family("logarithmic arc", _logarithmic_arc, [shifts, bends], [0.5, 0.2], [-4.6, 0.02], [late, 3.0]),
        _family("drift after transient", _late_drift, [fast], [1.0], [-60.0], [-1.5]),
        _family(
            "spiral",
            _spiral,
            [torch.cat((some, turns)), spins],
            [math.pi / (4 * window), 0.3],
            [0.5 * 2 * math.pi / window, -far],
            [math.pi, far],
        ),
    ]
    for harmonics in (1, 2, 3, 4):
        if 2 * harmonics + 1 <= 0.4 * window:
            step = math.pi / (2 * window * harmonics)
            turns = torch.arange(slowest, math.pi, step, dtype=torch.float64)
            turns = turns[without_trends(turns, harmonics, slowest)]
            found.append(_family(f"orbit {harmonics}", _orbit(harmonics), [turns], [step / 2], [slowest], [math.pi]))
    return tuple(found)


def many_harmonics(harmonics: int, window: int, least_periods: float) -> ShapeFamily:
    """A closed curve of more harmonics than a grid is worth: it is looked for around the best one of few."""
    slowest = 2 * math.pi * least_periods / window
    return _family(
        f"orbit {harmonics}",
        _orbit(harmonics),
        [torch.zeros(0)],
        [math.pi / (8 * window * harmonics)],
        [slowest],
        [math.pi],
    )


def rotations(count: int, window: int, least_periods: float) -> ShapeFamily:
    """That many rotations of unrelated periods. No grid: it would have too many points."""
    slowest = 2 * math.pi * least_periods / window
    return ShapeFamily(
        name=f"{count} rotations",
        design=_side_by_side([_orbit(1)] * count, [1] * count),
        grid=torch.zeros(0, count, dtype=torch.float64),
        step=torch.full((count,), math.pi / (4 * window), dtype=torch.float64),
        low=torch.full((count,), slowest, dtype=torch.float64),
        high=torch.full((count,), math.pi, dtype=torch.float64),
        columns=2 * count,
    )


@lru_cache(maxsize=256)
def together(members: tuple[ShapeFamily, ...]) -> ShapeFamily:
    """The columns of several families side by side, their numbers one after the other. Its grid has no points, and
    numbers beyond those of the members say nothing."""
    counts = [family.grid.shape[-1] for family in members]
    return ShapeFamily(
        name=", ".join(family.name for family in members),
        design=_side_by_side([family.design for family in members], counts),
        grid=torch.zeros(0, sum(counts), dtype=torch.float64),
        step=torch.cat([family.step for family in members]),
        low=torch.cat([family.low for family in members]),
        high=torch.cat([family.high for family in members]),
        columns=sum(family.columns for family in members),
    )


def without_trends(turns: Tensor, harmonics: int, slowest: float) -> Tensor:
    """Which turns have no harmonic that recurrences alias to a slow turn, which would be a trend and no cycle."""
    angles = turns[:, None] * torch.arange(1, harmonics + 1)
    folded = (angles + math.pi).remainder(2 * math.pi) - math.pi
    return (folded.abs() >= slowest).all(-1)


def _family(
    name: str, design: Design, axes: list[Tensor], step: list[float], low: list[float], high: list[float]
) -> ShapeFamily:
    grid = torch.cartesian_prod(*[axis.double() for axis in axes]).reshape(-1, len(axes))
    some = torch.ones(1, len(axes), dtype=torch.float64)
    columns = design(some, torch.arange(1.0, 9.0, dtype=torch.float64))[0].shape[-1]
    bounds = [torch.tensor(values, dtype=torch.float64) for values in (step, low, high)]
    return ShapeFamily(
        name=name, design=design, grid=grid, step=bounds[0], low=bounds[1], high=bounds[2], columns=columns
    )


def _side_by_side(designs: Sequence[Design], counts: Sequence[int]) -> Design:
    """The columns of several designs, whose numbers, so many each, follow each other."""

    def design(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        pieces = numbers[..., : sum(counts)].split(list(counts), dim=-1)
        parts = [each(piece, times) for each, piece in zip(designs, pieces, strict=True)]
        columns = torch.cat([part[0] for part in parts], dim=-1)
        changes = columns.new_zeros(*numbers.shape[:-1], sum(counts), *columns.shape[-2:])
        first = column = 0
        for _, moved in parts:
            last, end = first + moved.shape[-3], column + moved.shape[-1]
            changes[..., first:last, :, column:end] = moved
            first, column = last, end
        return columns, changes

    return design


def _power(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """(t^q - 1) / q, the logarithm at q = 0; times count from 1."""
    exponent, logs = numbers[..., 0:1], times.log()
    small = exponent.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(exponent), exponent)
    powers = times**safe
    columns = torch.where(small, logs, (powers - 1) / safe)
    changes = torch.where(small, logs.square() / 2, (powers * (safe * logs - 1) + 1) / safe.square())
    return columns[..., None], changes[..., None, :, None]


def _logarithm(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """log(t + s), the number log s: 0 where the drift began with the loop."""
    shift = numbers[..., 0:1].exp()
    since = times - 1 + shift
    return since.log()[..., None], (shift / since)[..., None, :, None]


def _logarithmic_arc(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """An arc whose angle goes with that; the second number is how far it turns within the tail, in radians."""
    since, slope = _logarithm(numbers, times)
    since, slope, bend = since[..., 0], slope[..., 0, :, 0], numbers[..., 1:2]
    way, its_slope = since[..., -1:] - since[..., :1], slope[..., -1:] - slope[..., :1]
    place = (since - since[..., :1]) / way
    slides = (slope - slope[..., :1] - place * its_slope) / way
    columns, around = _circle(bend * place)
    return columns, torch.stack((bend * slides, place), dim=-2)[..., None] * around[..., None, :, :]


def _envelope(rate: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """exp(rate u), u the time in windows, and its derivative; counted from the end where it grows, so that it never
    exceeds 1."""
    place = (times - times[0]) / len(times)
    place = torch.where(rate > 0, place - 1, place)
    values = torch.exp(rate * place)
    return values, place * values


def _exponential(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    values, changes = _envelope(numbers[..., 0:1], times)
    return values[..., None], changes[..., None, :, None]


def _alternating(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    columns, changes = _exponential(numbers, times)
    signs = torch.cos(math.pi * times).round()[:, None]
    return signs * columns, signs * changes


def _late_drift(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    transient, changes = _envelope(numbers[..., 0:1], times)
    columns = torch.stack((transient, times.expand_as(transient) / len(times)), dim=-1)
    return columns, torch.stack((changes, torch.zeros_like(changes)), dim=-1)[..., None, :, :]


def _spiral(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    turned, around = _orbit(1)(numbers, times)
    size, shrinks = (each[..., None] for each in _envelope(numbers[..., 1:2], times))
    return size * turned, torch.stack((size * around[..., 0, :, :], shrinks * turned), dim=-3)


def _circle(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each angle as two columns, and their derivatives in the angle."""
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack((cosine, sine), dim=-1), torch.stack((-sine, cosine), dim=-1)


def _orbit(harmonics: int) -> Design:
    def design(numbers: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        phases = (times - times[0])[:, None] * torch.arange(1, harmonics + 1)
        columns, around = _circle(numbers[..., 0:1, None] * phases)
        return columns.flatten(-2), (phases[..., None] * around).flatten(-2)[..., None, :, :]

    return design
