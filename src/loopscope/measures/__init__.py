"""Measures: what is read off the visits of a run.

The pure functions on arrays are public; the observers built of them are what `analyze` runs.
"""

from loopscope._util.map_codes import decode_maps
from loopscope._util.sinks import uniform_causal_sink
from loopscope.measures.attention import (
    attention_distance,
    colsum_concentration,
    mixing_score,
    relative_mixing_score,
    row_entropy,
    sink_rate,
    sink_score,
    sink_scores,
    stable_from,
    strongest_sink,
    strongest_sink_position,
)
from loopscope.measures.base import BatchInfo, Measure, Needs, Variable, variable
from loopscope.measures.functions import (
    cosine,
    cosine_distance,
    degeneracy,
    distance,
    layer_cosine,
    relative_distance,
    residual_norm,
)
from loopscope.measures.neurons import neuron_moments
from loopscope.measures.readout import kl_divergence, next_token_loss
from loopscope.measures.stages import (
    massive_activation,
    massive_activation_place,
    relative_residual_entropy,
    residual_entropy,
)
from loopscope.measures.trajectories import principal_components

__all__ = [
    "BatchInfo",
    "Measure",
    "Needs",
    "Variable",
    "attention_distance",
    "colsum_concentration",
    "cosine",
    "cosine_distance",
    "decode_maps",
    "degeneracy",
    "distance",
    "kl_divergence",
    "layer_cosine",
    "massive_activation",
    "massive_activation_place",
    "mixing_score",
    "neuron_moments",
    "next_token_loss",
    "principal_components",
    "relative_distance",
    "relative_mixing_score",
    "relative_residual_entropy",
    "residual_entropy",
    "residual_norm",
    "row_entropy",
    "sink_rate",
    "sink_score",
    "sink_scores",
    "stable_from",
    "strongest_sink",
    "strongest_sink_position",
    "uniform_causal_sink",
    "variable",
]
