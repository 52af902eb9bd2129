"""How the kinds of a method depend on two of its settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from loopscope.dynamics.trajectories.judge import judge_by_all
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.settings import CosineSettings, Settings
from loopscope.dynamics.verdicts import KINDS, Verdict
from loopscope.models.inspection.facts import Dtype


@dataclass(frozen=True, slots=True)
class Grid:
    """Two settings of a method and the values that they are given; the defaults lie in the middle."""

    names: tuple[str, str]
    values: tuple[tuple[float, ...], tuple[float, ...]]


DISPLACEMENT_GRID = Grid(
    ("floor_factor", "unexplained"), ((7.5, 15.0, 30.0, 60.0, 120.0), (0.0125, 0.025, 0.05, 0.1, 0.2))
)
COSINE_GRID = Grid(("tau", "rho"), ((0.005, 0.02, 0.05, 0.1, 0.2), (0.5, 0.75, 0.9, 0.95, 1.0)))


def judge_over_grid(
    states: Float[Tensor, "token recurrence width"],
    dtype: Dtype,
    settings: Settings,
    first_recurrence: int = 1,
    noise: Noise | None = None,
) -> tuple[list[Verdict], Int64[np.ndarray, "token first second"]]:
    """A verdict for each trajectory, and its kind, as its place in `KINDS`, for every pair of values of the method's
    grid. All other settings are as given."""
    grid = COSINE_GRID if isinstance(settings, CosineSettings) else DISPLACEMENT_GRID
    # Where noise was measured, no multiple of the rounding decides.
    measured = noise is not None and grid is DISPLACEMENT_GRID and not noise.floor.isnan().any()
    rows = grid.values[0][:1] if measured else grid.values[0]
    others: list[Settings] = []
    for pair in ((first, second) for first in rows for second in grid.values[1]):
        changes: dict[str, Any] = dict(zip(grid.names, pair, strict=True))
        others.append(dataclasses.replace(settings, **changes))
    verdicts, kinds = judge_by_all(
        states, dtype, settings, others, first_recurrence=first_recurrence, check_order=False, noise=noise
    )
    codes = np.array([[KINDS.index(kind) for kind in its] for its in kinds], dtype=np.int64)
    found = codes.T.reshape(len(verdicts), len(rows), len(grid.values[1]))
    return verdicts, np.broadcast_to(found, (len(verdicts), *map(len, grid.values))).copy()
