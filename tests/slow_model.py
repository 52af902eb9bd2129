"""The looped transformer once more, as plainly as it can be said: numpy, float64, one prompt, loops over everything.

It shares no code with the package but the description of a model (`Architecture`), and the names of its parameters.
Each formula is the one in the documentation of `Architecture`, not a translation of the package's code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from loopscope.models.architecture import Architecture, LinearScaling, Llama3Scaling, YarnScaling

__all__ = ["SlowRun", "run_slowly"]

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]
Site = tuple[str, int, int]


@dataclass
class SlowRun:
    """Everything that was computed on the way: (token, width) states and (head, query, key) maps."""

    residual: dict[Site, Array] = field(default_factory=dict)
    attention: dict[Site, Array] = field(default_factory=dict)
    injected: list[Array] = field(default_factory=list)
    loop_state: list[Array] = field(default_factory=list)
    gate: list[Array] = field(default_factory=list)
    logits: Array = field(default_factory=lambda: np.zeros((0, 0)))


def run_slowly(
    architecture: Architecture,
    weights: Weights,
    tokens: Sequence[int],
    recurrences: int,
    initial_state: Array | None = None,
) -> SlowRun:
    """One prompt through the whole model; the state starts as the prelude's output unless it is given."""
    run = SlowRun()
    final_norm = weights["norm.weight"]

    before = {"prelude": 0, "recurrent": architecture.prelude, "coda": architecture.prelude + architecture.recurrent}

    def stage(name: str, layers: int, x: Array, recurrence: int) -> Array:
        for index in range(layers):
            full = before[name] + index in architecture.full_attention_layers
            window = len(x) if full or architecture.sliding_window is None else architecture.sliding_window
            x, maps = _layer(x, _below(weights, f"{name}.{index}."), architecture, window)
            run.residual[name, index, recurrence] = x
            run.attention[name, index, recurrence] = maps
        return x

    embedding = weights["embedding.weight"]
    encoded = stage("prelude", architecture.prelude, embedding[list(tokens)] * architecture.embedding_scale, 0)
    state = encoded if initial_state is None else initial_state
    for recurrence in range(recurrences if architecture.recurrent else 0):
        if architecture.injection == "add":
            state = state + encoded
        elif architecture.injection == "linear":
            state = np.concatenate([state, encoded], axis=1) @ weights["injection.weight"].T
        run.injected.append(state)
        state = stage("recurrent", architecture.recurrent, state, recurrence + 1)
        if architecture.loop_norm == "recurrence":
            state = _rms_norm(state, final_norm, architecture.norm_eps)
        run.loop_state.append(state)
        if architecture.exit_gate:
            run.gate.append(state @ weights["exit_gate.weight"][0] + weights["exit_gate.bias"][0])
    if architecture.exit_gate:
        state = _stopped(run, architecture.exit_threshold)
    if architecture.loop_norm == "loop":
        state = _rms_norm(state, final_norm, architecture.norm_eps)
    hidden = stage("coda", architecture.coda, state, 0)
    if architecture.loop_norm != "recurrence" or architecture.coda > 0:
        hidden = _rms_norm(hidden, final_norm, architecture.norm_eps)
    run.logits = hidden @ (embedding if architecture.tied_embeddings else weights["head.weight"]).T
    return run


def _stopped(run: SlowRun, threshold: float) -> Array:
    """Each token's state at the recurrence where it stops."""
    last = len(run.loop_state) - 1
    rows = []
    for token in range(len(run.loop_state[0])):
        cumulated, going, answer = 0.0, 1.0, last
        for recurrence in range(last):
            stop = 1 / (1 + math.exp(-run.gate[recurrence][token]))
            cumulated += going * stop
            going *= 1 - stop
            if cumulated >= threshold:
                answer = recurrence
                break
        rows.append(run.loop_state[answer][token])
    return np.array(rows)


def _layer(x: Array, weights: Weights, architecture: Architecture, window: int) -> tuple[Array, Array]:
    def norm(number: int, values: Array) -> Array:
        return _rms_norm(values, weights[f"norm_{number}.weight"], architecture.norm_eps)

    def attention(values: Array) -> tuple[Array, Array]:
        return _attention(values, _below(weights, "attention."), architecture, window)

    def mlp(values: Array) -> Array:
        return _mlp(values, _below(weights, "mlp."), architecture)

    if architecture.norm_placement == "pre":
        branch, maps = attention(norm(1, x))
        x = x + branch
        return x + mlp(norm(3, x)), maps
    if architecture.norm_placement == "residual":
        branch, maps = attention(norm(1, x))
        x = norm(2, x + branch)
        return norm(4, x + mlp(norm(3, x))), maps
    if architecture.norm_placement == "branch-in-out":
        branch, maps = attention(norm(1, x))
        x = x + norm(2, branch)
        return x + norm(4, mlp(norm(3, x))), maps
    branch, maps = attention(x)
    x = x + norm(2, branch)
    return x + norm(4, mlp(x)), maps


