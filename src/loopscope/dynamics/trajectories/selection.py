"""Which shape each motion has: the likeliest of all that were fitted."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.dynamics.trajectories.curves import SINGLE_MODES, fit_curves, fit_modes
from loopscope.dynamics.trajectories.fitting import Fit, fit_shapes, residuals, significance
from loopscope.dynamics.trajectories.limits import Shape, closed_periods, limits_of, separate
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.dynamics.trajectories.shapes import explained_energy, families
from loopscope.dynamics.trajectories.tail import Components
from loopscope.dynamics.verdicts import Kind

_PENALTY = {
    "arc": 2.0,
    "logarithmic arc": 2.0,
    "drift after transient": 2.0,
    "2 rotations": 3.0,
    "3 rotations": 3.0,
}
"""By how much less these must leave than simpler shapes. What rounding makes of a slow motion is not white, and they
would explain some of that; and rotations would take the place of the harmonics of an orbit."""

_SIMPLE = (*SINGLE_MODES, "power", "logarithm", "arc", "orbit 1")
_IN_PART = 0.7
"""Share that the best single mode leaves at most where several modes are looked for."""
_SHRINKS = 1.3
"""And factor by which the squares of their steps fall from the first third of the tail to the last."""
_SLIP, _MOST_SLIP = 0.001, 0.05
"""Radians over the window by which turns may miss a common period: where there is no noise, and at most."""
_SLIP_IN_NOISE = 20.0
"""The same in the noise's root mean square over that of the motion and the root of the number of recurrences: the
error of the turn of a rotation of half the size, three times over."""
_COLUMNS, _MODE_COLUMNS = 8, 6
"""Of any shape but a closed curve of many harmonics; and of modes."""
_RETURNS = 0.75
"""Of the mean squared distance of two states: where none that are a whole number of recurrences apart are nearer than
that, nothing repeats."""
_GRID = 4.0
"""By which factor the thresholds for what is left are raised at most where their sensitivity is told."""
_FIRST, _SPARSE = 0.5, 4.0
"""Share of a motion that the first harmonic of its curve has, at least; and recurrences a turn, fewer than which leave
the order of the points open."""
_SEEN = 100.0
"""Times as much as a slow exponential leaves the best drift has to leave."""
_UNRESOLVED = 0.5
"""Of the dtype's rounding: what is left below this decides between no shapes."""
_EXACT = 1e-13
"""Of the energy: likewise, since the components of a motion in float64 are no better."""


@dataclass(frozen=True, slots=True, eq=False)
class BestShapes:
    """The likeliest shape of each motion, and what it leaves; (token,) each. Lengths are relative to the norm."""

    shape: tuple[Shape | None, ...]
    """None where a motion is too small to look for one."""
    limit: Tensor
    """What the shape tends to, as a place in `KINDS`."""
    left: Tensor
    """Sum of squares that it leaves."""
    columns: Tensor
    """How many coefficients it has in each direction."""
    p_value: Tensor
    """That noise alone would fit a shape so well, corrected for how many were tried."""
    margin: Tensor
    """Logarithm of how much likelier it is than the best shape that tends to something else."""
    rival: Tensor
    """What that one tends to."""
    directions: Tensor
    """How many the motion takes."""
    directions_left: Tensor
    """How many what is left takes."""
    speed: Tensor
    """Length of the way from the first quarter of the tail to the last, per recurrence."""
    evenness: Tensor
    """Of periodic motion: step in the first whole periods of the tail over that in the last as many; else 1."""

    @classmethod
    def unfitted(cls, shape: Shape | None, left: Tensor, columns: int, directions: Tensor) -> BestShapes:
        """Of motions that no shape was fitted to: too small to look for one (`shape` None), or such that none can
        explain them."""
        zeros, ones = torch.zeros_like(left), torch.ones_like(left)
        bounded = torch.full((len(left),), Kind.BOUNDED.code)
        return cls(
            shape=(shape,) * len(left),
            limit=bounded,
            left=left,
            columns=columns * ones,
            p_value=ones,
            margin=zeros,
            rival=bounded,
            directions=directions,
            directions_left=directions,
            speed=zeros,
            evenness=ones,
        )

    def put(self, rows: Int[Tensor, " row"], some: BestShapes) -> BestShapes:
        """With others at some places."""
        shapes = list(self.shape)
        for row, shape in zip(rows.tolist(), some.shape, strict=True):
            shapes[row] = shape
        names = [field.name for field in fields(self) if field.name != "shape"]
        put = {name: getattr(self, name).index_copy(0, rows, getattr(some, name)) for name in names}
        return replace(self, shape=tuple(shapes), **put)


