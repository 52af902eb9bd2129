"""The best member of a family of shapes for each motion: on the family's grid, then between its points."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.dynamics.trajectories.shapes import ShapeFamily, shape_columns

SPARE = 2
"""Components beside as many as a shape has columns that its numbers are fitted to: what it explains is in few."""
_CHUNK_ENTRIES = 2**20
"""Of projections at a time: 4 MiB in float32, which stay in the cache."""
_ITERATIONS = 12
"""At most. From a grid point the numbers are right to nine digits after four to eight."""
_TRIAL, _BEHIND = 2, 10.0
"""After this many more, what leaves this many times as much as another shape is given up."""
_CONVERGED = 1e-6
"""Of what is left: an iteration that gains less is the last."""
_RESOLVED = 1e-15
"""Of the energy: gains below are rounding."""
_DAMPING = 1e-3
"""To begin with, relative to the diagonal of the normal equations; Levenberg's and Marquardt's."""
_UNDAMPED = 1e-9
"""What a full step would gain is asked with this damping, which keeps equal columns apart."""
_HOPELESS = 100.0
"""Damping from which on steps are too short to matter."""


def best_on_grid(
    family: ShapeFamily, times: Float[Tensor, " time"], scores: Float[Tensor, "motion time component"]
) -> tuple[Float[Tensor, "motion number"], Float[Tensor, " motion"]]:
    """Numbers of the grid's member that explains most of each motion, and the sum of squares that it explains.

    In float32, which tells neighbours on a grid apart.
    """
    flat = _grid_basis(family, float(times[0]), len(times))
    scores = scores[..., -family.columns - SPARE :]
    candidates, columns, components = len(family.grid), family.columns, scores.shape[-1]
    # Energies of motions near the rounding of float64 are no float32 numbers.
    largest = scores.abs().amax((1, 2), keepdim=True).clamp_min(1e-300)
    single = (scores / largest).float().permute(1, 2, 0)
    explained, places = [], []
    for some in single.split(max(1, _CHUNK_ENTRIES // (candidates * columns * components)), dim=2):
        projected = (flat @ some.reshape(len(times), -1)).square_()
        # Motions last, so that what is added up lies side by side: otherwise sums take longer than products.
        best = projected.view(candidates, columns * components, -1).sum(1).max(0)
        explained.append(best.values)
        places.append(best.indices)
    return family.grid[torch.cat(places)], torch.cat(explained).double() * largest[:, 0, 0].square()


@lru_cache(maxsize=256)
def _grid_basis(family: ShapeFamily, first: float, window: int) -> Tensor:
    """Every column of every member on the grid, (member and column, time): the same for all tokens of a tail."""
    times = torch.arange(first, first + window, dtype=torch.float64)
    basis = shape_columns(family, family.grid, times)
    return basis.permute(0, 2, 1).reshape(-1, window).float()


def narrow(
    family: ShapeFamily,
    times: Float[Tensor, " time"],
    scores: Float[Tensor, "motion time component"],
    numbers: Float[Tensor, "motion number"],
    iterations: int = _ITERATIONS,
    rivals: Float[Tensor, " motion"] | None = None,
) -> Float[Tensor, "motion number"]:
    """The numbers nearby that explain most of each motion.

    `rivals` are the sums of squares that other shapes leave: where far more is left after some iterations, that is
    enough.

    Least squares in the numbers, the coefficients being those of the projection (variable projection: Golub and
    Pereyra 1973, with the derivative of the residual as Kaufman 1975 shortens it), by Levenberg-Marquardt steps.
    """
    best, value = numbers.clone(), torch.full((len(numbers),), -torch.inf, dtype=scores.dtype)
    active = torch.arange(len(numbers))
    damping = torch.full((len(numbers),), _DAMPING, dtype=scores.dtype)
    energy = scores.square().sum((-1, -2))
    tried, gradient = numbers, torch.zeros_like(numbers)
    normal = torch.zeros(*numbers.shape, numbers.shape[-1], dtype=scores.dtype)
    for iteration in range(iterations):
        if not len(active):
            break
        found, slope, square = _linearised(family, times, scores[active], tried)
        gain = found - value[active]
        better = gain > 0
        kept = active[better]
        best[kept], value[kept] = tried[better], found[better]
        gradient[kept], normal[kept] = slope[better], square[better]
        damping[active] = torch.where(better, damping[active] / 8, damping[active] * 8)
        left = energy - value
        enough = _CONVERGED * left + _RESOLVED * energy
        # A step that gained nothing is tried again, shorter, unless it was already too small to matter.
        active = active[(gain.abs() > enough[active]) & (damping[active] < _HOPELESS)]
        if rivals is not None and iteration >= _TRIAL:
            active = active[left[active] <= _BEHIND * rivals[active]]
        tried, promised = _step(family, best[active], gradient[active], normal[active], damping[active])
        worth = promised > enough[active]
        active, tried = active[worth], tried[worth]
    return best


def _step(
    family: ShapeFamily, numbers: Tensor, gradient: Tensor, normal: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor]:
    """Where to look next, and what the linearised problem promises of a step that is not damped."""
    # What is at its bound and would go beyond stays there.
    free = ~((numbers <= family.low) & (gradient < 0) | (numbers >= family.high) & (gradient > 0))
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    gradient, normal = gradient * free, normal * free[..., None] * free[..., None, :] + (~free).double().diag_embed()
    ridge = torch.stack((damping, torch.full_like(damping, _UNDAMPED)))[..., None] * diagonal + 1e-300
    sides = gradient.expand_as(ridge)[..., None]
    moved, full = torch.linalg.solve_ex(normal + ridge.diag_embed(), sides)[0][..., 0].nan_to_num(0.0, 0.0, 0.0)
    reach = torch.maximum(4 * family.step, numbers.abs() / 2)
    return (numbers + moved.clamp(-reach, reach)).clamp(family.low, family.high), (gradient * full).sum(-1)


def _linearised(family: ShapeFamily, times: Tensor, scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The energy explained, half its gradient in the numbers, and the normal equations' matrix."""
    columns, changes = (each - each.mean(-2, keepdim=True) for each in family.design(numbers, times))
    basis, upper = torch.linalg.qr(columns)
    projected = basis.mT @ scores
    coefficients = torch.linalg.solve_triangular(upper, projected, upper=True).nan_to_num(0.0, 0.0, 0.0)
    moved = (changes.flatten(1, 2) @ coefficients).unflatten(1, changes.shape[1:3])
    across, along = basis[:, None], (basis.mT[:, None] @ moved)
    ways = (moved - across @ along).flatten(2)
    slope = (ways @ (scores - basis @ projected).flatten(1)[..., None])[..., 0]
    return projected.square().sum((-1, -2)), slope, ways @ ways.mT
