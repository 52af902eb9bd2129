"""Studies with a known story: the real measures, of a subject whose states are closed-form trajectories.

What the states do not decide (attention, readouts, losses) is given as numbers of a plausible size.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loopscope import Study, analyze
from loopscope._util.shapes import Logits, States
from loopscope._util.sites import Stage
from loopscope.dynamics.verdicts import DOUBTS, KINDS, VERDICT_NUMBERS, Doubt, Kind
from loopscope.measures.heads import HEAD_NAMES
from loopscope.measures.stages import STAGE_NAMES
from loopscope.models.architecture import Injection
from loopscope.models.subject import Batch, SubjectInfo
from loopscope.models.visits import LoopState, Observer, Visit

GATE = ("exit_probability", "token_exit_probability", "token_exit_cumulated")
Array = NDArray[np.float64]
Trajectory = Callable[[Array, Array, np.random.Generator], Array]
"""From times t = 1 .. 2H, shape (time, 1, 1, 1), and points, shape (layer, token, width), to states (time, layer,
token, width)."""

LAYERS, WIDTH, HEADS, FLOOR = 3, 8, 2, 1e-7
GIVEN = ("readout", "heads", "maps", "behaviour", "stability")
"""Parts that are not measured."""


def _unit(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    vectors = rng.normal(size=shape)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


@functools.cache  # the same trajectory is the same object, so that its study is measured once
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


@functools.cache
def sliding(speed: float = 5e-5, rate: float = 0.0, slowing: bool = False) -> Trajectory:
    """On and on in one direction, by that share of the norm a recurrence, or with the logarithm of time; beside an
    approach at `rate`, if it is not 0."""

    def states(time: Array, points: Array, rng: np.random.Generator) -> Array:
        way = _unit(points.shape, rng) * speed * (np.log(time) if slowing else time)
        return np.asarray(points + way + _unit(points.shape, rng) * rate**time)

    return states


@functools.cache
def circling(radius: float = 1e-3) -> Trajectory:
    """As `orbiting`, but in a circle that is small beside the norm."""

    def states(time: Array, points: Array, rng: np.random.Generator) -> Array:
        return np.asarray(points + radius * (orbiting(time, points, rng) - points))

    return states


def overflowing(time: Array, points: Array, rng: np.random.Generator) -> Array:
    """Not a number from the 5th recurrence on."""
    states = contracting()(time, points, rng)
    return np.where(time >= 5, np.nan, states)


class ScriptedSubject:
    """A subject whose residual streams are given; it has no attention and no readout to be seen."""

    tokenizer, device = None, torch.device("cpu")

    def __init__(self, info: SubjectInfo, *runs: Array, floor: float = 0.0) -> None:
        """`runs`: states (time, layer, prompt, token, width) of a run, and of one from another initial state. A
        feed-forward model's are those of its prelude, at one time."""
        self.info = info
        self.runs = [torch.from_numpy(states) for states in runs]
        self.floor = floor

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
    ) -> ScriptedRun:
        return ScriptedRun(self, self.runs[0 if initial_state is None else 1], observers)

    def other_initial_state(self, batch: Batch, seed: int) -> States:
        return torch.zeros(*batch.mask.shape, WIDTH)


class ScriptedRun:
    """A looped model's prelude puts out half of what its loop begins with, and its coda more than that ends with."""

    state = None

    def __init__(self, subject: ScriptedSubject, states: torch.Tensor, observers: Iterable[Observer]) -> None:
        self._subject, self._states, self._done = subject, states, 0
        self._announce("prelude", states[0, :1] * 0.5 if subject.info.is_looped else states[0], observers)

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        self._done += 1
        self._announce("recurrent", self._states[self._done - 1], observers)
        for observer in observers:
            observer.loop_state(LoopState(self._done, self._states[self._done - 1, -1]))

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        if self._subject.info.coda:
            self._announce("coda", self._states[self._done - 1, -1:] * 1.5, observers)
        return self._states[0, 0]

    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        return self.decode(observers)

    def close(self) -> None: ...

    def rounding_error(self) -> torch.Tensor:
        return torch.full(self._states.shape[1:4], self._subject.floor / np.sqrt(2))

    def _announce(self, stage: Stage, states: torch.Tensor, observers: Iterable[Observer]) -> None:
        for layer, state in enumerate(states):
            visit = Visit(stage, layer, self._done if stage == "recurrent" else 0, state, None)
            for observer in observers:
                observer.visit(visit)