def best_shapes(
    parts: Components,
    displacement: Float[Tensor, "token lag"],
    noise: Noise,
    settings: DisplacementSettings,
    ends: Bool[Tensor, " token"] | None = None,
) -> BestShapes:
    """The likeliest shape of each motion, and how much likelier it is than the best that tends to something else.

    `displacement` is the mean squared one, from which is seen where no shape can explain a motion: none is fitted
    there. Of the tokens in `ends` only an approach and an orbit are of interest.
    """
    left = _least_left(parts, _COLUMNS)
    none = BestShapes.unfitted(Shape("none", (), parts.window), left, _COLUMNS, parts.directions)
    rows = _may_have_shape(parts, displacement, noise, settings, ends).nonzero()[:, 0]
    if not len(rows):
        return none
    return none.put(rows, _fitted(parts.take(rows), displacement[rows], noise.take(rows), settings))


def _may_have_shape(
    parts: Components, displacement: Tensor, noise: Noise, settings: DisplacementSettings, ends: Tensor | None
) -> Bool[Tensor, " token"]:
    """Whether any shape could explain a motion.

    One of few columns has to leave no more than the principal components do. A closed curve of many comes back: near a
    whole number of periods it is at most half a recurrence's step from where it was.
    """
    slides = _least_left(parts, 2) <= settings.unsteady * parts.energy
    lags = displacement[:, 1 : max(2, int(parts.window / settings.least_periods))].amin(-1)
    far = 2 * parts.energy / parts.window
    loose = _GRID * noise.amplified(settings)
    returns = (lags <= torch.maximum(displacement[:, 0], loose.square())) & (lags <= _RETURNS * far)
    few = _explainable(parts, _COLUMNS, noise, settings) | slides
    if ends is not None:
        few &= ~ends | _shrinks(parts)
    return few | returns


def _explainable(parts: Components, columns: int, noise: Noise, settings: DisplacementSettings) -> Tensor:
    """Whether what as many columns leave at least can count as explained, (token,)."""
    left = _least_left(parts, columns)
    step = (2 * left / max(1, parts.window - 1 - columns)).sqrt()
    most = max(settings.unexplained_noise, settings.unexplained_small, settings.unexplained * _GRID)
    noisy = (step <= _GRID * noise.amplified(settings)) & (left <= most * parts.energy)
    return noisy | (left <= settings.unexplained_structure * parts.energy)


def _least_left(parts: Components, columns: int) -> Float[Tensor, " token"]:
    """Sum of squares that as many columns leave at least, however their numbers are chosen: what the largest components
    leave."""
    leading = parts.scores[..., -columns:].square().sum((-1, -2))
    return (parts.energy - leading).clamp_min(0.0)


def _fitted(parts: Components, displacement: Tensor, noise: Noise, settings: DisplacementSettings) -> BestShapes:
    unresolved = _unresolved(parts, noise)
    fits, cost, directions = _compared(parts, noise, settings, unresolved)
    periods = [_common_periods(fit, parts, settings) for fit in fits]
    limits = torch.stack(
        [
            torch.where(period.isnan(), limits_of(fit.name, fit.numbers, parts.window, settings), Kind.ORBIT.code)
            for fit, period in zip(fits, periods, strict=True)
        ]
    )
    _resolve_slow(limits, fits, unresolved)
    best = cost.argmin(0, keepdim=True)
    limit = limits.gather(0, best)
    # The margin is between limits, not between shapes: a logarithm and a power may tend to the same.
    rival = torch.where(limits == limit, math.inf, cost).min(0)
    left, columns, tried = (
        torch.stack(each).gather(0, best)[0]
        for each in (
            [fit.left for fit in fits],
            [fit.columns for fit in fits],
            [torch.full_like(fit.left, fit.tried) for fit in fits],
        )
    )
    shapes, evenness, steps = [], torch.ones_like(left), _squared_steps(parts)
    for row, (place, kind) in enumerate(zip(best[0].tolist(), limit[0].tolist(), strict=True)):
        fit, period = fits[place], float(periods[place][row])
        closed = period == period  # NaN is not itself
        numbers = (period,) if closed else tuple(fit.numbers[row].tolist())
        shape = Shape("closed curve" if closed else fit.name, numbers, parts.window)
        if kind == Kind.ORBIT.code:
            returns = _first_return(parts, row, displacement[row], shape.period, settings)
            if returns is not None:
                shape = Shape("approached cycle", (float(returns),), parts.window)
            evenness[row] = _evenness(steps[row], shape.period)
        shapes.append(shape)
    return BestShapes(
        shape=tuple(shapes),
        limit=limit[0],
        left=left,
        columns=columns,
        p_value=significance(left, columns, tried, parts),
        margin=(rival.values - cost.gather(0, best)[0]) / 2,
        rival=limits.gather(0, rival.indices[None])[0],
        directions=parts.directions,
        directions_left=directions,
        speed=_speeds(parts),
        evenness=evenness,
    )


