"""Studies with a known story, computed from closed-form trajectories by the formulas of docs/study.md.

Nothing here uses loopscope's measures: the answers are tested against states whose fate is known, in plain numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray
from numpy.typing import NDArray

from loopscope.dynamics.verdicts import KINDS, Kind
from loopscope.measures.behaviour import VERDICT_NUMBERS
from loopscope.measures.heads import HEAD_NAMES
from loopscope.measures.stages import STAGE_NAMES
from loopscope.study import Study

Array = NDArray[np.float64]
Trajectory = Callable[[Array, Array, np.random.Generator], Array]
"""From times t = 1 .. 2H, shape (time, 1, 1, 1), and points, shape (layer, token, width), to states (time, layer,
token, width)."""

LAYERS, WIDTH, FLOOR = 3, 8, 1e-7
LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


def _unit(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    vectors = rng.normal(size=shape)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def contracting(rate: float = 0.6, noise: float = FLOOR, start: float = 1.0) -> Trajectory:
    """Towards one distinct point per layer, geometrically, down to rounding noise."""

    def states(time: Array, points: Array, rng: np.random.Generator) -> Array:
        offset = start * _unit(points.shape, rng)
        rounding = noise / np.sqrt(WIDTH) * rng.normal(size=(len(time), *points.shape))
        return np.asarray(points + offset * rate**time + rounding)

    return states


def growing(time: Array, points: Array, rng: np.random.Generator) -> Array:
    """One direction for all layers, along which the norm grows linearly."""
    direction = np.broadcast_to(points[:1], points.shape)
    return np.asarray(direction * (3 + time) + 0.3 * _unit(points.shape, rng) / time)


def orbiting(time: Array, points: Array, rng: np.random.Generator) -> Array:
    """Around a point per layer at 0.6 of its norm, with a period that no horizon is a multiple of."""
    u, v = _unit(points.shape, rng), _unit(points.shape, rng)
    phase = 2 * np.pi * time / (3 + np.sqrt(5))
    return np.asarray(points + 0.42 * (np.cos(phase) * u + np.sin(phase) * v))


def overflowing(time: Array, points: Array, rng: np.random.Generator) -> Array:
    """Not a number from the 5th recurrence on."""
    states = contracting()(time, points, rng)
    return np.where(time >= 5, np.nan, states)


def looped_study(
    fate: Trajectory | list[Trajectory],
    *,
    prompts: int = 40,
    tokens: int = 10,
    recurrences: int = 24,
    horizon: int = 32,
    trained: int | None = 4,
    injection: str = "linear",
    loss: Callable[[Array], Array] = lambda count: 3 + 0.8**count,
    text: str = "Two apples cost three coins .",
    floor: float = FLOOR,
    dtype: str = "float32",
    seed: int = 0,
) -> Study:
    """A study of a (1, 3 (x) R, 1) model. A list of fates is dealt out to the prompts in turn."""
    rng = np.random.default_rng(seed)
    fates = fate if isinstance(fate, list) else [fate]
    time = np.arange(1, 2 * horizon + 1, dtype=np.float64).reshape(-1, 1, 1, 1)
    points = [_unit((LAYERS, tokens, WIDTH), rng) for _ in range(prompts)]
    # (time, layer, prompt, token, width), of the run and of one from another initial state
    states, others = (
        np.stack([fates[i % len(fates)](time, points[i], rng) for i in range(prompts)], axis=2) for _ in range(2)
    )
    with np.errstate(invalid="ignore"):
        dataset = _convergence(states, recurrences, horizon)
        dataset |= _horizons(states, horizon)
        dataset |= _path(states[:recurrences], others[:recurrences])
    dataset |= _visits(states, min(recurrences, 4))
    dataset |= _stages_and_heads(*_all_visits(states, recurrences))
    dataset |= attention_maps(_all_visits(states, recurrences)[1], tokens, kept=(1, 2, 4, recurrences))
    dataset |= _head_changes(recurrences, prompts, tokens)
    dataset |= _trajectories(states[:recurrences])
    full = min(trained or 8, recurrences)
    powers = {2**power for power in range(recurrences.bit_length()) if 2**power <= recurrences}
    readouts = np.array(sorted(powers | set(range(1, full + 1))))
    finite = np.isfinite(states).all(axis=(1, 3, 4))
    scatter = rng.normal(scale=0.3, size=prompts)
    losses = loss(readouts.astype(float))[:, None] + scatter + rng.normal(scale=1e-3, size=(len(readouts), prompts))
    dataset["loss"] = ("readout_recurrence", "prompt"), np.where(finite.all(axis=0), losses, np.nan)
    dataset |= _readouts(readouts, prompts, tokens)
    dataset |= _exits(full, prompts, tokens)
    dataset["noise_floor"] = ("layer", "prompt"), np.full((LAYERS, prompts), floor)
    dataset["diverged_at"] = "prompt", np.where(finite.all(axis=0), -1, finite.argmin(axis=0))
    dataset["token_count"] = "prompt", np.full(prompts, tokens)
    coordinates = {
        "layer": np.arange(LAYERS),
        "recurrence": np.arange(recurrences),
        "prompt": np.arange(prompts),
        "token": np.arange(tokens),
        "quantile": LEVELS,
        "site": ["last_layer", "loop_state"],
        "horizon": ["first", "second"],
        "readout_recurrence": readouts,
        "exit_recurrence": np.arange(1, full + 1),
        "tracked_prompt": ("tracked", np.array([0])),
        "tracked_token": ("tracked", np.array([tokens - 1])),
    }
    manifest = _manifest(looped=True, trained=trained, injection=injection, prompts=prompts, dtype=dtype)
    manifest["settings"] |= {"recurrences": recurrences, "horizon": horizon, "horizon_method": "second-pass"}
    return Study(xarray.Dataset(dataset, coordinates), manifest, _tokens(prompts, tokens, text))


def with_behaviour(study: Study, codes: NDArray[np.int8] | None = None) -> Study:
    """The study with verdicts `codes`, (layer, prompt, token), places in `KINDS`; all kinds in turn unless given.

    Numbers and ways are of a plausible size; the way of an orbit is a circle, that of everything else a straight line.
    """
    prompts, tokens = study.dataset.sizes["prompt"], study.dataset.sizes["token"]
    shape = (LAYERS, prompts, tokens)
    if codes is None:
        codes = (np.indices(shape).sum(0) % len(KINDS)).astype(np.int8)
    dims = ("judged_layer", "prompt", "token")
    numbers = dict(zip(VERDICT_NUMBERS, (0.2, 1e-3, 5.5, 0.3, 0.0123, 0.9, 1e-9), strict=True))
    found: dict[str, Any] = {"verdict": (dims, codes), "verdict_cosine": (dims, np.where(codes == 1, 0, codes))}
    for name, value in numbers.items():
        only = {"period": Kind.ORBIT, "amplitude": Kind.ORBIT, "speed": Kind.SLIDER}.get(name)
        there = codes >= 0 if only is None else codes == KINDS.index(only)
        found[f"verdict_{name}"] = dims, np.where(there, value, np.nan).astype(np.float32)
    changes = np.zeros((3, *shape), dtype=np.int8)
    changes[0, :, 0, 0], changes[2] = 1, -1
    found["verdict_changes"] = ("change", *dims), changes
    lags, tail = np.arange(1, 13), np.arange(24) / 24
    orbit = codes[-1] == KINDS.index(Kind.ORBIT)
    circle = 0.3 * np.stack([np.cos(8 * np.pi * tail), np.sin(8 * np.pi * tail)])
    line = np.stack([tail, 0 * tail])
    found["displacement"] = (
        ("lag", "prompt", "token"),
        np.where(orbit, 0.2, 0.01 * lags[:, None, None]).astype(np.float32),
    )
    found["tail_path"] = (
        ("plane", "tail", "prompt", "token"),
        np.where(orbit, circle[..., None, None], line[..., None, None]).astype(np.float32),
    )
    counts = np.stack([(codes[-1] == kind).sum(-1) for kind in range(len(KINDS))], axis=-1)
    grids = {"displacement": ((7.5, 30.0, 120.0), (0.0125, 0.05, 0.2)), "cosine": ((0.01, 0.05), (0.5, 0.9))}
    coordinates: dict[str, Any] = {"judged_layer": np.arange(LAYERS), "change": ["window", "horizon", "seed"]}
    coordinates |= {"lag": lags, "tail": np.arange(len(tail)), "kind": list(map(str, KINDS))}
    for method, (first, second) in grids.items():
        names = (f"{method}_setting", f"{method}_setting_other")
        everywhere = np.broadcast_to(counts[:, None, None], (prompts, len(first), len(second), len(KINDS)))
        found[f"{method}_sensitivity"] = ("prompt", *names, "kind"), everywhere
        coordinates |= {names[0]: list(first), names[1]: list(second)}
    manifest = dict(study.manifest)
    manifest["behaviour"] = {
        "displacement": {"floor_factor": 30.0, "unexplained": 0.05},
        "cosine": {"tau": 0.05, "rho": 0.9},
        "sensitivity": {"displacement": ["floor_factor", "unexplained"], "cosine": ["tau", "rho"]},
    }
    return Study(study.dataset.assign(found).assign_coords(coordinates), manifest, study.tokens)


def feed_forward_study(prompts: int = 40, tokens: int = 10, seed: int = 0) -> Study:
    """A study of a feed-forward model of four layers."""
    rng = np.random.default_rng(seed)
    states = np.cumsum(rng.normal(size=(4, prompts, tokens, WIDTH)), axis=0)
    labels = [f"prelude.{layer}" for layer in range(4)]
    dataset = _similarity(states, labels) | _stages_and_heads(states, [("prelude", layer, 0) for layer in range(4)])
    dataset |= attention_maps([("prelude", layer, 0) for layer in range(4)], tokens)
    dataset["loss"] = ("readout_recurrence", "prompt"), 2.5 + 0.1 * rng.normal(size=(1, prompts))
    dataset["token_count"] = "prompt", np.full(prompts, tokens)
    dataset["diverged_at"] = "prompt", np.full(prompts, -1)
    coordinates = {"prompt": np.arange(prompts), "readout_recurrence": [1]}
    manifest = _manifest(looped=False, trained=None, injection="none", prompts=prompts, dtype="float32")
    manifest["model"]["layout"] = {"prelude": 4, "recurrent": 0, "coda": 0}
    return Study(xarray.Dataset(dataset, coordinates), manifest, _tokens(prompts, tokens, "Two apples"))


def _norm(states: Array) -> Array:
    return np.asarray(np.linalg.norm(states, axis=-1))


def _cosine(x: Array, y: Array) -> Array:
    return np.asarray((x * y).sum(-1) / (_norm(x) * _norm(y)))


def _convergence(states: Array, recurrences: int, horizon: int) -> dict[str, Any]:
    """All values per token (recurrence, layer, prompt, token), then their means and quantiles."""
    window = states[:recurrences]
    before = np.concatenate([np.full_like(states[:1], np.nan), window[:-1]])
    first, second = states[horizon - 1], states[2 * horizon - 1]
    values = {
        "successive_difference": _norm(window - before),
        "relative_step": _norm(window - before) / _norm(window),
        "cosine_to_previous": _cosine(window, before),
        "distance_to_horizon": _norm(window - first),
        "relative_distance": _norm(window - first) / _norm(first),
        "cosine_to_horizon": _cosine(window, np.broadcast_to(first, window.shape)),
        "distance_to_second_horizon": _norm(window - second),
        "relative_distance_second_horizon": _norm(window - second) / _norm(second),
        "cosine_to_second_horizon": _cosine(window, np.broadcast_to(second, window.shape)),
        "residual_norm": _norm(window),
    }
    dims = ("layer", "recurrence", "prompt")
    found: dict[str, Any] = {}
    for name, value in values.items():
        by_layer = value.swapaxes(0, 1)
        found[name] = dims, by_layer.mean(-1)
        found[f"{name}_quantile"] = ("quantile", *dims), np.quantile(by_layer, LEVELS, axis=-1)
        if "second" not in name or name.startswith("relative"):
            found[f"token_{name}"] = ("site", "recurrence", "prompt", "token"), np.stack([by_layer[-1]] * 2)
    norm = found["residual_norm"][1]
    found["norm_growth"] = dims, norm / norm[:, :1]
    return found


def _horizons(states: Array, horizon: int) -> dict[str, Any]:
    first, second = states[horizon - 1], states[2 * horizon - 1]
    drift = _norm(second - first) / _norm(second)
    steps = [_norm(states[at - 1] - states[at - 2]) / _norm(states[at - 1]) for at in (horizon, 2 * horizon)]
    pairwise = _cosine(first[:, None], first[None])
    return {
        "horizon_drift": (("layer", "prompt"), drift.mean(-1)),
        "horizon_drift_cosine": (("layer", "prompt"), _cosine(second, first).mean(-1)),
        "horizon_norm_growth": (("layer", "prompt"), (_norm(second) / _norm(first)).mean(-1)),
        "horizon_relative_step": (("horizon", "layer", "prompt"), np.stack(steps).mean(-1)),
        "horizon_residual_norm": (("horizon", "layer", "prompt"), np.stack([_norm(first), _norm(second)]).mean(-1)),
        "token_horizon_drift": (("site", "prompt", "token"), np.stack([drift[-1]] * 2)),
        "layer_cosine": (("layer", "layer_other", "prompt"), pairwise.mean(-1)),
        "degeneracy": ("prompt", pairwise[0, 1:].min(0).mean(-1)),
    }


def _path(states: Array, others: Array) -> dict[str, Any]:
    dims = ("layer", "recurrence", "prompt")
    apart = _norm(states - others) / ((_norm(states) + _norm(others)) / 2)
    return {
        "path_distance": (dims, apart.mean(-1).swapaxes(0, 1)),
        "path_cosine": (dims, _cosine(states, others).mean(-1).swapaxes(0, 1)),
    }


def _all_visits(states: Array, recurrences: int) -> tuple[Array, list[tuple[str, int, int]]]:
    """(visit, prompt, token, width), and (stage, layer, recurrence) of each."""
    loop = states[:recurrences].reshape(-1, *states.shape[2:])
    sites = [
        ("prelude", 0, 0),
        *(("recurrent", layer, t) for t in range(recurrences) for layer in range(LAYERS)),
        ("coda", 0, 0),
    ]
    return np.concatenate([loop[:1] * 0.5, loop, loop[-1:] * 1.5]), sites


def _visits(states: Array, recurrences: int) -> dict[str, Any]:
    visits, sites = _all_visits(states, recurrences)
    labels = [f"{stage}.{layer}" + (f"@{t}" if stage == "recurrent" else "") for stage, layer, t in sites]
    return _similarity(visits, labels)


def _similarity(visits: Array, labels: list[str]) -> dict[str, Any]:
    """Of visits (visit, prompt, token, width)."""
    cosine = _cosine(visits[:, None], visits[None])
    finite = np.isfinite(cosine)
    mean = np.where(finite, cosine, 0).sum((-1, -2)) / np.maximum(finite.sum((-1, -2)), 1)
    return {
        "cycle_similarity": (("visit", "visit_other"), mean),
        "attention_cycle_distance": (("visit", "visit_other"), 1 - mean),
        "visit": ("visit", labels),
        "visit_other": ("visit_other", labels),
    }


def _stages_and_heads(visits: Array, sites: list[tuple[str, int, int]], heads: int = 2) -> dict[str, Any]:
    """Numbers of a plausible size for visits (visit, prompt, token, width), not those of any attention."""
    rng = np.random.default_rng(0)
    shape = (len(visits), heads, visits.shape[1])
    found: dict[str, Any] = {
        f"depth_{name}": ("depth", list(column))
        for name, column in zip(("stage", "layer", "recurrence"), zip(*sites, strict=True), strict=True)
    }
    for name in HEAD_NAMES:
        found[name] = ("depth", "head", "prompt"), rng.uniform(0, 0.6, size=shape).astype(np.float32)
    found["strongest_sink_position"] = (
        ("depth", "head", "prompt"),
        rng.integers(visits.shape[2], size=shape).astype(np.float32),
    )
    for name in STAGE_NAMES:
        found[name] = ("depth", "prompt"), rng.uniform(0.2, 0.8, size=(len(visits), visits.shape[1]))
    found["mean_token_norm"] = ("depth", "prompt"), _norm(visits).mean(-1)
    layers = sorted({f"{stage}.{layer}" for stage, layer, _ in sites})
    found["unique_layer"] = "unique_layer", layers
    for name in ("prediction_neurons", "suppression_neurons"):
        found[name] = "unique_layer", rng.uniform(0, 0.1, size=len(layers))
    return found


def attention_maps(sites: list[tuple[str, int, int]], tokens: int, kept: tuple[int, ...] = ()) -> dict[str, Any]:
    """Of the first prompt, at the recurrences kept (from 1): each token divides its attention between the first one and
    itself, and gives the first another share in each of the maps."""
    chosen = [site for site in sites if site[0] != "recurrent" or site[2] + 1 in kept]
    codes = np.zeros((1, len(chosen), 2, tokens, tokens), dtype=np.uint8)
    for index, head in np.ndindex(len(chosen), 2):
        first = 8 * (2 * index + head) + 16
        codes[0, index, head] = round((254**2 - first**2) ** 0.5) * np.eye(tokens)
        codes[0, index, head, :, 0] = first
        codes[0, index, head, 0, 0] = 254
    return {
        "attention_map": (("mapped", "map_visit", "head", "query", "key"), codes),
        "mapped_prompt": ("mapped", [0]),
        **{
            f"map_{name}": ("map_visit", list(column))
            for name, column in zip(("stage", "layer", "recurrence"), zip(*chosen, strict=True), strict=True)
        },
    }


def _head_changes(recurrences: int, prompts: int, tokens: int, heads: int = 2) -> dict[str, Any]:
    """Changes that shrink by half from recurrence to recurrence."""
    dims = ("layer", "recurrence", "head", "prompt")
    shrinking = 0.5 ** np.arange(recurrences)[:, None, None] * np.ones((LAYERS, recurrences, heads, prompts))
    change = shrinking.copy()
    change[:, 0] = np.nan
    stable = np.where(recurrences > 8, 6.0, np.nan)
    return {
        "attention_change": (dims, change.astype(np.float32)),
        "attention_distance_to_horizon": (dims, shrinking.astype(np.float32)),
        "attention_bound_ratio": (dims, np.full(shrinking.shape, 0.1, dtype=np.float32)),
        "token_attention_change": (
            ("recurrence", "prompt", "token"),
            np.repeat(change[0, :, 0, :, None], tokens, axis=-1).astype(np.float32),
        ),
        "head_stable_from": (("layer", "head", "prompt"), np.full((LAYERS, heads, prompts), stable)),
    }


def _readouts(counts: Array, prompts: int, tokens: int) -> dict[str, Any]:
    """Predictions that halve their distance from the last one, whose top token is the last one's from 4 on."""
    dims = ("readout_recurrence", "prompt", "token")
    shape = np.ones((len(counts), prompts, tokens))
    away = 0.5 ** counts[:, None, None] * shape
    away[-1] = 0
    return {
        "token_loss": (dims, 2 + away),
        "token_entropy": (dims, 1 + away),
        "token_kl_to_last": (dims, away),
        "token_top1": (dims, np.where(counts[:, None, None] < 4, 7, 3) * shape.astype(np.int64)),
    }


