"""How the shares of the classes depend on a method's thresholds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from loopscope.behaviour.cosine import cosine_kinds, measure_turns
from loopscope.behaviour.displacement import decide_kind, measure_tails
from loopscope.behaviour.rounding import StateDtype
from loopscope.behaviour.settings import CosineSettings, DisplacementSettings
from loopscope.verdicts import KINDS, Kind

__all__ = ["COSINE_GRID", "DISPLACEMENT_GRID", "Grid", "sensitivity"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Two settings of a method and the values that they are given; the defaults lie in the middle."""

    names: tuple[str, str]
    values: tuple[tuple[float, ...], tuple[float, ...]]


DISPLACEMENT_GRID = Grid(
    ("floor_factor", "unexplained"), ((7.5, 15.0, 30.0, 60.0, 120.0), (0.0125, 0.025, 0.05, 0.1, 0.2))
)
COSINE_GRID = Grid(("tau", "rho"), ((0.005, 0.02, 0.05, 0.1, 0.2), (0.5, 0.75, 0.9, 0.95, 1.0)))


def sensitivity(
    states: Tensor, dtype: StateDtype, settings: DisplacementSettings | CosineSettings, first_recurrence: int = 0
) -> Int64[np.ndarray, "token first second"]:
    """The kind of each of some finite trajectories (token, recurrence, width), as its place in `KINDS`, for every pair
    of values of the method's grid. All other settings are as given."""
    grid = COSINE_GRID if isinstance(settings, CosineSettings) else DISPLACEMENT_GRID
    changed = [[_changed(settings, grid, (first, second)) for second in grid.values[1]] for first in grid.values[0]]
    found = np.empty((len(states), len(grid.values[0]), len(grid.values[1])), dtype=np.int64)
    decide = _decider(states, dtype, settings, [each for row in changed for each in row], first_recurrence)
    for row, settings_row in enumerate(changed):
        for column, each in enumerate(settings_row):
            found[:, row, column] = [KINDS.index(kind) for kind in decide(each)]
    return found


def _decider(
    states: Tensor,
    dtype: StateDtype,
    settings: DisplacementSettings | CosineSettings,
    others: list[Any],
    first_recurrence: int,
) -> Callable[[Any], list[Kind]]:
    """From settings to kinds; what does not depend on the thresholds is measured once."""
    if isinstance(settings, CosineSettings):
        return partial(cosine_kinds, measure_turns(states, settings))
    motions = measure_tails(states, dtype, settings, first_recurrence, others=others)
    return lambda changed: [decide_kind(motion, changed) for motion in motions]


def _changed(
    settings: DisplacementSettings | CosineSettings, grid: Grid, pair: tuple[float, float]
) -> DisplacementSettings | CosineSettings:
    changes: dict[str, Any] = dict(zip(grid.names, pair, strict=True))
    return dataclasses.replace(settings, **changes)