def _unresolved(parts: Components, noise: Noise) -> Float[Tensor, " token"]:
    """Sum of squares that cannot be told from 0."""
    return parts.window * (_UNRESOLVED * noise.rounding) ** 2 / 2 + _EXACT * parts.energy


def _resolve_slow(limits: Int[Tensor, "shape token"], fits: list[Fit], unresolved: Float[Tensor, " token"]) -> None:
    """A slow exponential counts as a drift, as it hardly bends within the tail; but where it leaves far less than any
    drift, its bend is seen, and it tends to a point, or away, as exponentials do."""
    slides = limits == Kind.SLIDER.code
    for place, fit in enumerate(fits):
        if fit.name == "exponential":
            others = slides.clone()
            others[place] = False
            drifts = torch.where(others, torch.stack([each.left for each in fits]), math.inf).amin(0)
            seen = slides[place] & (_SEEN * torch.maximum(fit.left, unresolved) <= drifts) & drifts.isfinite()
            ends = torch.where(fit.numbers[:, 0] < 0, Kind.FIXED_POINT.code, Kind.DIVERGING.code)
            limits[place] = torch.where(seen, ends, limits[place])


def _common_periods(fit: Fit, parts: Components, settings: DisplacementSettings) -> Float[Tensor, " token"]:
    """Of rotations that have a common period, which are a closed curve; NaN of all other shapes."""
    if not fit.name.endswith("rotations"):
        return torch.full_like(fit.left, math.nan)
    noise = (fit.left / parts.energy.clamp_min(1e-300) / parts.window).sqrt()
    slip = (_SLIP + _SLIP_IN_NOISE * noise).clamp(max=_MOST_SLIP)
    periods = closed_periods(fit.numbers, parts.window, settings.least_periods, slip)
    return torch.where(fit.left <= settings.unexplained_noise * parts.energy, periods, math.nan)


def _first_return(
    parts: Components, row: int, displacement: Float[Tensor, " lag"], period: float, settings: DisplacementSettings
) -> int | None:
    """The period of a motion whose closest curve turns otherwise than the motion itself; None where it turns with it.

    A cycle that is still approached is followed most closely by a curve of several times its period, whose other
    harmonics follow the approach; and that of a few points by any curve that passes them in another order. The curve's
    first harmonic is weak then, and the motion is nearly back after a whole number of recurrences.
    """
    turn = torch.tensor([[2 * math.pi / period]], dtype=torch.float64)
    single = next(family for family in families(parts.window, settings.least_periods) if family.name == "orbit 1")
    energy = float(parts.energy[row])
    first = float(explained_energy(single, turn, parts.times, parts.scores[row : row + 1]))
    if first >= _FIRST * energy:
        return None
    far, went = 2 * energy / parts.window, False
    for lag, square in enumerate(displacement.tolist(), start=1):
        if lag >= (parts.window / settings.least_periods if period < _SPARSE else period):
            return None
        if went and square <= settings.unexplained_structure * far:
            return lag
        went = went or square >= far / 2
    return None


