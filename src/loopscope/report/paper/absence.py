"""Why a figure cannot be drawn from a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from loopscope.study import Readings

_PARTS: Mapping[str, tuple[str, ...]] = {
    "path-independence": ("path_distance", "path_cosine"),
    "cycle-similarity": ("cycle_similarity", "attention_cycle_distance"),
    "trajectories": ("trajectory",),
    "readout": ("loss", "token_top1", "token_kl_to_last"),
    "heads": (
        "attention_change",
        "attention_distance_to_horizon",
        "attention_cycle_distance",
        "head_stable_from",
        "colsum_concentration",
        "sink_score",
    ),
    "stages": ("mean_token_norm", "massive_token", "massive_dimension"),
    "neurons": ("prediction_neurons", "suppression_neurons"),
}
"""Variables by the part of an analysis that measures them, as `--skip` names it."""

_OTHERWISE = {
    "exit_probability": "the model has no exit gate",
    "path_distance": "the model cannot be started from another initial state",
    "prediction_neurons": "neurons were not counted (a model watched from outside, or a count over --neuron-limit)",
}


def why_absent(readings: Readings, variables: Sequence[str], *, loops: bool) -> str | None:
    """The reason for which the study cannot give a figure its variables; None if it can.

    `loops`: the figure is about recurrences.
    """
    if loops and not readings.view.looped:
        return "a feed-forward model has no recurrences"
    skipped = readings.manifest["settings"].get("skip", ())
    for name in variables:
        if name not in readings.shown:
            for part in skipped:
                if name in _PARTS.get(part, ()):
                    return f"the analysis was told to leave it out (--skip {part})"
            return _OTHERWISE.get(name, f"the study has no variable {name}")
        values = readings.shown[name].values
        if values.dtype.kind == "f" and not np.isfinite(values).any():
            return f"{name} is nowhere finite in this study"
    return None
