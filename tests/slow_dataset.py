"""A study's variables by the formulas of docs/study.md, one prompt and one state at a time, in plain numpy.

Slow, without batches, padding, passes or shards: every state of a prompt that was run alone lies in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray
from numpy.typing import NDArray

from loopscope import Trace, capture
from loopscope.analysis.settings import AnalyzeSettings
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch
from loopscope.models.visits import QueryKeyAttention

Array = NDArray[np.float64]
Named = tuple[tuple[str, ...], Array]

LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


def slow_dataset(subject: NativeSubject, prompts: Sequence[Sequence[int]], settings: AnalyzeSettings) -> xarray.Dataset:
    """All variables but `noise_floor`, which no trace can show."""
    found = [_of_prompt(subject, list(prompt), settings) for prompt in prompts]
    longest = max(len(prompt) for prompt in prompts)
    variables: dict[str, Named] = {}
    for name, (dims, _) in found[0].items():
        padded = [_padded(prompt[name][1], dims, longest) for prompt in found]
        if "token" in dims:
            variables[name] = ((*dims[:-1], "prompt", "token"), np.stack(padded, axis=-2))
        else:
            variables[name] = ((*dims, "prompt"), np.stack(padded, axis=-1))
    for name in ("cycle_similarity", "attention_cycle_distance"):
        dims, values = variables[name]
        variables[name] = (dims[:-1], values.mean(-1))
    variables |= _trajectories(subject, prompts, settings)
    variables |= _neurons(subject)
    variables |= _maps(subject, prompts, settings)
    return xarray.Dataset(variables)


def _padded(values: Array, dims: tuple[str, ...], longest: int) -> Array:
    if "token" not in dims:
        return values
    missing = longest - values.shape[-1]
    empty = -1 if values.dtype.kind == "i" else np.nan
    return np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, missing)], constant_values=empty)


def _of_prompt(subject: NativeSubject, prompt: list[int], settings: AnalyzeSettings) -> dict[str, Named]:
    looped = subject.info.is_looped
    states = _States.of(subject, prompt, settings) if looped else None
    found = _whole_depth(subject, prompt, settings)
    counts = _readout(subject, settings) if looped else [None]
    found |= _attention_and_stages(subject, prompt, settings)
    full = _full_run(subject, settings) if looped else 0
    found |= _readouts(subject, prompt, counts, full, settings.seed)
    if subject.info.exit_threshold is not None:
        found |= _exits(subject, prompt, settings)
    found["token_count"] = ((), np.array(float(len(prompt))))
    found["diverged_at"] = ((), np.array(-1.0))
    if states is not None:
        found |= _steps_and_distances(states, settings)
        found |= _at_the_horizons(states, settings)
        found |= _paths(subject, prompt, states, settings)
        found |= _layer_readouts(subject, prompt, settings)
    return found


@dataclass(frozen=True)
class _States:
    """Of one prompt."""

    layers: Array
    """X, (recurrence, layer, token, width)."""
    carried: Array
    """Loop states, (recurrence + 1, token, width), the initial one first."""

    @classmethod
    def of(cls, subject: NativeSubject, prompt: list[int], settings: AnalyzeSettings) -> _States:
        steps = max(settings.recurrences, 2 * settings.horizon)
        trace = capture(subject, prompt, recurrences=steps, seed=settings.seed)
        layers = range(subject.info.recurrent)
        outputs = [[_array(trace.residual("recurrent", layer, t + 1)) for layer in layers] for t in range(steps)]
        carried = [_array(trace.initial_state), *(_array(trace.loop_state(t + 1)) for t in range(steps))]
        return cls(np.array(outputs), np.array(carried))


def _array(states: torch.Tensor) -> Array:
    return states[0].double().numpy()


def _norm(x: Array) -> Array:
    return np.asarray(np.sqrt((x * x).sum(-1)))


def _cosine(x: Array, y: Array) -> Array:
    return np.asarray((x * y).sum(-1) / (_norm(x) * _norm(y)))


def _cosine_distance(x: Array, y: Array) -> Array:
    return _norm(x / _norm(x)[..., None] - y / _norm(y)[..., None]) ** 2 / 2


def _compared(site: Array, before: Array | None, settings: AnalyzeSettings) -> dict[str, Array]:
    """(recurrence, token) for the states of one site, (recurrence, token, width); `before` them is another state."""
    first, second = site[settings.horizon - 1], site[2 * settings.horizon - 1]
    nothing = np.full_like(first, np.nan) if before is None else before
    now = site[: settings.recurrences]
    previous = np.concatenate([nothing[None], site[: settings.recurrences - 1]])
    return {
        "successive_difference": _norm(now - previous),
        "relative_step": _norm(now - previous) / _norm(now),
        "cosine_distance_to_previous": _cosine_distance(now, previous),
        "distance_to_horizon": _norm(now - first),
        "relative_distance": _norm(now - first) / _norm(first),
        "cosine_distance_to_horizon": _cosine_distance(now, first[None]),
        "distance_to_second_horizon": _norm(now - second),
        "relative_distance_second_horizon": _norm(now - second) / _norm(second),
        "cosine_distance_to_second_horizon": _cosine_distance(now, second[None]),
        "residual_norm": _norm(now),
    }


def _steps_and_distances(states: _States, settings: AnalyzeSettings) -> dict[str, Named]:
    by_layer = [_compared(states.layers[:, layer], None, settings) for layer in range(states.layers.shape[1])]
    found: dict[str, Named] = {}
    for name in by_layer[0]:
        values = np.array([layer[name] for layer in by_layer])
        found[name] = (("layer", "recurrence"), values.mean(-1))
        quantiles = np.full((len(LEVELS), *values.shape[:2]), np.nan)
        for place in np.ndindex(values.shape[:2]):
            quantiles[(slice(None), *place)] = np.quantile(values[place], LEVELS)
        found[f"{name}_quantile"] = (("quantile", "layer", "recurrence"), quantiles)
    norm = found["residual_norm"][1]
    found["norm_growth"] = (("layer", "recurrence"), norm / norm[:, :1])
    loop_state = _compared(states.carried[1:], states.carried[0], settings)
    for name in by_layer[0]:
        if name not in ("distance_to_second_horizon", "cosine_distance_to_second_horizon"):
            both = np.array([by_layer[-1][name], loop_state[name]])
            found[f"token_{name}"] = (("site", "recurrence", "token"), both)
    x, y, z = (states.carried[start : start + settings.recurrences - 1] for start in (2, 1, 0))
    later = _norm(x - 2 * y + z) / _norm(x)
    unknown = np.full((1, later.shape[1]), np.nan, dtype=later.dtype)
    found["token_acceleration"] = (("recurrence", "token"), np.vstack([unknown, later]))
    return found


def _at_the_horizons(states: _States, settings: AnalyzeSettings) -> dict[str, Named]:
    ends = [settings.horizon - 1, 2 * settings.horizon - 1]
    first, second = states.layers[ends[0]], states.layers[ends[1]]
    steps = [_norm(states.layers[end] - states.layers[end - 1]) / _norm(states.layers[end]) for end in ends]
    carried = states.carried[1:]
    loop_drift = _norm(carried[ends[1]] - carried[ends[0]]) / _norm(carried[ends[1]])
    drift = _norm(second - first) / _norm(second)
    pairs = _cosine(first[:, None], first[None])
    degeneracy = pairs[0, 1:].min(0).mean() if len(first) > 1 else np.nan
    tokens = first.shape[1]
    half = [(place + tokens // 2) % tokens for place in range(tokens)]
    unrelated = _cosine(first[1:, half], first[0]).min(0).mean() if len(first) > 1 and tokens > 1 else np.nan
    return {
        "horizon_drift": (("layer",), drift.mean(-1)),
        "horizon_drift_cosine": (("layer",), _cosine(first, second).mean(-1)),
        "horizon_norm_growth": (("layer",), (_norm(second) / _norm(first)).mean(-1)),
        "horizon_relative_step": (("horizon", "layer"), np.array(steps).mean(-1)),
        "horizon_residual_norm": (("horizon", "layer"), np.array([_norm(first), _norm(second)]).mean(-1)),
        "token_horizon_drift": (("site", "token"), np.array([drift[-1], loop_drift])),
        "layer_cosine": (("layer", "layer_other"), pairs.mean(-1)),
        "degeneracy": ((), np.array(degeneracy)),
        "unrelated_degeneracy": ((), np.array(unrelated)),
    }


def _paths(subject: NativeSubject, prompt: list[int], states: _States, settings: AnalyzeSettings) -> dict[str, Named]:
    """Distance of two runs over the mean of their norms, so that neither is the reference."""
    other = subject.other_initial_state(Batch.of([prompt]), settings.seed)
    if other is None:
        return {}
    trace = capture(subject, prompt, recurrences=settings.recurrences, initial_state=other)
    distances, cosines = [], []
    for layer in range(subject.info.recurrent):
        mine = states.layers[: settings.recurrences, layer]
        theirs = np.array([_array(trace.residual("recurrent", layer, t + 1)) for t in range(settings.recurrences)])
        distances.append((_norm(mine - theirs) / ((_norm(mine) + _norm(theirs)) / 2)).mean(-1))
        cosines.append(_cosine_distance(mine, theirs).mean(-1))
    dims = ("layer", "recurrence")
    end = _norm(mine[-1] - theirs[-1]) / ((_norm(mine[-1]) + _norm(theirs[-1])) / 2)
    return {
        "path_distance": (dims, np.array(distances)),
        "path_cosine_distance": (dims, np.array(cosines)),
        "start_distance": (("start", "start_other", "token"), np.array([[0 * end, end], [end, 0 * end]])),
    }


def _whole_depth(subject: NativeSubject, prompt: list[int], settings: AnalyzeSettings) -> dict[str, Named]:
    """All visits, in order, of the measured number of recurrences; recurrences in the middle are left out."""
    looped = subject.info.is_looped
    trace = capture(subject, prompt, recurrences=settings.recurrences if looped else None, seed=settings.seed)
    shown = [visit for visit in trace.visits if visit[0] != "recurrent" or visit[2] <= settings.cycle_recurrences]
    states = np.array([_array(trace.residual(*visit)) for visit in shown])
    return {
        "cycle_similarity": (("visit", "visit_other"), _cosine(states[:, None], states[None]).mean(-1)),
    }


def _attention_and_stages(subject: NativeSubject, prompt: list[int], settings: AnalyzeSettings) -> dict[str, Named]:
    """Every visit, with its whole attention map."""
    looped, seed = subject.info.is_looped, settings.seed
    trace = capture(subject, prompt, recurrences=settings.recurrences if looped else None, seed=seed, attention=True)
    stages = [_stage(_array(trace.residual(*visit))) for visit in trace.visits]
    heads = [[_head(head) for head in _array(trace.attention(*visit))] for visit in trace.visits]
    found: dict[str, Named] = {name: (("depth",), np.array([row[name] for row in stages])) for name in stages[0]}
    for name in heads[0][0]:
        found[name] = (("depth", "head"), np.array([[head[name] for head in row] for row in heads]))
    if looped:
        layers, steps = range(subject.info.recurrent), range(1, settings.recurrences + 1)
        now = np.array([[_array(trace.attention("recurrent", i, t)) for t in steps] for i in layers])
        before = np.concatenate([np.full_like(now[:, :1], np.nan), now[:, :-1]], axis=1)
        further = capture(subject, prompt, recurrences=settings.horizon, seed=seed, attention=True)
        fixed = np.array([[_array(further.attention("recurrent", i, settings.horizon))] for i in layers])
        for name, reference in (("attention_change", before), ("attention_distance_to_horizon", fixed)):
            away = np.sqrt(((now - reference) ** 2).sum((-1, -2)))
            found[name] = (("layer", "recurrence", "head"), away)
        most = np.array([[_most_change(trace, layer, t) for t in steps] for layer in layers])
        found["attention_bound_ratio"] = (("layer", "recurrence", "head"), found["attention_change"][1] / most)
        moved = ((now - before) ** 2).sum(-1).mean((0, 2))
        found["token_attention_change"] = (("recurrence", "token"), np.sqrt(moved))
        by_row = found["attention_change"][1] / np.sqrt(len(prompt))
        stable = np.full((len(layers), by_row.shape[2]), np.nan)
        for layer, head in np.ndindex(stable.shape):
            quiet = [t for t in steps[:-1] if (by_row[layer, t:, head] <= settings.head_stable).all()]
            stable[layer, head] = quiet[0] if quiet else np.nan
        found["head_stable_from"] = (("layer", "head"), stable)
    shown = [visit for visit in trace.visits if visit[0] != "recurrent" or visit[2] <= settings.cycle_recurrences]
    every = np.array([_array(trace.attention(*visit)) for visit in shown])
    away = np.array(
        [[np.sqrt(((one - two) ** 2).sum((-1, -2)).mean() / len(prompt)) for two in every] for one in every]
    )
    found["attention_cycle_distance"] = (("visit", "visit_other"), away)
    return found


def _most_change(trace: Trace, layer: int, recurrence: int) -> list[float]:
    """`(1 / (2 sqrt(d))) (|Q - Q'| |K| + |Q'| |K - K'|)` of every head."""
    views = [trace.attention_view("recurrent", layer, t) for t in (recurrence, recurrence - 1) if t >= 1]
    if len(views) == 1:
        return [np.nan] * views[0].heads
    now, before = views
    assert isinstance(now, QueryKeyAttention)
    assert isinstance(before, QueryKeyAttention)
    found = []
    for head in range(now.heads):
        group = head // (now.heads // now.key.shape[1])
        q, p = (view.query[0, head].double().numpy() for view in (now, before))
        k, m = (view.key[0, group].double().numpy() for view in (now, before))
        most = np.linalg.norm(q - p) * np.linalg.norm(k) + np.linalg.norm(p) * np.linalg.norm(k - m)
        found.append(float(most / (2 * np.sqrt(q.shape[1]))))
    return found


def _stage(states: Array) -> dict[str, float]:
    """Of one visit's states, (token, width)."""
    values = np.linalg.svd(states, compute_uv=False)
    square = values**2
    share = square / square.sum()
    entropy = float(-sum(p * np.log(p) for p in share if p > 0))
    most = np.log(min(states.shape))
    size = np.abs(states)
    token, dimension = np.unravel_index(size.argmax(), size.shape)
    return {
        "residual_entropy": entropy,
        "relative_residual_entropy": entropy / most if most > 0 else np.nan,
        "mean_token_norm": float(_norm(states).mean()),
        "largest_token_norm": float(_norm(states).max()),
        "massive_activation": float(size.max() / np.sort(size.ravel())[(size.size - 1) // 2]),
        "massive_token": float(token),
        "massive_dimension": float(dimension),
        "effective_rank": float(np.exp(-sum(p * np.log(p) for p in values / values.sum() if p > 0))),
    }


def _head(attention: Array) -> dict[str, float]:
    """Of one map, (query, key)."""
    tokens = len(attention)
    received = attention.sum(0) / tokens
    entropy = [-sum(p * np.log(p) for p in row if p > 0) for row in attention]
    relative = [each / np.log(place + 1) for place, each in enumerate(entropy) if place > 0]
    spread = sum(p * np.log(p) for p in received if p > 0)
    return {
        "colsum_concentration": 1 + spread / np.log(tokens) if tokens > 1 else np.nan,
        "sink_score": received[0],
        "strongest_sink": received.max(),
        "strongest_sink_position": float(received.argmax()),
        "mixing_score": float(np.mean(entropy)),
        "relative_mixing_score": float(np.mean(relative)) if relative else np.nan,
    }


def _full_run(subject: NativeSubject, settings: AnalyzeSettings) -> int:
    asked = subject.info.trained_recurrences if settings.exit_recurrences is None else settings.exit_recurrences
    assert asked is not None
    return min(asked, settings.recurrences)


def _readout(subject: NativeSubject, settings: AnalyzeSettings) -> list[int]:
    trained = subject.info.trained_recurrences
    grid = {1, 2, 4, 8, 16, 32, trained, settings.recurrences, *range(1, _full_run(subject, settings) + 1)}
    return sorted(count for count in grid if count is not None and count <= settings.recurrences)


def _layer_readouts(subject: NativeSubject, prompt: list[int], settings: AnalyzeSettings) -> dict[str, Named]:
    """By norm and head after every layer but the last, of the trained recurrence or the last one."""
    layers = subject.info.recurrent
    if layers < 2:
        return {}
    at = min(subject.info.trained_recurrences or settings.recurrences, settings.recurrences)
    trace = capture(subject, prompt, recurrences=at, seed=settings.seed)
    found = []
    for layer in range(layers - 1):
        logits = _array(subject.model.unembed(subject.model.norm(trace.residual("recurrent", layer, at))).detach())
        score = np.exp(logits - logits.max(-1, keepdims=True))
        share = score / score.sum(-1, keepdims=True)
        found.append((share.argmax(-1), share.max(-1), -(share * np.log(share)).sum(-1)))
    empty = np.full(len(prompt), np.nan)
    found.append((np.full(len(prompt), -1), empty, empty))
    names = ("layer_top1", "layer_top1_probability", "layer_entropy")
    return {
        name: (("layer", "token"), np.array(rows)) for name, rows in zip(names, zip(*found, strict=True), strict=True)
    }


def _readouts(
    subject: NativeSubject, prompt: list[int], counts: Sequence[int | None], full: int, seed: int
) -> dict[str, Named]:
    """Every readout from a run of its own that ends there. With an exit gate, as if the model never stopped early."""
    shares = []
    for count in counts:
        trace = capture(subject, prompt, recurrences=count, seed=seed)
        logits = _array(trace.logits)
        if subject.info.exit_threshold is not None and count is not None:
            logits = _array(subject.model.unembed(trace.loop_state(count)).detach())
        score = np.exp(logits - logits.max(-1, keepdims=True))
        shares.append(score / score.sum(-1, keepdims=True))
    following = [(place, token) for place, token in enumerate(prompt[1:])]
    losses = [[-np.log(share[place, token]) for place, token in following] for share in shares]
    rows = {
        "token_loss": [[*row, np.nan] for row in losses],
        "token_entropy": [-(share * np.log(share)).sum(-1) for share in shares],
        "token_kl_to_last": [_divergence(shares[-1], share) for share in shares],
        "token_margin": [np.diff(np.log(np.sort(share, axis=-1)[:, -2:]), axis=-1)[:, 0] for share in shares],
        "token_top1_probability": [share.max(-1) for share in shares],
        "token_top1": [share.argmax(-1) for share in shares],
    }
    found: dict[str, Named] = {name: (("readout_recurrence", "token"), np.array(row)) for name, row in rows.items()}
    mean = [np.mean(row) if row else np.nan for row in losses]
    if full:
        unknown = np.full(len(prompt), np.nan)
        # The first so many readouts are those after 1, 2, ... recurrences.
        steps = [unknown, *(_divergence(shares[count - 1], shares[count]) for count in range(1, full))]
        away = [_divergence(shares[full - 1], shares[count]) for count in range(full)]
        for name, row in (("token_kl_to_previous", steps), ("token_kl_to_full", away)):
            found[name] = (("exit_recurrence", "token"), np.array(row))
    return found | {"loss": (("readout_recurrence",), np.array(mean))}


def _divergence(share: Array, other: Array) -> Array:
    return np.asarray((share * np.log(share / other)).sum(-1))


def _exits(subject: NativeSubject, prompt: list[int], settings: AnalyzeSettings) -> dict[str, Named]:
    trace = capture(subject, prompt, recurrences=settings.recurrences, seed=settings.seed)
    gate = subject.model.exit_gate
    assert gate is not None
    weight, bias = gate.weight.detach().double().numpy()[0], float(gate.bias)
    going = np.ones(len(prompt))
    shares, stopped = [], []
    for recurrence in range(1, settings.recurrences + 1):
        stop = 1 / (1 + np.exp(-(_array(trace.loop_state(recurrence)) @ weight + bias)))
        shares.append(going if recurrence == settings.recurrences else going * stop)
        stopped.append(np.sum(shares, axis=0))
        going = going * (1 - stop)
    by_token = np.array(shares)
    return {
        "exit_probability": (("recurrence",), by_token.mean(-1)),
        "token_exit_probability": (("recurrence", "token"), by_token),
        "token_exit_cumulated": (("recurrence", "token"), np.array(stopped)),
    }


def _trajectories(
    subject: NativeSubject, prompts: Sequence[Sequence[int]], settings: AnalyzeSettings
) -> dict[str, Named]:
    if not (subject.info.is_looped and settings.tracked):
        return {}
    scores, shares = [], []
    for prompt, token in settings.tracked:
        steps, layers = range(1, settings.recurrences + 1), range(subject.info.recurrent)
        trace = capture(subject, list(prompts[prompt]), recurrences=settings.recurrences, seed=settings.seed)
        states = np.array([[_array(trace.residual("recurrent", i, t))[token] for t in steps] for i in layers])
        points = states.reshape(-1, states.shape[-1])
        centred = points - points.mean(0)
        variance, axes = np.linalg.eigh(centred.T @ centred)
        leading = np.argsort(variance)[::-1][: settings.components]
        projected = centred @ axes[:, leading]
        largest = projected[np.abs(projected).argmax(0), np.arange(len(leading))]
        scores.append((projected * np.sign(largest)).reshape(*states.shape[:2], -1))
        shares.append(variance[leading] / variance.sum())
    return {
        "trajectory": (("tracked", "layer", "recurrence", "component"), np.array(scores)),
        "trajectory_variance": (("tracked", "component"), np.array(shares)),
    }


def _maps(subject: NativeSubject, prompts: Sequence[Sequence[int]], settings: AnalyzeSettings) -> dict[str, Named]:
    """`round(254 sqrt(p))` of the maps of single prompts, and 255 beyond their end."""
    counts = [1, 2, 3, 4, subject.info.trained_recurrences or 1, settings.recurrences]
    counts += [2**power for power in range(20)]
    looped = subject.info.is_looped
    kept = [count for count in sorted(set(counts)) if count <= settings.recurrences] if looped else [0]
    found = []
    for prompt in settings.map_prompts:
        trace = capture(
            subject,
            list(prompts[prompt]),
            recurrences=settings.recurrences if looped else None,
            attention=True,
            seed=settings.seed,
        )
        visits = [visit for visit in trace.visits if visit[0] != "recurrent" or visit[2] in kept]
        maps = np.stack([_array(trace.attention(*visit)) for visit in visits])
        found.append(np.rint(254 * np.sqrt(maps)).astype(np.uint8))
    side = max(codes.shape[-1] for codes in found)
    padded = [
        np.pad(codes, [(0, 0), (0, 0), *[(0, side - codes.shape[-1])] * 2], constant_values=255) for codes in found
    ]
    return {"attention_map": (("mapped", "map_visit", "head", "query", "key"), np.stack(padded))}


def _neurons(subject: NativeSubject) -> dict[str, Named]:
    model = subject.model
    tokens = (model.embedding if model.head is None else model.head).weight.detach().double().numpy()
    gain = model.norm.weight.detach().double().numpy()
    layers = (*model.prelude, *model.recurrent, *model.coda)
    writes = [layer.mlp.down.weight.detach().double().numpy().T for layer in layers]
    behind = [
        layer.norm_4.weight.detach().double().numpy() if list(layer.norm_4.parameters()) else 1 for layer in layers
    ]
    found = _neurons_of(writes, tokens)
    folded = _neurons_of([w * n for w, n in zip(writes, behind, strict=True)], tokens * gain - (tokens * gain).mean(0))
    return found | {f"folded_{name}": values for name, values in folded.items()}


def _neurons_of(writes: list[Array], tokens: Array) -> dict[str, Named]:
    kurtosis, skew = [], []
    for output in writes:
        cosines = output @ tokens.T / (_norm(output)[:, None] * _norm(tokens))
        standard = (cosines - cosines.mean(-1, keepdims=True)) / cosines.std(-1, keepdims=True)
        kurtosis.append((standard**4).mean(-1))
        skew.append((standard**3).mean(-1))
    peaked = np.array(kurtosis) > 10
    return {
        "neuron_kurtosis": (("unique_layer", "neuron"), np.array(kurtosis)),
        "neuron_skew": (("unique_layer", "neuron"), np.array(skew)),
        "prediction_neurons": (("unique_layer",), (peaked & (np.array(skew) > 0)).mean(-1)),
        "suppression_neurons": (("unique_layer",), (peaked & (np.array(skew) < 0)).mean(-1)),
    }
