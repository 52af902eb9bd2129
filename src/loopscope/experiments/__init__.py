"""Experiments over grids of models: which designs make cyclic fixed points."""

from loopscope.experiments.cells import architecture_of, run_cell
from loopscope.experiments.grid import run_grid
from loopscope.experiments.training import run_sweep
from loopscope.findings import (
    PAPER,
    Boundary,
    Reproduction,
    architecture_grid,
    boundaries,
    phase_grid,
    reproduction,
)

__all__ = [
    "PAPER",
    "Boundary",
    "Reproduction",
    "architecture_grid",
    "architecture_of",
    "boundaries",
    "phase_grid",
    "reproduction",
    "run_cell",
    "run_grid",
    "run_sweep",
]