def _compared(
    parts: Components, noise: Noise, settings: DisplacementSettings, unresolved: Float[Tensor, " token"]
) -> tuple[list[Fit], Float[Tensor, "shape token"], Float[Tensor, " token"]]:
    """All fits, their costs, and how many directions the one of least cost leaves. Expensive shapes are fitted where
    cheaper ones do not explain a motion."""
    everywhere = torch.ones_like(parts.energy)
    fits = fit_shapes(parts, settings.least_periods, unresolved)
    # At first every recurrence counts as independent: how many do depends on the shape that is taken out.
    first = _costs(fits, parts, unresolved, everywhere).argmin(0)
    mixed = _may_be_modes(fits, first, parts, noise, settings)
    if len(mixed):
        fits += fit_modes(parts, mixed, fits, math.log(settings.growth))
        first = _costs(fits, parts, unresolved, everywhere).argmin(0)
    # What the first choice leaves says how many recurrences count as independent.
    rest = residuals(fits, first, parts, unresolved)
    cost = _costs(fits, parts, unresolved, rest.independent)
    small, step = _left_over(fits, parts, settings)
    best = cost.argmin(0)
    # What is explained as exactly as can be seen has nothing more to explain.
    exact = torch.stack([fit.left for fit in fits]).gather(0, best[None])[0] <= unresolved
    # A cycle of many points may be a curve that nearly closes after several rounds.
    explained = small.gather(0, best[None])[0] & torch.tensor([fit.name != "cycle" for fit in fits])[best]
    unexplained = ~explained & ~exact & (step.gather(0, best[None])[0] > noise.amplified(settings))
    if bool(unexplained.any()):
        usual = len(fits)
        fits += fit_curves(parts, unexplained.nonzero()[:, 0], settings.least_periods, settings.unexplained_structure)
        cost = _costs(fits, parts, unresolved, rest.independent)
        small, step = _left_over(fits, parts, settings)
        closed = torch.tensor([[fit.name == "cycle" or fit.name.startswith("orbit")] for fit in fits])
        closed = closed & (small | (step <= noise.rest(settings)))
        # The closed curve that leaves least of a motion is better than a likelier shape that does not explain it; and
        # one of many harmonics has to explain it.
        by_what_is_left = torch.where(closed, step.clamp_min(1e-300).log(), math.inf)
        cost = torch.where(unexplained & closed.any(0), by_what_is_left, cost)
        cost[usual:][~closed[usual:]] = math.inf
        best = cost.argmin(0)
    left = residuals(fits, best, parts, unresolved).directions
    return fits, cost, torch.where(best == first, rest.directions, left)


def _may_be_modes(
    fits: list[Fit], first: Tensor, parts: Components, noise: Noise, settings: DisplacementSettings
) -> Tensor:
    """Motions that shrink and that one mode explains in part, but that nothing simple explains."""
    left = torch.stack([fit.left for fit in fits]).gather(0, first[None])[0]
    simple = torch.tensor([fit.name in _SIMPLE for fit in fits])[first]
    simple = simple & ((2 * left / parts.window).sqrt() <= noise.rest(settings))
    one = torch.stack([fit.left for fit in fits if fit.name in SINGLE_MODES]).amin(0)
    shrinks = _shrinks(parts)
    may = _explainable(parts, _MODE_COLUMNS, noise, settings)
    return (may & shrinks & ~simple & (one <= _IN_PART * parts.energy)).nonzero()[:, 0]


def _shrinks(parts: Components) -> Tensor:
    steps = _squared_steps(parts)
    third = steps.shape[-1] // 3
    shrinks: Tensor = steps[:, :third].sum(-1) >= _SHRINKS * steps[:, -third:].sum(-1)
    return shrinks


def _speeds(parts: Components) -> Tensor:
    quarter = max(1, parts.window // 4)
    way = parts.scores[:, -quarter:].mean(1) - parts.scores[:, :quarter].mean(1)
    length: Tensor = torch.linalg.vector_norm(way, dim=-1)
    return length / (parts.window - quarter)


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
    # Two states that differ by noise are apart by twice its variance; each column takes a degree of freedom.
    step = (2 * left / (parts.window - 1 - columns).clamp_min(1.0)).sqrt()
    return left <= settings.unexplained_structure * parts.energy, step


def _costs(fits: list[Fit], parts: Components, unresolved: Tensor, independent: Tensor) -> Tensor:
    """(shape, token): the Bayesian information criterion for noise in as many directions as the noise takes, in each of
    which every column has a coefficient: twice the negative log likelihood, and the price of the coefficients."""
    # Below what is resolved all fits are equal, or the logarithm would choose between them by their last digits.
    left = torch.stack([torch.maximum(fit.left * _PENALTY.get(fit.name, 1.0), unresolved) for fit in fits])
    for place, fit in enumerate(fits):
        if fit.name.endswith("rotations"):
            left[place][~separate(fit.numbers, parts.window)] = math.inf
    columns = torch.stack([fit.columns for fit in fits])
    # A whole period is one of a few, and costs less than a number.
    numbers = torch.tensor([[0.0 if fit.family is None else fit.numbers.shape[-1]] for fit in fits], dtype=left.dtype)
    entries = (parts.window * independent * parts.noise_directions).clamp_min(2.0)
    return entries * left.log() + (columns * parts.noise_directions + numbers) * entries.log()