def looped_study(
    fate: Trajectory | list[Trajectory],
    *,
    prompts: int = 40,
    tokens: int = 10,
    recurrences: int = 24,
    horizon: int = 32,
    trained: int | None = 4,
    injection: Injection = "linear",
    loss: Callable[[Array], Array] = lambda count: 3 + 0.8**count,
    text: str = "Two apples cost three coins .",
    floor: float = FLOOR,
    dtype: str = "float32",
    seed: int = 0,
) -> Study:
    """A study of a (1, 3 (x) R, 1) model. A list of fates is dealt out to the prompts in turn."""
    info = _info(1, LAYERS, 1, trained_recurrences=trained, injection=injection, dtype=dtype)
    fates = tuple(fate) if isinstance(fate, list) else (fate,)
    measured, rng = _measured_loop(info, fates, (prompts, tokens, recurrences, horizon), floor, seed)
    rng = copy.deepcopy(rng)
    sites = [
        ("prelude", 0, 0),
        *(("recurrent", layer, t) for t in range(1, recurrences + 1) for layer in range(LAYERS)),
        ("coda", 0, 0),
    ]
    full = min(trained or 8, recurrences)
    powers = {2**power for power in range(recurrences.bit_length()) if 2**power <= recurrences}
    readouts = np.array(sorted(powers | set(range(1, full + 1))))
    scatter = rng.normal(scale=0.3, size=prompts)
    losses = loss(readouts.astype(float))[:, None] + scatter + rng.normal(scale=1e-3, size=(len(readouts), prompts))
    given: dict[str, Any] = {
        "loss": (("readout_recurrence", "prompt"), np.where(measured.dataset["diverged_at"] < 0, losses, np.nan)),
        "readout_recurrence": readouts,
        "exit_recurrence": np.arange(1, full + 1),
    }
    given |= _stages_and_heads(sites, prompts, tokens)
    given |= attention_maps(sites, tokens, kept=(1, 2, 4, recurrences))
    given |= _head_changes(recurrences, prompts, tokens)
    given |= _readouts(readouts, prompts, tokens)
    given |= _layer_readouts(prompts, tokens)
    given |= _exits(full, prompts, tokens)
    return _with(measured, given, text)


def feed_forward_study(prompts: int = 40, tokens: int = 10, seed: int = 0) -> Study:
    """A study of a feed-forward model of four layers."""
    rng = np.random.default_rng(seed)
    states = np.cumsum(rng.normal(size=(4, prompts, tokens, WIDTH)), axis=0)
    info = _info(4, 0, 0, trained_recurrences=None, injection="none", dtype="float32")
    sites = [("prelude", layer, 0) for layer in range(4)]
    given = _stages_and_heads(sites, prompts, tokens) | attention_maps(sites, tokens)
    given["loss"] = ("readout_recurrence", "prompt"), 2.5 + 0.1 * rng.normal(size=(1, prompts))
    given["readout_recurrence"] = [1]
    return _with(_measure(ScriptedSubject(info, states[None]), 1, 2), given, "Two apples")


