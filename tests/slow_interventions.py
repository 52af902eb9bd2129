"""A looped transformer under interventions, as plainly as it can be said: numpy, float64, one prompt.

The changes are plain numbers and functions rather than the package's interventions, so that these are tested from
their text on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loopscope.models.architecture import Architecture
from slow_model import Array, SlowRun, Weights, _attention, _below, _mlp, _rms_norm

__all__ = ["Changes", "run_changed"]

Place = tuple[str, str, int, int]
"""Branch, stage, layer, recurrence."""


@dataclass
class Changes:
    factors: Mapping[Place, float] = field(default_factory=dict)
    """On what a branch adds to the residual stream."""
    eta: float = 1.0
    freeze_at: int | None = None
    replace: Callable[[int, Array], Array] = lambda recurrence, state: state
    """The state as a recurrence receives it."""


def run_changed(
    architecture: Architecture,
    weights: Weights,
    tokens: Sequence[int],
    recurrences: int,
    initial_state: Array | None,
    changes: Changes,
) -> SlowRun:
    """One prompt through the changed model; the state starts as the prelude's output unless it is given."""
    run = SlowRun()
    final_norm = weights["norm.weight"]

    def stage(name: str, layers: int, x: Array, recurrence: int) -> Array:
        for index in range(layers):
            x = _changed_layer(x, weights, architecture, (name, index, recurrence), changes)
            run.residual[name, index, recurrence] = x
        return x

    encoded = stage("prelude", architecture.prelude, weights["embedding.weight"][list(tokens)], 0)
    state = encoded if initial_state is None else initial_state
    for recurrence in range(1, recurrences + 1):
        received = changes.replace(recurrence, state.copy())
        mixed = received
        if architecture.injection == "add":
            mixed = received + encoded
        elif architecture.injection == "linear":
            mixed = np.concatenate([received, encoded], axis=1) @ weights["injection.weight"].T
        if changes.freeze_at is not None and recurrence > changes.freeze_at:
            mixed = run.injected[changes.freeze_at - 1]
        run.injected.append(mixed)
        made = stage("recurrent", architecture.recurrent, mixed, recurrence)
        if architecture.loop_norm == "recurrence":
            made = _rms_norm(made, final_norm, architecture.norm_eps)
        state = (1 - changes.eta) * received + changes.eta * made
        run.loop_state.append(state)
    if architecture.loop_norm == "loop":
        state = _rms_norm(state, final_norm, architecture.norm_eps)
    hidden = stage("coda", architecture.coda, state, 0)
    if architecture.loop_norm != "recurrence" or architecture.coda > 0:
        hidden = _rms_norm(hidden, final_norm, architecture.norm_eps)
    head = weights["embedding.weight"] if architecture.tied_embeddings else weights["head.weight"]
    run.logits = hidden @ head.T
    return run


def _changed_layer(
    x: Array, weights: Weights, architecture: Architecture, site: tuple[str, int, int], changes: Changes
) -> Array:
    """Norms that are not there are neutral: before a branch, after it, or on the residual stream."""
    stage, index, recurrence = site
    own = _below(weights, f"{stage}.{index}.")
    for branch, before, after in (("attention", 1, 2), ("mlp", 3, 4)):
        factor = changes.factors.get((branch, stage, index, recurrence), 1.0)

        def norm(number: int, values: Array) -> Array:
            name = f"norm_{number}.weight"
            return _rms_norm(values, own[name], architecture.norm_eps) if name in own else values

        values = norm(before, x)
        if branch == "attention":
            output, _ = _attention(values, _below(own, "attention."), architecture, len(x))
        else:
            output = _mlp(values, _below(own, "mlp."), architecture)
        if architecture.norm_placement == "residual":
            x = norm(after, x + factor * output)
        else:
            x = x + factor * norm(after, output)
    return x
