"""Figures for papers, drawn with matplotlib from a study or a comparison.

`write_figures` writes all that a study can support, with captions; each type is a function of its own as well, from a
study (or a comparison) to a matplotlib figure. Matplotlib comes with the extra `figures`.
"""

from loopscope.report.paper import _installed  # noqa: F401 - first, so that what is missing is said in a sentence
from loopscope.report.paper.compared import (
    compared_curves,
    compared_drift,
    compared_likeness,
    compared_measure,
    compared_stages,
)
from loopscope.report.paper.components import trajectories, trajectories_3d
from loopscope.report.paper.convergence import attention, direction, distance, horizons, norm, path_independence, step
from loopscope.report.paper.heads import head_change, head_sinks, heads_stable
from loopscope.report.paper.inference import massive_places, neurons, stages
from loopscope.report.paper.layouts import Layout
from loopscope.report.paper.maps import cycle_attention, cycle_residual, layer_cosine
from loopscope.report.paper.prompt_map import tokens
from loopscope.report.paper.readout import exit_gate, loss, prediction
from loopscope.report.paper.style import Format, Width, file_of
from loopscope.report.paper.write import CAPTIONS, FigureSet, figure_names, write_figures

__all__ = [
    "CAPTIONS",
    "FigureSet",
    "Format",
    "Layout",
    "Width",
    "attention",
    "compared_curves",
    "compared_drift",
    "compared_likeness",
    "compared_measure",
    "compared_stages",
    "cycle_attention",
    "cycle_residual",
    "direction",
    "distance",
    "exit_gate",
    "figure_names",
    "file_of",
    "head_change",
    "head_sinks",
    "heads_stable",
    "horizons",
    "layer_cosine",
    "loss",
    "massive_places",
    "neurons",
    "norm",
    "path_independence",
    "prediction",
    "stages",
    "step",
    "tokens",
    "trajectories",
    "trajectories_3d",
    "write_figures",
]
