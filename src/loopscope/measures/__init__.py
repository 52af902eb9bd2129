"""Measures: what is read off the visits of a run.

The pure functions on arrays are public; the observers built of them are what `analyze` runs.
"""

from loopscope.measures.base import Arrays, Frame, Measure, Named
from loopscope.measures.convergence import LEVELS, Convergence
from loopscope.measures.floor import noise_floor
from loopscope.measures.functions import (
    cosine,
    degeneracy,
    distance,
    layer_cosine,
    quantiles,
    relative_distance,
    residual_norm,
)
from loopscope.measures.horizon import HorizonStates
from loopscope.measures.path import PathIndependence
from loopscope.measures.readout import Readout, next_token_loss, readout_grid
from loopscope.measures.similarity import CycleSimilarity, visit_labels
from loopscope.measures.trajectories import Trajectories, principal_components

__all__ = [
    "LEVELS",
    "Arrays",
    "Convergence",
    "CycleSimilarity",
    "Frame",
    "HorizonStates",
    "Measure",
    "Named",
    "PathIndependence",
    "Readout",
    "Trajectories",
    "cosine",
    "degeneracy",
    "distance",
    "layer_cosine",
    "next_token_loss",
    "noise_floor",
    "principal_components",
    "quantiles",
    "readout_grid",
    "relative_distance",
    "residual_norm",
    "visit_labels",
]
