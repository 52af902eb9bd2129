"""What is measured of each token's motion within its tail, before anything is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loopscope.behaviour.curves import fit_curves
from loopscope.behaviour.fitting import Fit, fit_shapes, residuals, significance
from loopscope.behaviour.limits import Shape, closed_period, limit_of, separate
from loopscope.behaviour.modes import fit_modes
from loopscope.behaviour.rounding import StateDtype, rounding_step
from loopscope.behaviour.settings import DisplacementSettings
from loopscope.behaviour.steps import slowing_power, steady_trend
from loopscope.behaviour.tail import Components, Tails, decompose
from loopscope.verdicts import Kind

__all__ = ["Motion", "measure_motions"]

_DEAR = {
    "arc": 2.0,
    "logarithmic arc": 2.0,
    "drift after transient": 2.0,
    "2 rotations": 3.0,
    "3 rotations": 3.0,
}
"""By how much less these must leave than simpler shapes. What rounding makes of a slow motion is not white, and they
would explain some of that; and rotations would take the place of the harmonics of an orbit."""

_SINGLE_MODES = ("exponential", "alternating", "spiral")
_SIMPLE = (*_SINGLE_MODES, "power", "logarithm", "arc", "orbit 1")
_IN_PART = 0.7
"""Share that the best single mode leaves at most where several modes are looked for."""
_SHRINKS = 1.3
"""And factor by which the squares of their steps fall from the first third of the tail to the last."""
_SLIP, _MOST_SLIP = 0.001, 0.05
"""Radians over the window by which turns may miss a common period: where there is no noise, and at most."""
_SLIP_IN_NOISE = 20.0
"""The same in the noise's root mean square over that of the motion and the root of the number of recurrences: the
error of the turn of a rotation of half the size, three times over."""
_SLOWING_MISFIT = 0.05
"""Root mean square of the logarithm of the steps about a power law: 5 % of a step."""
_UNRESOLVED = 0.5
"""Of the number type's rounding: what is left below this decides between no shapes."""
_EXACT = 1e-13
"""Of the energy: likewise, since the components of a motion in float64 are no better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Lengths are relative to the state's norm."""

    window: int
    last_recurrence: int
    """Of the tail, counted from 1."""
    rounding: float
    """Step that one rounding makes."""
    level: float
    """Root mean square displacement at the lag where it is largest."""
    later_level: float
    """The same within the later half of the tail."""
    noise: float
    """Step that what the best shape leaves would make, were it noise."""
    shape: Shape | None
    """The best one; None where the motion is too small to look for one."""
    unexplained: float
    """Share of the variance that it leaves."""
    amplitude: float
    """Root mean square distance to the centre of what it explains."""
    p_value: float
    margin: float
    """Logarithm of how much likelier it is than the best shape that tends to something else."""
    rival: Kind | None
    """What that one tends to."""
    filling: float
    """Directions that the motion takes, over those of white noise."""
    residual_filling: float
    """The same of what the shape leaves."""
    spreading: float
    """Mean squared displacement at lags about W/2 over that at lags about W/16."""
    shrinking: float
    """Step in the first third of the tail over that in the last third."""
    shrinking_late: float
    """The same within the later half."""
    late_step: float
    norm_growth: float
    evenness: float
    """Of what comes round: step in the first whole periods of the tail over that in the last as many; 1 of other
    motion."""
    speed: float
    """Length of the way from the first quarter of the tail to the last, per recurrence."""
    slowing: float
    """The power a of steps that shrink like (t + s)^-a; NaN where noise hides it or they do not follow one."""
    trend: float
    """Factor by which the steps change over the tail, if they do so steadily; 1 otherwise."""
    ballistic: float
    """Exponent of the mean squared displacement between lags W/4 and W/2: 2 for a drift, 1 for a random walk."""
    displacement: tuple[float, ...]
    """Root mean square, by lag."""


@dataclass(frozen=True, slots=True)
class _Best:
    """The likeliest shape of one motion, and what it leaves."""

    shape: Shape
    left: float
    """Sum of squares that it leaves."""
    columns: float
    p_value: float
    margin: float
    rival: Kind
    directions: float
    directions_left: float
    speed: float
    evenness: float