@functools.lru_cache(maxsize=64)
def _measured_loop(
    info: SubjectInfo, fates: tuple[Trajectory, ...], sizes: tuple[int, int, int, int], floor: float, seed: int
) -> tuple[Study, np.random.Generator]:
    """The study, and the generator as it stands after the states were drawn."""
    prompts, tokens, recurrences, horizon = sizes
    rng = np.random.default_rng(seed)
    time = np.arange(1, 2 * horizon + 1, dtype=np.float64).reshape(-1, 1, 1, 1)
    points = [_unit((LAYERS, tokens, WIDTH), rng) for _ in range(prompts)]
    runs = [np.stack([fates[i % len(fates)](time, points[i], rng) for i in range(prompts)], axis=2) for _ in range(2)]
    return _measure(ScriptedSubject(info, *runs, floor=floor), recurrences, horizon), rng


def _measure(subject: ScriptedSubject, recurrences: int, horizon: int) -> Study:
    _, _, prompts, tokens, _ = subject.runs[0].shape
    return analyze(
        subject,
        [list(range(tokens))] * prompts,
        recurrences=recurrences,
        horizon=horizon,
        batch_size=prompts,
        cycle_recurrences=4,
        track=("0:-1",),
        skip=GIVEN,
    )


def _with(study: Study, given: dict[str, Any], text: str) -> Study:
    """The study with what is given, and prompts of these words."""
    similarity = study.dataset["cycle_similarity"]
    dataset = study.dataset.copy(deep=True).assign(given | {"attention_cycle_distance": 1 - similarity})
    beside = [name for name in given if str(name).startswith(("map_", "predicted_"))]
    manifest = copy.deepcopy(dict(study.manifest))
    manifest["created"] = "2026-01-02T03:04:05+00:00"
    manifest["prompts"]["source"] = "synthetic"
    manifest["left_out"] = dict.fromkeys(GATE, "the model has no exit gate")
    count = len(study.tokens[0]["token_ids"])
    words = (text.split(" ") * count)[:count]
    tokens = [{**record, "text": text, "token_strings": words} for record in study.tokens]
    return Study(dataset.set_coords(beside), manifest, tokens)


def _info(prelude: int, recurrent: int, coda: int, **others: Any) -> SubjectInfo:
    return SubjectInfo(
        name="synthetic",
        family="synthetic",
        prelude=prelude,
        recurrent=recurrent,
        coda=coda,
        norm_placement="pre",
        loop_norm="none",
        state_init="normal",
        width=WIDTH,
        heads=HEADS,
        vocab_size=1024,
        max_positions=None,
        parameters=12345,
        device="cpu",
        weights_sha256="0" * 64,
        **others,
    )


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
    wanders = np.where(codes == KINDS.index(Kind.UNKNOWN), DOUBTS.index(Doubt.WANDERS), -1)
    found["verdict_doubt"] = dims, wanders.astype(np.int8)
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
    moves = np.isin(codes, [KINDS.index(Kind.ORBIT), KINDS.index(Kind.SLIDER)])
    found["mover"] = dims[:2], np.where(moves.any(-1), moves.argmax(-1), -1).astype(np.int32)
    found["mover_path"] = (
        ("plane", "tail", *dims[:2]),
        np.where(moves.any(-1), circle[..., None, None], np.nan).astype(np.float32),
    )
    counts = np.stack([(codes[-1] == kind).sum(-1) for kind in range(len(KINDS))], axis=-1)
    grids = {"displacement": ((7.5, 30.0, 120.0), (0.0125, 0.05, 0.2)), "cosine": ((0.01, 0.05), (0.5, 0.9))}
    coordinates: dict[str, Any] = {"judged_layer": np.arange(LAYERS), "change": ["window", "horizon", "seed"]}
    coordinates |= {"lag": lags, "tail": np.arange(len(tail)) + 1, "kind": list(map(str, KINDS))}
    for method, (first, second) in grids.items():
        names = (f"{method}_setting", f"{method}_setting_other")
        everywhere = np.broadcast_to(counts[:, None, None], (prompts, len(first), len(second), len(KINDS)))
        found[f"{method}_sensitivity"] = ("prompt", *names, "kind"), everywhere
        coordinates |= {names[0]: list(first), names[1]: list(second)}
    manifest = dict(study.manifest)
    manifest["behaviour"] = {
        "displacement": {"floor_factor": 30.0, "unexplained": 0.05, "significance": 1e-4},
        "cosine": {"tau": 0.05, "rho": 0.9},
        "sensitivity": {"displacement": ["floor_factor", "unexplained"], "cosine": ["tau", "rho"]},
    }
    return Study(study.dataset.assign(found).assign_coords(coordinates), manifest, study.tokens)


