"""Measures: what is read off the visits of a run.

The pure functions on arrays are public; the observers built of them are what `analyze` runs.
"""

from loopscope.map_codes import decode_maps, encode_maps
from loopscope.measures.attention import (
    SINK_THRESHOLD,
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
    uniform_causal_sink,
)
from loopscope.measures.base import Arrays, Frame, Measure, Named
from loopscope.measures.behaviour import CHANGES, VERDICT_NUMBERS, Behaviour, StateTails, behaviour_spans, can_be_judged
from loopscope.measures.convergence import LEVELS, Convergence
from loopscope.measures.depth import depth_of, depth_sites
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
from loopscope.measures.heads import CHANGE_NAMES, HEAD_NAMES, HeadMeasures
from loopscope.measures.horizon import HorizonStates
from loopscope.measures.maps import AttentionMaps, MapChoice, choose_maps, map_recurrences, map_sites, map_tokens
from loopscope.measures.neurons import KURTOSIS, neuron_moments, neuron_operations, neurons
from loopscope.measures.path import PathIndependence
from loopscope.measures.readout import (
    EXIT_READOUTS,
    TOKEN_READOUTS,
    Readout,
    kl_divergence,
    next_token_loss,
    readout_grid,
)
from loopscope.measures.similarity import AttentionCycle, CycleSimilarity, visit_labels
from loopscope.measures.stability import (
    EIGENVALUE_NAMES,
    KEPT_PAIRS,
    RATE_NAMES,
    RATE_REASONS,
    TokenStability,
    eigenvalue_products,
    replaced_at,
    study_criterion,
    study_eigenvalues,
)
from loopscope.measures.stages import (
    STAGE_NAMES,
    StageMeasures,
    massive_activation,
    massive_activation_place,
    relative_residual_entropy,
    residual_entropy,
)
from loopscope.measures.trajectories import Trajectories, principal_components

__all__ = [
    "CHANGES",
    "CHANGE_NAMES",
    "EIGENVALUE_NAMES",
    "EXIT_READOUTS",
    "HEAD_NAMES",
    "KEPT_PAIRS",
    "KURTOSIS",
    "LEVELS",
    "RATE_NAMES",
    "RATE_REASONS",
    "SINK_THRESHOLD",
    "STAGE_NAMES",
    "TOKEN_READOUTS",
    "VERDICT_NUMBERS",
    "Arrays",
    "AttentionCycle",
    "AttentionMaps",
    "Behaviour",
    "Convergence",
    "CycleSimilarity",
    "Frame",
    "HeadMeasures",
    "HorizonStates",
    "MapChoice",
    "Measure",
    "Named",
    "PathIndependence",
    "Readout",
    "StageMeasures",
    "StateTails",
    "TokenStability",
    "Trajectories",
    "attention_distance",
    "behaviour_spans",
    "can_be_judged",
    "choose_maps",
    "colsum_concentration",
    "cosine",
    "decode_maps",
    "degeneracy",
    "depth_of",
    "depth_sites",
    "distance",
    "eigenvalue_products",
    "encode_maps",
    "kl_divergence",
    "layer_cosine",
    "map_recurrences",
    "map_sites",
    "map_tokens",
    "massive_activation",
    "massive_activation_place",
    "mixing_score",
    "neuron_moments",
    "neuron_operations",
    "neurons",
    "next_token_loss",
    "noise_floor",
    "principal_components",
    "quantiles",
    "readout_grid",
    "relative_distance",
    "relative_mixing_score",
    "relative_residual_entropy",
    "replaced_at",
    "residual_entropy",
    "residual_norm",
    "row_entropy",
    "sink_rate",
    "sink_score",
    "sink_scores",
    "stable_from",
    "strongest_sink",
    "strongest_sink_position",
    "study_criterion",
    "study_eigenvalues",
    "uniform_causal_sink",
    "visit_labels",
]
