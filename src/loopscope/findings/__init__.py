"""What the results of experiments say, computed from their files alone; without torch, so that reports can read it."""

from loopscope.findings.architectures import PAPER, Reproduction, architecture_grid, reproduction
from loopscope.findings.load import Experiment, load_experiment
from loopscope.findings.phase import Boundary, boundaries, phase_grid
from loopscope.findings.training import (
    DesignSummary,
    advice,
    control_results,
    summaries,
)

__all__ = [
    "PAPER",
    "Boundary",
    "DesignSummary",
    "Experiment",
    "Reproduction",
    "advice",
    "architecture_grid",
    "boundaries",
    "control_results",
    "load_experiment",
    "phase_grid",
    "reproduction",
    "summaries",
]