def _stages_and_heads(sites: list[tuple[str, int, int]], prompts: int, tokens: int) -> dict[str, Any]:
    """Numbers of a plausible size, not those of any attention."""
    rng = np.random.default_rng(0)
    shape = (len(sites), HEADS, prompts)
    found: dict[str, Any] = {}
    for name in HEAD_NAMES:
        found[name] = ("depth", "head", "prompt"), rng.uniform(0, 0.6, size=shape).astype(np.float32)
    found["strongest_sink_position"] = (
        ("depth", "head", "prompt"),
        rng.integers(tokens, size=shape).astype(np.float32),
    )
    for name in STAGE_NAMES:
        values = rng.uniform(0.2, 0.8, size=(len(sites), prompts))
        if name != "mean_token_norm":
            found[name] = ("depth", "prompt"), values
    layers = sorted({f"{stage}.{layer}" for stage, layer, _ in sites})
    found["unique_layer"] = "unique_layer", layers
    for name in ("prediction", "suppression", "folded_prediction", "folded_suppression"):
        found[f"{name}_neurons"] = "unique_layer", rng.uniform(0, 0.1, size=len(layers))
    return found


def attention_maps(sites: list[tuple[str, int, int]], tokens: int, kept: tuple[int, ...] = ()) -> dict[str, Any]:
    """Of the first prompt, at the recurrences kept (from 1): each token divides its attention between the first one and
    itself, and gives the first another share in each of the maps."""
    chosen = [site for site in sites if site[0] != "recurrent" or site[2] in kept]
    codes = np.zeros((1, len(chosen), 2, tokens, tokens), dtype=np.uint8)
    for index, head in np.ndindex(len(chosen), 2):
        first = 8 * ((2 * index + head) % 29) + 16
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
    stable = np.where(recurrences > 8, 7.0, np.nan)
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
        "token_margin": (dims, 2 + away),
        "token_top1_probability": (dims, np.exp(-1 - away)),
        "token_top1": (dims, np.where(counts[:, None, None] < 4, 7, 3) * shape.astype(np.int64)),
        "predicted_token": [3, 7],
        "predicted_text": ("predicted_token", [" five", " six"]),
        "answer": [3],
        "answer_rank": (("answer", *dims), np.where(counts[:, None, None] < 4, 2, 1) * shape.astype(np.int64)[None]),
        "answer_log_probability": (("answer", *dims), -1 - away[None]),
    }


def _layer_readouts(prompts: int, tokens: int) -> dict[str, Any]:
    """After each layer but the last."""
    dims, shape = ("layer", "prompt", "token"), np.ones((LAYERS, prompts, tokens))
    within = np.arange(LAYERS)[:, None, None] < LAYERS - 1
    return {
        "layer_top1": (dims, np.where(within, 7, -1) * shape.astype(np.int64)),
        "layer_top1_probability": (dims, np.where(within, 0.5, np.nan) * shape),
        "layer_entropy": (dims, np.where(within, 1.0, np.nan) * shape),
    }


def _exits(full: int, prompts: int, tokens: int) -> dict[str, Any]:
    """Of the same predictions, those up to a full run."""
    dims = ("exit_recurrence", "prompt", "token")
    away = 0.5 ** np.arange(1, full + 1)[:, None, None] * np.ones((full, prompts, tokens))
    step = away.copy()
    step[0] = np.nan
    return {"token_kl_to_previous": (dims, step), "token_kl_to_full": (dims, away - away[-1])}
