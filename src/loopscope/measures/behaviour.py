"""What each token's state tends to: the tails of its trajectory are kept while visits pass, then judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopscope.dynamics.trajectories.calibration import COSINE_GRID, DISPLACEMENT_GRID, sensitivity
from loopscope.dynamics.trajectories.displacement import same_limit
from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings
from loopscope.dynamics.trajectories.states import known_dtype
from loopscope.dynamics.trajectories.tail import tail_length, tail_paths
from loopscope.dynamics.verdicts import KINDS, Kind, Verdict
from loopscope.measures.base import Arrays, Frame, Named
from loopscope.models.visits import Observer, Visit

CHANGES = ("window", "horizon", "seed")
"""What a verdict is tried against."""
VERDICT_NUMBERS = ("level", "floor", "period", "amplitude", "speed", "rate", "p_value")
"""Fields of a `Verdict` that a study keeps, as `verdict_<name>`."""

Span = tuple[int, int]
"""Recurrences [first, stop), from 0."""

_TAIL = DisplacementSettings().window
_SEED_TAIL = 64
"""Recurrences that the two runs from different initial states are compared on, at most: they cost memory twice."""


class StateTails(Observer):
    """Keeps the raw outputs of some recurrent layers in some spans of recurrences, in the model's dtype, off the
    device."""

    def __init__(self, frame: Frame, layers: Sequence[int], spans: Sequence[Span]) -> None:
        self._mask = frame.mask.cpu()
        self._spans = tuple(spans)
        self._states: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent" or visit.layer not in self._states:
            return
        if any(first <= visit.recurrence < stop for first, stop in self._spans):
            self._states[visit.layer][visit.recurrence] = visit.residual.detach().cpu()

    def trajectories(self, layer: int, span: Span) -> Tensor:
        """(token of all prompts in order, recurrence, width)."""
        kept = self._states[layer]
        return torch.stack([kept[recurrence][self._mask] for recurrence in range(*span)], dim=1)

    def drop(self, layer: int) -> None:
        self._states[layer].clear()


def can_be_judged(horizon: int) -> bool:
    """Whether twice the horizon is long enough for a verdict."""
    return 2 * horizon >= DisplacementSettings().least_recurrences


def behaviour_spans(recurrences: int, horizon: int) -> tuple[Span, Span | None, Span | None]:
    """The tails that are judged: at the second horizon, at the horizon, and where the measured run ends, of which there
    is a second one from another initial state. None where too few recurrences are left.

    A tail is the second half of the time since the loop began, as far as the window of the method reaches.
    """
    least = DisplacementSettings().least_recurrences
    first, seed = _tail(horizon, _TAIL), _tail(min(recurrences, 2 * horizon), _SEED_TAIL)
    return (
        _tail(2 * horizon, _TAIL),
        first if first[1] - first[0] >= least else None,
        seed if seed[1] - seed[0] >= least else None,
    )


def _tail(end: int, longest: int) -> Span:
    return end - tail_length(end, longest), end


class Behaviour:
    """Verdicts of both methods for every token and layer of a batch, tried against window, horizon and initial state.

    `tails` has seen the pass to the second horizon, `other` (where there is one) the run from another initial state.
    """

    def __init__(
        self, frame: Frame, tails: StateTails, other: StateTails | None, recurrences: int, horizon: int
    ) -> None:
        self.frame = frame
        self._tails = tails
        self._other = other
        self._second, self._first, self._seed = behaviour_spans(recurrences, horizon)
        self._settings, self._cosine = DisplacementSettings(), CosineSettings()
        self._dtype = known_dtype(frame.info.dtype, otherwise="float32")

    def finish(self, layers: Sequence[int]) -> Arrays:
        """Judge layer by layer; the kept states go as they are judged."""
        mask = self.frame.mask.cpu().numpy()
        shape = (len(layers), *mask.shape)
        kinds, cosine = np.full(shape, -1, dtype=np.int8), np.full(shape, -1, dtype=np.int8)
        numbers = np.full((len(VERDICT_NUMBERS), *shape), np.nan, dtype=np.float32)
        changed = np.full((len(CHANGES), *shape), -1, dtype=np.int8)
        arrays = Arrays()
        for place, layer in enumerate(layers):
            states = self._tails.trajectories(layer, self._second)
            verdicts = self._judge(states, self._second)
            kinds[place][mask] = _codes(verdicts)
            cosine[place][mask] = _codes(self._judge(states, self._second, cosine=True))
            for index, name in enumerate(VERDICT_NUMBERS):
                numbers[index, place][mask] = [getattr(verdict, name) for verdict in verdicts]
            for index, found in enumerate(self._changes(layer, verdicts)):
                if found is not None:
                    changed[index, place][mask] = found
            if layer == self.frame.info.recurrent - 1:
                self._last_layer(arrays, states, verdicts, mask)
            self._tails.drop(layer)
            if self._other is not None:
                self._other.drop(layer)
        dims = ("judged_layer", "prompt", "token")
        arrays.per_prompt["verdict"] = Named(dims, kinds)
        arrays.per_prompt["verdict_cosine"] = Named(dims, cosine)
        arrays.per_prompt["verdict_changes"] = Named(("change", *dims), changed)
        for index, name in enumerate(VERDICT_NUMBERS):
            arrays.per_prompt[f"verdict_{name}"] = Named(dims, numbers[index])
        return arrays

    def _judge(self, states: Tensor, span: Span, *, cosine: bool = False, trial: bool = False) -> list[Verdict]:
        """States that are no longer finite have diverged in the loop: broken ones were refused before it."""
        finite = states.isfinite().all(-1).all(-1)
        gone = Verdict(kind=Kind.DIVERGING, reason="It is no longer finite.", method="displacement")
        verdicts = [gone] * len(states)
        rows = finite.nonzero()[:, 0]
        if len(rows):
            found = judge(
                states[rows],
                self._dtype,
                "cosine" if cosine else "displacement",
                settings=self._cosine if cosine else self._settings,
                first_recurrence=span[0],
                check_order=False,
                # A trial is held against a verdict, and not tried itself.
                try_window=not trial,
            )
            for row, verdict in zip(rows.tolist(), found, strict=True):
                verdicts[row] = verdict
        return verdicts

    def _changes(self, layer: int, verdicts: list[Verdict]) -> list[list[bool] | None]:
        """By what a verdict is tried against: whether it changes; None where it could not be tried."""
        found: list[list[bool] | None] = [["window" in verdict.unstable for verdict in verdicts], None, None]
        if self._first is not None:
            found[1] = _differ(
                verdicts, self._judge(self._tails.trajectories(layer, self._first), self._first, trial=True)
            )
        if self._seed is not None and self._other is not None:
            runs = [tails.trajectories(layer, self._seed) for tails in (self._tails, self._other)]
            found[2] = _differ(*(self._judge(states, self._seed, trial=True) for states in runs))
        return found

    def _last_layer(self, arrays: Arrays, states: Tensor, verdicts: list[Verdict], mask: NDArray[np.bool_]) -> None:
        """Displacement curves, and how the kinds depend on the thresholds."""
        lags = max(len(verdict.displacement) for verdict in verdicts)
        curves = np.full((lags, *mask.shape), np.nan, dtype=np.float32)
        padded = [(*verdict.displacement, *[np.nan] * (lags - len(verdict.displacement))) for verdict in verdicts]
        curves[:, mask] = np.array(padded, dtype=np.float32).T
        arrays.per_prompt["displacement"] = Named(("lag", "prompt", "token"), curves)
        rows = states.isfinite().all(-1).all(-1)
        paths = np.full((2, states.shape[1], *mask.shape), np.nan, dtype=np.float32)
        found = np.full((len(states), states.shape[1], 2), np.nan, dtype=np.float32)
        if bool(rows.any()):
            found[rows.numpy()] = tail_paths(states[rows], self._second[0]).numpy()
        paths[:, :, mask] = found.transpose(2, 1, 0)
        arrays.per_prompt["tail_path"] = Named(("plane", "tail", "prompt", "token"), paths)
        prompts = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)[mask][rows.numpy()]
        for settings, name in ((self._settings, "displacement"), (self._cosine, "cosine")):
            grid = (COSINE_GRID if name == "cosine" else DISPLACEMENT_GRID).values
            counts = np.zeros((len(mask), len(grid[0]), len(grid[1]), len(KINDS)), dtype=np.int64)
            if bool(rows.any()):
                places = sensitivity(states[rows], self._dtype, settings, self._second[0])
                for kind in range(len(KINDS)):
                    np.add.at(counts[..., kind], prompts, places == kind)
            first, second = (f"{name}_setting", f"{name}_setting_other")
            arrays.per_prompt[f"{name}_sensitivity"] = Named(("prompt", first, second, "kind"), counts)


def _codes(verdicts: list[Verdict]) -> list[int]:
    return [KINDS.index(verdict.kind) for verdict in verdicts]


def _differ(one: list[Verdict], other: list[Verdict]) -> list[bool]:
    return [not same_limit(mine.kind, its.kind) for mine, its in zip(one, other, strict=True)]