def _exits(full: int, prompts: int, tokens: int) -> dict[str, Any]:
    """Of the same predictions, those up to a full run."""
    dims = ("exit_recurrence", "prompt", "token")
    away = 0.5 ** np.arange(1, full + 1)[:, None, None] * np.ones((full, prompts, tokens))
    step = away.copy()
    step[0] = np.nan
    return {"token_kl_to_previous": (dims, step), "token_kl_to_full": (dims, away - away[-1])}


def _trajectories(states: Array) -> dict[str, Any]:
    token = states[:, :, 0, -1].swapaxes(0, 1)
    flat = token.reshape(-1, WIDTH)
    if not np.isfinite(flat).all():
        return {
            "trajectory": (("tracked", "layer", "recurrence", "component"), np.full((1, *token.shape[:2], 3), np.nan)),
            "trajectory_variance": (("tracked", "component"), np.full((1, 3), np.nan)),
        }
    left, singular, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    scores = (left * singular)[:, :3].reshape(1, *token.shape[:2], 3)
    return {
        "trajectory": (("tracked", "layer", "recurrence", "component"), scores),
        "trajectory_variance": (("tracked", "component"), (singular**2 / (singular**2).sum())[None, :3]),
    }


def _manifest(*, looped: bool, trained: int | None, injection: str, prompts: int, dtype: str) -> dict[str, Any]:
    return {
        "status": "complete",
        "created": "2026-01-02T03:04:05+00:00",
        "model": {
            "name": "synthetic",
            "kind": "looped" if looped else "feed-forward",
            "layout": {"prelude": 1, "recurrent": LAYERS, "coda": 1},
            "trained_recurrences": trained,
            "injection": injection,
            "norm_placement": "pre",
            "loop_norm": "none",
            "state_init": "normal",
            "parameters": 12345,
            "dtype": dtype,
            "weights_sha256": "0" * 64,
            "width": WIDTH,
            "heads": 2,
        },
        "settings": {"dtype": dtype, "seed": 0, "horizon": 32, "head_stable": 0.01},
        "prompts": {"source": "synthetic", "count": prompts, "sha256": "1" * 64, "system_prompt": None},
        "versions": {"loopscope": "0.1.0", "numpy": np.__version__},
    }


def _tokens(prompts: int, tokens: int, text: str) -> list[dict[str, Any]]:
    words = (text.split(" ") * tokens)[:tokens]
    return [
        {
            "id": str(index),
            "text": text,
            "token_ids": list(range(tokens)),
            "token_strings": words,
            "system_tokens": 0,
        }
        for index in range(prompts)
    ]
