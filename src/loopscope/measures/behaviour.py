"""What each token's state tends to: the tails of its trajectory are kept while visits pass, then judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from loopscope.dynamics.trajectories.displacement import same_limit
from loopscope.dynamics.trajectories.judge import judge_by_all, judged_bytes, trial_kinds
from loopscope.dynamics.trajectories.noise import Noise
from loopscope.dynamics.trajectories.sensitivity import COSINE_GRID, DISPLACEMENT_GRID, judge_over_grid
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings, Settings
from loopscope.dynamics.trajectories.states import finite_tokens, known_dtype, trajectories_of
from loopscope.dynamics.trajectories.tail import longest_lag, tail_length, tail_paths
from loopscope.dynamics.verdicts import DOUBTS, KINDS, VERDICT_NUMBERS, Kind, Verdict
from loopscope.measures.base import BatchInfo, Measure, Needs, Plan, RunEnd, Variable, variable
from loopscope.measures.memory import Memory
from loopscope.measures.tails import KeptTails, Span, apart, bytes_of_step
from loopscope.models.subject import SubjectInfo
from loopscope.models.visits import Visit

CHANGES = ("window", "horizon", "half-horizon", "seed")
"""What a verdict is tried against."""

_TOKEN = "judged_layer prompt token"
_KIND_NAMES = tuple(str(kind) for kind in KINDS)

_TAIL = DisplacementSettings().window
_GRIDS = {"displacement": DISPLACEMENT_GRID, "cosine": COSINE_GRID}
_PIECE_BYTES = 2**26
"""That the method may take for the tokens that are judged at once; more would be the peak of a long analysis."""
_SEED_TAIL = 64
"""Recurrences that the two runs from different initial states are compared on, at most: they cost memory twice."""


def can_be_judged(horizon: int) -> bool:
    """Whether twice the horizon is long enough for a verdict."""
    return 2 * horizon >= DisplacementSettings().least_recurrences


def _tail(end: int, longest: int = _TAIL) -> Span | None:
    """The second half of the time since the loop began, as far as the window of the method reaches; None where that is
    too short to be judged."""
    length = tail_length(end, longest)
    return (end - length, end) if length >= DisplacementSettings().least_recurrences else None


class Behaviour(Measure):
    """Verdicts of both methods for every token and layer, tried against window, earlier horizons and another initial
    state."""

    part = "behaviour"
    variables: ClassVar[dict[str, Variable]] = {
        "verdict": variable(
            _TOKEN,
            "what the token tends to by the displacement method, as a position in kind; -1 beyond the prompt's end",
            "code",
            flags=_KIND_NAMES,
        ),
        "verdict_cosine": variable(_TOKEN, "verdict by the cosine method", "code", flags=_KIND_NAMES),
        "verdict_doubt": variable(
            _TOKEN,
            "why the displacement method cannot tell, for tokens of kind unknown; -1 for all others",
            "code",
            flags=tuple(doubt.name.lower() for doubt in DOUBTS),
        ),
        "verdict_changes": variable(
            f"change {_TOKEN}",
            "1 if the verdict at 2H changes with a shorter window, at H, at H/2, or with another initial state; "
            "0 if it stands; -1 if that was not tried",
            "code",
            flags=("stands", "changes"),
        ),
        "verdict_level": variable(_TOKEN, "largest root mean square displacement within the tail, over the norm"),
        "verdict_floor": variable(_TOKEN, "estimated noise floor, over the norm"),
        "verdict_period": variable(_TOKEN, "period of an orbit or a damped rotation", "recurrences"),
        "verdict_amplitude": variable(_TOKEN, "for an orbit: root mean square distance to its centre, over the norm"),
        "verdict_speed": variable(_TOKEN, "for a slider: mean step per recurrence, over the norm"),
        "verdict_rate": variable(
            _TOKEN,
            "factor per recurrence by which the distance to the limit shrinks, or the distance to the start grows",
        ),
        "verdict_p_value": variable(
            _TOKEN, "probability that noise alone would look as structured, corrected for the shapes that were tried"
        ),
        "displacement": variable(
            "lag prompt token",
            "for the last recurrent layer: root mean square displacement at each lag, over the norm",
        ),
        "tail_path": variable(
            "plane tail prompt token",
            "for the last recurrent layer: the path through the tail in the plane in which the token moves "
            "most, over the norm",
        ),
        "mover": variable(
            "judged_layer prompt",
            "the orbit or slider that moves most; -1 if there is none",
            "token",
        ),
        "mover_path": variable("plane tail judged_layer prompt", "the path of the mover, as in tail_path"),
        "displacement_sensitivity": variable(
            "prompt displacement_setting displacement_setting_other kind",
            "tokens of each kind at the last recurrent layer, for other values of two of the method's settings",
            "tokens",
        ),
        "cosine_sensitivity": variable(
            "prompt cosine_setting cosine_setting_other kind",
            "displacement_sensitivity for the cosine method",
            "tokens",
        ),
    }
    needs = Needs(loop=True, long_run=True)

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        plan = batch.plan
        second = _tail(2 * plan.horizon)
        assert second is not None  # or no layer were judged
        self._second = second
        self._earlier = {"horizon": _tail(plan.horizon), "half-horizon": _tail(plan.horizon // 2)}
        self._seed = _tail(min(plan.recurrences, 2 * plan.horizon), _SEED_TAIL) if batch.second_run else None
        self._tails, self._other = (
            KeptTails(batch.mask, batch.info.width, plan.judged_layers, [span for span in kept if span is not None])
            for kept in ([self._second, *self._earlier.values(), self._seed], [self._seed])
        )
        self.beside = (self._other,) if batch.second_run else ()
        self._settings, self._cosine = DisplacementSettings(), CosineSettings()
        self._dtype = known_dtype(batch.info.dtype, otherwise="float32")
        self._arrays = self._empty()
        self._own_kinds: list[Kind] = []
        """Of the run itself where it is held against one from another initial state."""

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        plan, tokens, wide = batch.plan, int(batch.counts.sum()), batch.bytes[1]
        seed = _tail(min(plan.recurrences, 2 * plan.horizon), _SEED_TAIL) if batch.second_run else None
        own = _tail(2 * plan.horizon), _tail(plan.horizon), _tail(plan.horizon // 2), seed
        number = tokens * bytes_of_step(batch.info.width, batch.itemsize)
        until_judged, of_seed = (
            len(plan.judged_layers) * number * sum(stop - first for first, stop in apart(filter(None, spans)))
            for spans in (own, (seed,))
        )
        rows = len(plan.judged_layers) * tokens
        piece = min(_PIECE_BYTES, rows * judged_bytes(tail_length(2 * plan.horizon, _TAIL)))
        long_run = until_judged + len(plan.judged_layers) * wide
        return Memory(kept=of_seed, until_ended=long_run, ended=piece, result=piece)

    @classmethod
    def absent(cls, info: SubjectInfo, plan: Plan) -> str | None:
        return None if plan.judged_layers else "twice the horizon is too short for a verdict (--horizon)"

    def visit(self, visit: Visit) -> None:
        self._tails.visit(visit)

    def ended(self, end: RunEnd) -> None:
        """Judge tokens of several layers at once, as judging costs nearly the same for a few as for many; those of the
        last layer by themselves, whose kinds are told for other thresholds as well. The kept states go as they are
        judged."""
        self._end_at(self.batch.end)
        layers, last = self.batch.plan.judged_layers, [self.batch.info.recurrent - 1]
        for some in ([layer for layer in layers if layer not in last], [layer for layer in layers if layer in last]):
            if some:
                self._judge_layers(some, last=some == last)
                if self._seed is not None:
                    self._own_kinds += self._kinds_at_seed(self._tails, some)
                for layer in some:
                    self._tails.drop(layer)

    def result(self) -> xr.Dataset:
        """What was judged, and whether another initial state changes it."""
        layers, mask = self.batch.plan.judged_layers, self.batch.mask.cpu().numpy()
        if self._seed is not None:
            changed = np.full((len(layers), *mask.shape), -1, dtype=np.int8)
            its = self._kinds_at_seed(self._other, layers)
            changed[self._told(layers)] = _differ(self._own_kinds, its)
            self._arrays["verdict_changes"][CHANGES.index("seed")] = changed
            for layer in layers:
                self._other.drop(layer)
        return self.dataset(self._arrays)

    def _judge_layers(self, layers: Sequence[int], *, last: bool) -> None:
        mask = self.batch.mask.cpu().numpy()
        positions, noise = np.argwhere(mask), self._noise(layers)
        verdicts: list[Verdict] = []
        cosine: list[Verdict] = []
        for rows in _pieces(torch.arange(len(layers) * len(positions)), self._second):
            states = self._states(self._tails, layers, self._second, rows)
            places = positions[rows.numpy()] if last else None
            finite = _finite(states)
            found = self._judge(states, finite, self._settings, noise.take(rows), places)
            # Of other layers nobody asks for the curves, hundreds of numbers a token.
            verdicts += found if last else [dataclasses.replace(each, displacement=()) for each in found]
            cosine += self._judge(states, finite, self._cosine, None, places)
            if places is not None and len(finite):
                prompts, columns = places[finite.numpy()].T
                paths = tail_paths(trajectories_of(states, finite), self._second[0] + 1).numpy()
                self._arrays["tail_path"][:, : paths.shape[1], prompts, columns] = paths.transpose(2, 1, 0)
        numbers: dict[str, Sequence[float]] = {
            "verdict": _codes(verdicts),
            "verdict_cosine": _codes(cosine),
            "verdict_doubt": [-1 if each.doubt is None else DOUBTS.index(each.doubt) for each in verdicts],
            **{f"verdict_{name}": [getattr(each, name) for each in verdicts] for name in VERDICT_NUMBERS},
        }
        first = self.batch.plan.judged_layers.index(layers[0])
        there = slice(first, first + len(layers))
        for name, values in numbers.items():
            self._arrays[name][there][:, mask] = np.reshape(values, (len(layers), -1))
        changes = self._changes(layers, verdicts, noise)
        self._arrays["verdict_changes"][:, there][:, :, mask] = changes.reshape(len(changes), len(layers), -1)
        for place, layer in enumerate(layers):
            its = verdicts[place * len(positions) : (place + 1) * len(positions)]
            for prompt, row in movers(its, mask):
                self._arrays["mover"][first + place, prompt] = row - mask[:prompt].sum()
                states = self._tails.trajectories(layer, self._second, torch.tensor([row]))
                path = tail_paths(states, self._second[0] + 1)[0]
                self._arrays["mover_path"][:, : len(path), first + place, prompt] = path.T.numpy()
        if last:
            self._arrays["displacement"] = _curves(verdicts, mask, longest_lag(self._arrays["tail_path"].shape[1]))

    def _empty(self) -> dict[str, np.ndarray]:
        """Its arrays, without anything in them."""
        layers, prompts, tokens = (len(self.batch.plan.judged_layers), *self.batch.mask.shape)
        shape, length = (layers, prompts, tokens), self._second[1] - self._second[0]
        arrays = {
            "verdict": np.full(shape, -1, dtype=np.int8),
            "verdict_cosine": np.full(shape, -1, dtype=np.int8),
            "verdict_doubt": np.full(shape, -1, dtype=np.int8),
            "verdict_changes": np.full((len(CHANGES), *shape), -1, dtype=np.int8),
            "mover": np.full(shape[:2], -1, dtype=np.int32),
            "mover_path": np.full((2, length, *shape[:2]), np.nan, dtype=np.float32),
            **{f"verdict_{name}": np.full(shape, np.nan, dtype=np.float32) for name in VERDICT_NUMBERS},
        }
        if self.batch.info.recurrent - 1 in self.batch.plan.judged_layers:
            arrays["tail_path"] = np.full((2, length, prompts, tokens), np.nan, dtype=np.float32)
            for name, grid in _GRIDS.items():
                steps = (len(values) for values in grid.values)
                arrays[f"{name}_sensitivity"] = np.zeros((prompts, *steps, len(KINDS)), dtype=np.int64)
        return arrays

    def _end_at(self, recurrence: int) -> None:
        """The run has ended there, at the second horizon or before."""
        if recurrence < self._second[1]:
            whole, self._second = self._second, (self._second[0], recurrence)
            self._tails.cut(whole, self._second)

    def _states(self, tails: KeptTails, layers: Sequence[int], span: Span, rows: Tensor) -> Tensor:
        """Trajectories of some (layer, token), numbered through, in their order."""
        tokens = int(self.batch.counts.sum())
        own = [rows[rows // tokens == place] - place * tokens for place in range(len(layers))]
        there = zip(layers, own, strict=True)
        return torch.cat([tails.trajectories(layer, span, some) for layer, some in there if len(some)])

    def _noise(self, layers: Sequence[int]) -> Noise:
        """What the twin says of the tokens of some layers; without a twin, nothing."""
        twin = self.batch.twin
        if twin is None:
            return Noise.of(self._dtype, len(layers) * int(self.batch.counts.sum()))
        return Noise.together([twin.noise(layer) for layer in layers])

    def _judge(
        self,
        states: Tensor,
        rows: Tensor,
        settings: Settings,
        noise: Noise | None,
        places: NDArray[np.integer] | None,
    ) -> list[Verdict]:
        """By one of the methods, where the states are finite; of the tokens at some (token, prompt and position), also
        how the kinds depend on its thresholds. What is no longer finite has diverged in the loop: broken states were
        refused before it."""
        gone = Verdict(kind=Kind.DIVERGING, reason="It is no longer finite.", method="displacement")
        verdicts = [gone] * len(states)
        if len(rows):
            some, noise = trajectories_of(states, rows), None if noise is None else noise.take(rows)
            first = self._second[0] + 1
            if places is None:
                found, _ = judge_by_all(
                    some, self._dtype, settings, first_recurrence=first, check_order=False, noise=noise
                )
            else:
                found, kinds = judge_over_grid(some, self._dtype, settings, first, noise)
                name = "cosine" if isinstance(settings, CosineSettings) else "displacement"
                counts = self._arrays[f"{name}_sensitivity"]
                for kind in range(len(KINDS)):
                    np.add.at(counts[..., kind], places[rows.numpy(), 0], kinds == kind)
            for row, verdict in zip(rows.tolist(), found, strict=True):
                verdicts[row] = verdict
        return verdicts

    def _try(self, states: Tensor, span: Span, noise: Noise) -> list[Kind]:
        """What a verdict is held against, within another span."""
        rows = _finite(states)
        kinds = [Kind.DIVERGING] * len(states)
        found = trial_kinds(trajectories_of(states, rows), self._settings, span[0] + 1, noise.take(rows))
        for row, kind in zip(rows.tolist(), found, strict=True):
            kinds[row] = kind
        return kinds

    def _changes(self, layers: Sequence[int], verdicts: list[Verdict], noise: Noise) -> NDArray[np.int8]:
        """By what a verdict is tried against, whether it changes, (change, layer and token): 1 or 0, and -1 where that
        could not be tried, or there is nothing to try since the trajectory did not tell."""
        changed = np.full((len(CHANGES), len(verdicts)), -1, dtype=np.int8)
        told = np.array([verdict.kind is not Kind.UNKNOWN for verdict in verdicts])
        known = [verdict for verdict, is_told in zip(verdicts, told, strict=True) if is_told]
        changed[CHANGES.index("window"), told] = ["window" in verdict.unstable for verdict in known]
        for name, span in self._earlier.items():
            if span is not None:
                found = self._tried(self._tails, layers, span, told, noise)
                changed[CHANGES.index(name), told] = _differ([verdict.kind for verdict in known], found)
        return changed

    def _told(self, layers: Sequence[int]) -> NDArray[np.bool_]:
        """Of which tokens of these layers the trajectory tells, (layer, prompt, token)."""
        codes = self._arrays["verdict"][[self.batch.plan.judged_layers.index(layer) for layer in layers]]
        told: NDArray[np.bool_] = (codes != Kind.UNKNOWN.code) & self.batch.mask.cpu().numpy()
        return told

    def _kinds_at_seed(self, tails: KeptTails, layers: Sequence[int]) -> list[Kind]:
        """Of those, in the recurrences that runs from two initial states are compared on."""
        assert self._seed is not None
        told = self._told(layers)[:, self.batch.mask.cpu().numpy()].flatten()
        return self._tried(tails, layers, self._seed, told, self._noise(layers))

    def _tried(
        self, tails: KeptTails, layers: Sequence[int], span: Span, told: NDArray[np.bool_], noise: Noise
    ) -> list[Kind]:
        """Of the tokens that are told, within another span."""
        return [
            kind
            for rows in _pieces(torch.from_numpy(told.nonzero()[0]), span)
            for kind in self._try(self._states(tails, layers, span, rows), span, noise.take(rows))
        ]


def _pieces(rows: Tensor, span: Span) -> Iterator[Tensor]:
    """As many at a time as take little memory where they are judged within that span."""
    yield from rows.split(max(1, _PIECE_BYTES // judged_bytes(span[1] - span[0]))) if len(rows) else ()


def _finite(states: Tensor) -> Int[Tensor, " row"]:
    """The rows of those that are."""
    return finite_tokens(states).nonzero()[:, 0]


def _curves(verdicts: list[Verdict], mask: NDArray[np.bool_], lags: int) -> NDArray[np.float32]:
    """Displacement at each lag, (lag, prompt, token)."""
    curves = np.full((lags, *mask.shape), np.nan, dtype=np.float32)
    padded = [(*verdict.displacement, *[np.nan] * (lags - len(verdict.displacement))) for verdict in verdicts]
    curves[:, mask] = np.array(padded, dtype=np.float32).T
    return curves


def movers(verdicts: list[Verdict], mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(prompt, place among all tokens) of the orbit or slider that moves most in each prompt that has one."""
    levels = np.array([each.level if each.kind in (Kind.ORBIT, Kind.SLIDER) else np.nan for each in verdicts])
    ends = mask.sum(-1).cumsum()
    spans = enumerate(zip(ends - mask.sum(-1), ends, strict=True))
    return [(n, int(a + np.nanargmax(levels[a:b]))) for n, (a, b) in spans if np.isfinite(levels[a:b]).any()]


def _codes(verdicts: list[Verdict]) -> list[int]:
    return [verdict.kind.code for verdict in verdicts]


def _differ(one: list[Kind], other: list[Kind]) -> list[bool]:
    return [not same_limit(mine, its) for mine, its in zip(one, other, strict=True)]