def _attention(x: Array, weights: Weights, architecture: Architecture, window: int) -> tuple[Array, Array]:
    count, dim = len(x), architecture.head_dim
    query = _prepared("query", x, weights, architecture, architecture.heads)
    key = _prepared("key", x, weights, architecture, architecture.kv_heads)
    value = (x @ weights["value.weight"].T).reshape(count, architecture.kv_heads, dim)
    maps = np.zeros((architecture.heads, count, count))
    mixed = np.zeros((count, architecture.heads, dim))
    for head in range(architecture.heads):
        group = head // (architecture.heads // architecture.kv_heads)
        for i in range(count):
            seen = range(max(0, i - window + 1), i + 1)
            scores = [float(query[i, head] @ key[j, group]) / math.sqrt(dim) for j in seen]
            largest = max(scores)
            exponentials = [math.exp(score - largest) for score in scores]
            for j, exponential in zip(seen, exponentials, strict=True):
                maps[head, i, j] = exponential / sum(exponentials)
                mixed[i, head] += maps[head, i, j] * value[j, group]
    return mixed.reshape(count, -1) @ weights["output.weight"].T, maps


def _prepared(name: str, x: Array, weights: Weights, architecture: Architecture, heads: int) -> Array:
    """Queries or keys, (token, head, head_dim): projected, normalised, biased, rotated."""
    dim = architecture.head_dim
    wide = x @ weights[f"{name}.weight"].T
    if architecture.qk_norm == "full":
        wide = _rms_norm(wide, weights[f"{name}_norm.weight"], architecture.norm_eps)
    split = wide.reshape(len(x), heads, dim)
    if architecture.qk_norm == "head":
        split = _rms_norm(split, weights[f"{name}_norm.weight"], architecture.norm_eps)
    if architecture.qk_bias:
        split = split + weights[f"{name}_bias"].reshape(heads, dim)
    if architecture.rotary == "none":
        return split
    rotated = split.copy()
    scaling = architecture.rope_scaling
    gain = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    for pair in range(dim // 2):
        a, b = (pair, pair + dim // 2) if architecture.rotary == "halves" else (2 * pair, 2 * pair + 1)
        frequency = _frequency(pair, architecture)
        for position in range(len(x)):
            turn = gain * np.exp(1j * position * frequency) * (split[position, :, a] + 1j * split[position, :, b])
            rotated[position, :, a], rotated[position, :, b] = turn.real, turn.imag
    return rotated


def _frequency(pair: int, architecture: Architecture) -> float:
    """Radians per position."""
    frequency = float(architecture.rope_base ** (-2 * pair / architecture.head_dim))
    scaling = architecture.rope_scaling
    if isinstance(scaling, Llama3Scaling):
        return _llama3(frequency, scaling)
    if isinstance(scaling, LinearScaling):
        return frequency / scaling.factor
    if isinstance(scaling, YarnScaling):
        return frequency * _yarn(pair, architecture, scaling)
    return frequency


def _yarn(pair: int, architecture: Architecture, scaling: YarnScaling) -> float:
    """1 for pairs before the one that turns beta_fast times in the original context, 1 / factor for those after the
    one that turns beta_slow times, and a straight line in the number of the pair between them.
    """
    ends = []
    for turns in (scaling.beta_fast, scaling.beta_slow):
        radians = 2 * math.pi * turns / scaling.original_max_positions  # per position: base^(-2 end / dim)
        ends.append(-architecture.head_dim / 2 * math.log(radians) / math.log(architecture.rope_base))
    if scaling.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    stretched = min(max((pair - max(ends[0], 0)) / (ends[1] - max(ends[0], 0)), 0.0), 1.0)
    return (1 - stretched) + stretched / scaling.factor


def _llama3(frequency: float, scaling: Llama3Scaling) -> float:
    """By wavelength: short waves stay, long ones are stretched by the factor, between the two is a linear passage."""
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_positions / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_positions / scaling.low_freq_factor:
        return frequency / scaling.factor
    kept = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - kept) * frequency / scaling.factor + kept * frequency


def _mlp(x: Array, weights: Weights, architecture: Architecture) -> Array:
    up = x @ weights["up.weight"].T
    if architecture.mlp == "gated":
        return (_activate(x @ weights["gate.weight"].T, architecture) * up) @ weights["down.weight"].T
    return _activate(up, architecture) @ weights["down.weight"].T


def _activate(x: Array, architecture: Architecture) -> Array:
    def one(z: float) -> float:
        if architecture.activation == "silu":
            return z / (1 + math.exp(-z))
        if architecture.activation == "gelu":
            return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))
        if architecture.activation == "gelu-tanh":
            return 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return max(z, 0.0)

    return np.array([[one(float(z)) for z in row] for row in x])


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight, dtype=np.float64)


def _below(weights: Weights, prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
