"""What a token's state tends to: verdicts with their evidence, and trajectories of known truth to calibrate them.

Nothing here needs a model: trajectories that another tool captured are judged as well.
"""

from loopscope.behaviour.calibration import Calibration, CaseScore, calibrate
from loopscope.behaviour.displacement import same_limit
from loopscope.behaviour.files import judge_files, load_trajectories
from loopscope.behaviour.judge import judge
from loopscope.behaviour.rounding import StateDtype, known_dtype, rounding_step
from loopscope.behaviour.sensitivity import COSINE_GRID, DISPLACEMENT_GRID, Grid, sensitivity
from loopscope.behaviour.settings import CosineSettings, DisplacementSettings, Method, parse_settings
from loopscope.behaviour.synthetic import CASES, LENGTHS, WIDTHS, Trajectory, generate, make_trajectory
from loopscope.behaviour.tail import tail_paths
from loopscope.verdicts import KINDS, JudgedFiles, JudgedTrajectory, Kind, Verdict

__all__ = [
    "CASES",
    "COSINE_GRID",
    "DISPLACEMENT_GRID",
    "KINDS",
    "LENGTHS",
    "WIDTHS",
    "Calibration",
    "CaseScore",
    "CosineSettings",
    "DisplacementSettings",
    "Grid",
    "JudgedFiles",
    "JudgedTrajectory",
    "Kind",
    "Method",
    "StateDtype",
    "Trajectory",
    "Verdict",
    "calibrate",
    "generate",
    "judge",
    "judge_files",
    "known_dtype",
    "load_trajectories",
    "make_trajectory",
    "parse_settings",
    "rounding_step",
    "same_limit",
    "sensitivity",
    "tail_paths",
]