def measure_motions(tails: Tails, dtype: StateDtype, settings: DisplacementSettings) -> list[Motion]:
    """One motion a token. Shapes are fitted where it moves by more than rounding."""
    rounding = rounding_step(dtype)
    displacement = tails.displacement()
    level = displacement.amax(-1).sqrt()
    moving = (level > settings.rounding_factor * rounding).nonzero()[:, 0]
    best: dict[int, _Best] = {}
    if len(moving):
        parts = decompose(tails.last(tails.window, moving))
        best = dict(zip(moving.tolist(), _best_fits(parts, rounding, settings), strict=True))
    energies = tails.products.diagonal(dim1=-2, dim2=-1).sum(-1) - tails.products.mean(-1).sum(-1)
    numbers = {
        "level": level,
        "later_level": tails.displacement(tails.window - tails.window // 2).amax(-1).sqrt(),
        "energy": energies.clamp_min(0.0),
        "spreading": _spreading(displacement, tails.window),
        "ballistic": _ballistic(displacement, tails.window),
        "norm_growth": tails.norm_growth,
        **_step_numbers(tails),
    }
    rows = zip(*(column.tolist() for column in numbers.values()), strict=True)
    curves = displacement.sqrt().tolist()
    return [
        _motion(tails, rounding, best.get(token), dict(zip(numbers, row, strict=True)), curves[token])
        for token, row in enumerate(rows)
    ]


def _motion(tails: Tails, rounding: float, its: _Best | None, numbers: dict[str, float], curve: list[float]) -> Motion:
    energy = numbers.pop("energy")
    left, columns = (energy, 0.0) if its is None else (its.left, its.columns)
    return Motion(
        window=tails.window,
        last_recurrence=int(tails.times[-1]),
        rounding=rounding,
        noise=math.sqrt(2 * left / max(1.0, tails.window - 1 - columns)),
        shape=None if its is None else its.shape,
        unexplained=left / energy if energy > 0 else 1.0,
        amplitude=math.sqrt(max(0.0, energy - left) / tails.window),
        p_value=1.0 if its is None else its.p_value,
        margin=0.0 if its is None else its.margin,
        rival=None if its is None else its.rival,
        filling=0.0 if its is None else its.directions / tails.white_directions,
        residual_filling=0.0 if its is None else its.directions_left / tails.white_directions,
        evenness=1.0 if its is None else its.evenness,
        speed=0.0 if its is None else its.speed,
        displacement=tuple(curve),
        **numbers,
    )


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
    """Of means over lags, since motion that comes round has deep minima."""
    short = displacement[:, : max(1, window // 8)].mean(-1)
    long = displacement[:, 3 * window // 8 : max(3 * window // 8 + 1, 5 * window // 8)].mean(-1)
    return long / short.clamp_min(1e-300)


def _ballistic(displacement: Tensor, window: int) -> Tensor:
    quarter, half = max(1, window // 4), max(2, window // 2)
    ratio = displacement[:, half - 1] / displacement[:, quarter - 1].clamp_min(1e-300)
    return ratio.clamp_min(1e-300).log() / math.log(half / quarter)


def _speeds(parts: Components) -> Tensor:
    quarter = max(1, parts.window // 4)
    way = parts.scores[:, -quarter:].mean(1) - parts.scores[:, :quarter].mean(1)
    length: Tensor = torch.linalg.vector_norm(way, dim=-1)
    return length / (parts.window - quarter)


def _best_fits(parts: Components, rounding: float, settings: DisplacementSettings) -> list[_Best]:
    """The likeliest shape of each motion."""
    unresolved = parts.window * (_UNRESOLVED * rounding) ** 2 / 2 + _EXACT * parts.energy
    fits = fit_shapes(parts, settings.least_periods, unresolved)
    everywhere = torch.ones_like(parts.energy)
    first = _costs(fits, parts, unresolved, everywhere).argmin(0)
    mixed = _may_be_modes(fits, first, parts, rounding, settings)
    if len(mixed):
        singles = {fit.name: fit for fit in fits if fit.name in _SINGLE_MODES}
        fits += fit_modes(parts, mixed, singles, math.log(settings.growth))
        first = _costs(fits, parts, unresolved, everywhere).argmin(0)
    # What the first choice leaves says how many recurrences count as independent.
    rest = residuals(fits, first, parts, unresolved)
    cost = _costs(fits, parts, unresolved, rest.independent)
    chosen = cost.argmin(0)
    small, step = _left_over(fits, parts, settings)
    # A cycle of many points may be a curve that nearly closes after several rounds.
    told = small.gather(0, chosen[None])[0] & torch.tensor([fit.name != "cycle" for fit in fits])[chosen]
    untold = ~told & (step.gather(0, chosen[None])[0] > settings.floor_factor * rounding)
    if bool(untold.any()):
        usual = len(fits)
        fits += fit_curves(parts, untold.nonzero()[:, 0], settings.least_periods, settings.unexplained_structure)
        cost = _costs(fits, parts, unresolved, rest.independent)
        small, step = _left_over(fits, parts, settings)
        closed = torch.tensor([[fit.name == "cycle" or fit.name.startswith("orbit")] for fit in fits])
        closed = closed & (small | (step <= settings.rounding_factor * rounding))
        # The closed curve that leaves least of a motion is better than a likelier shape that does not explain it; and
        # one of so many harmonics has to explain it.
        cost = torch.where(untold & closed.any(0), torch.where(closed, step.clamp_min(1e-300).log(), math.inf), cost)
        cost[usual:][~closed[usual:]] = math.inf
    order = cost.argsort(0)
    directions = torch.where(
        order[0] == first, rest.directions, residuals(fits, order[0], parts, unresolved).directions
    ).tolist()
    speeds, columns, steps = _speeds(parts).tolist(), parts.directions.tolist(), _squared_steps(parts)
    p_values = torch.stack([significance(fit, parts) for fit in fits])
    found = []
    for row, (best, *others) in enumerate(order.T.tolist()):
        shape = _shape(fits[best], row, parts, settings)
        kind = limit_of(shape, settings)
        rival, rival_kind = math.inf, kind
        for other in others:
            rival_kind = limit_of(_shape(fits[other], row, parts, settings), settings)
            if rival_kind != kind:
                rival = float(cost[other, row])
                break
        found.append(
            _Best(
                shape=shape,
                left=float(fits[best].left[row]),
                columns=float(fits[best].columns[row]),
                p_value=float(p_values[best, row]),
                margin=(rival - float(cost[best, row])) / 2,
                rival=rival_kind,
                directions=columns[row],
                directions_left=directions[row],
                speed=speeds[row],
                evenness=_evenness(steps[row], shape.period) if kind == Kind.ORBIT else 1.0,
            )
        )
    return found


def _may_be_modes(
    fits: list[Fit], first: Tensor, parts: Components, rounding: float, settings: DisplacementSettings
) -> Tensor:
    """Motions that shrink and that one mode explains in part, but that nothing simple explains."""
    left = torch.stack([fit.left for fit in fits]).gather(0, first[None])[0]
    simple = torch.tensor([fit.name in _SIMPLE for fit in fits])[first]
    simple = simple & ((2 * left / parts.window).sqrt() <= settings.rounding_factor * rounding)
    one = torch.stack([fit.left for fit in fits if fit.name in _SINGLE_MODES]).amin(0)
    steps = _squared_steps(parts)
    third = steps.shape[-1] // 3
    shrinks = steps[:, :third].sum(-1) >= _SHRINKS * steps[:, -third:].sum(-1)
    return (shrinks & ~simple & (one <= _IN_PART * parts.energy)).nonzero()[:, 0]


def _squared_steps(parts: Components) -> Tensor:
    squares = parts.gram.diagonal(dim1=-2, dim2=-1)
    return squares[:, 1:] + squares[:, :-1] - 2 * parts.gram.diagonal(1, dim1=-2, dim2=-1)


def _evenness(steps: Tensor, period: float) -> float:
    """Steps over whole periods have the same length wherever they begin."""
    if not 2 * period <= len(steps):
        return 1.0
    count = round(int(len(steps) / (2 * period)) * period)
    return math.sqrt(float(steps[:count].sum()) / max(float(steps[-count:].sum()), 1e-300))


def _left_over(fits: list[Fit], parts: Components, settings: DisplacementSettings) -> tuple[Tensor, Tensor]:
    """(shape, token): whether nearly nothing is left, and the step of noise of the size of what is left."""
    left, columns = torch.stack([fit.left for fit in fits]), torch.stack([fit.columns for fit in fits])
    step = (2 * left / (parts.window - 1 - columns).clamp_min(1.0)).sqrt()
    return left <= settings.unexplained_structure * parts.energy, step


def _shape(fit: Fit, row: int, parts: Components, settings: DisplacementSettings) -> Shape:
    """Rotations that have a common period are a closed curve."""
    numbers = tuple(fit.numbers[row].tolist())
    left, energy = float(fit.left[row]), float(parts.energy[row])
    if fit.name.endswith("rotations") and left <= settings.unexplained_noise * energy:
        slip = min(_MOST_SLIP, _SLIP + _SLIP_IN_NOISE * math.sqrt(left / max(energy, 1e-300) / parts.window))
        period = closed_period(numbers, parts.window, settings.least_periods, slip)
        if period is not None:
            return Shape("closed curve", (period,), parts.window)
    return Shape(fit.name, numbers, parts.window)


def _costs(fits: list[Fit], parts: Components, unresolved: Tensor, independent: Tensor) -> Tensor:
    """(shape, token): the Bayesian information criterion for noise in as many directions as the noise takes, in each of
    which every column has a coefficient: twice the negative log likelihood, and the price of the coefficients."""
    left = torch.stack([torch.maximum(fit.left * _DEAR.get(fit.name, 1.0), unresolved) for fit in fits])
    for place, fit in enumerate(fits):
        if fit.name.endswith("rotations"):
            left[place][~separate(fit.numbers, parts.window)] = math.inf
    columns = torch.stack([fit.columns for fit in fits])
    # A whole period is one of a few, and costs less than a number.
    numbers = torch.tensor([[0.0 if fit.family is None else fit.numbers.shape[-1]] for fit in fits], dtype=left.dtype)
    entries = (parts.window * independent * parts.noise_directions).clamp_min(2.0)
    return entries * left.log() + (columns * parts.noise_directions + numbers) * entries.log()
