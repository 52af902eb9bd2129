"""The forward passes of one batch, and the measures that watch them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from loopscope._util.shapes import Logits, States
from loopscope.errors import NonFiniteError
from loopscope.measures.base import BatchInfo, Measure, Plan, RunEnd
from loopscope.measures.horizon import Horizons
from loopscope.measures.registry import MEASURES, asked_for, why_absent
from loopscope.measures.twin import Nudges
from loopscope.models.subject import Batch, ForkedRun, NudgedRun, Run, Subject
from loopscope.models.visits import LoopState, Observer, Visit

Tick = Callable[[str], None]
"""Called after each recurrence of each run ("passes"), each step towards eigenvalues, and the verdicts of the batch."""


def planned_batch(subject: Subject, batch: Batch, plan: Plan) -> BatchInfo:
    """A batch that nothing was run of yet, on whatever device it lies."""
    return BatchInfo(
        subject=subject,
        batch=batch,
        plan=plan,
        second_run=_asked(subject, plan, "second_run"),
        has_twin=_asked(subject, plan, "twin"),
    )


def steps_of(subject: Subject, batch: Batch, plan: Plan, *, keep: bool) -> dict[str, int]:
    """How often `tick` is called for each phase of a batch."""
    if not subject.info.is_looped:
        return {"passes": 1}
    asked = planned_batch(subject, batch, plan)
    other = plan.recurrences * plan.other_starts if asked.second_run else 0
    other += plan.horizon if asked.has_twin else 0
    end = 2 * plan.horizon
    passes = other + (max(plan.recurrences, end) if keep else plan.recurrences + end)
    products = sum(kind.steps(asked) for kind in asked_for(asked))
    steps = {"passes": passes, "eigenvalues": products, "verdicts": int(bool(plan.judged_layers))}
    return {phase: count for phase, count in steps.items() if count}


def measure_batch(
    subject: Subject, batch: Batch, plan: Plan, tick: Tick, *, keep: bool, first_prompt: int = 0
) -> xr.Dataset:
    """Run one batch as planned and reduce it to arrays; `keep` has the measured states kept and replayed, rather than
    run a second time, for measures that need the states at the horizon.

    Raises `NonFiniteError` for a state that is NaN or infinite before the loop could have made it grow. A model that
    diverges in the loop is a result, found in `diverged_at`.
    """
    with ExitStack() as ends:
        runs = _Runs(subject, batch, plan.seed, ends)
        info = BatchInfo.of(subject, batch, plan, first_prompt=first_prompt)
        measures, horizon = (
            _measure_loop(runs, info, tick, keep=keep)
            if subject.info.is_looped
            else (_measure_once(runs, info, tick), None)
        )
        found = []
        while measures:
            # One by one, so that what a measure kept goes as soon as it is reduced.
            found.append(measures.pop(0).result())
        if plan.judged_layers:
            tick("verdicts")
        # No two measures have a variable in common; xarray's own merging compares all of them with each other.
        arrays = xr.Dataset({name: values for each in found for name, values in each.variables.items()})
        return arrays.assign(diverged_at=("prompt", _diverged_at(arrays, info, horizon)))


def _asked(subject: Subject, plan: Plan, need: Literal["second_run", "twin"]) -> bool:
    """Whether a measure asks for such a run, and the model has one."""
    return any(getattr(kind.needs, need) and why_absent(kind, subject.info, plan) is None for kind in MEASURES)


class _Runs:
    """Starts runs of one batch, and closes them when all is done or fails."""

    def __init__(self, subject: Subject, batch: Batch, seed: int, ends: ExitStack) -> None:
        self.subject = subject
        self.batch = batch
        self.seed = seed
        self._ends = ends

    def start(self, recurrences: int, observers: Iterable[Observer] = (), initial_state: States | None = None) -> Run:
        run = self.subject.start(
            self.batch, recurrences=recurrences, seed=self.seed, initial_state=initial_state, observers=observers
        )
        self._ends.callback(run.close)
        return run

    def start_elsewhere(self, recurrences: int, count: int) -> list[Run]:
        """From as many other initial states, where the model has them."""
        others = [self.subject.other_initial_state(self.batch, self.seed + place) for place in range(count)]
        return [self.start(recurrences, initial_state=other) for other in others if other is not None]

    def start_twin(self, run: Run, horizon: int) -> NudgedRun | None:
        """Of a run that stands at the horizon: a copy of it, or where it cannot be copied, another one as far. None
        where runs cannot be nudged."""
        if isinstance(run, ForkedRun):
            return run.fork()
        if not isinstance(run, NudgedRun):
            return None
        other = self.start(2 * horizon)
        assert isinstance(other, NudgedRun)
        for _ in range(horizon):
            other.advance()
        return other


def _measure_loop(runs: _Runs, batch: BatchInfo, tick: Tick, *, keep: bool) -> tuple[list[Measure], Horizons]:
    """To the second horizon and through the measured recurrences: in two runs, or in one whose states are kept."""
    plan = batch.plan
    end = 2 * plan.horizon
    elsewhere = plan.other_starts if _asked(runs.subject, plan, "second_run") else 0
    others = runs.start_elsewhere(plan.recurrences, elsewhere)
    batch.second_run, batch.has_twin = bool(others), _asked(runs.subject, plan, "twin")
    batch.horizon = horizon = Horizons(batch)
    kinds = list(asked_for(batch))
    far = [horizon if kind is Horizons else kind(batch) for kind in kinds if kind.needs.long_run]

    def made() -> tuple[list[Measure], list[Measure]]:
        """Those that wait for the horizon, and those that need no more than the measured run."""
        near = [kind(batch) for kind in kinds if not kind.needs.long_run]
        return [each for each in near if each.needs.horizon], [each for each in near if not each.needs.horizon]

    now: list[Observer]
    guard = _FiniteGuard(batch)
    nudged = [each.nudged for each in far if each.nudged is not None]
    nudges = Nudges(batch)
    twin: NudgedRun | None = None

    def advance(run: Run, first: int, last: int, observers: Sequence[Observer], *, measured: bool, long: bool) -> None:
        """Measured, to the second horizon, or both; what was to be watched and is not run any more counts as done."""
        nonlocal twin
        for recurrence in range(first, last):
            watched = long and recurrence < batch.end
            beyond = recurrence >= plan.horizon
            if watched and beyond and nudged and twin is None:
                twin = runs.start_twin(run, plan.horizon)
            if watched or measured:
                run.advance([guard, *far, *observers] if watched else observers)
            tick("passes")
            if long and beyond and batch.has_twin:
                if watched and twin is not None:
                    twin.nudge(nudges.factors(recurrence))
                    twin.advance(nudged)
                tick("passes")
            if watched and batch.rest is not None:
                batch.rest.look(recurrence + 1)
            for place, other in enumerate(others if measured else ()):
                # Some look at the first alone.
                other.advance([each.beside[place] for each in measures if place < len(each.beside)])
                tick("passes")
            if measured and recurrence + 1 == plan.recurrences:
                run.decode(now)
            if watched and recurrence + 1 == batch.end:
                _end(far, run, tick, runs)

    if keep:
        waiting, live = made()
        measures = [*far, *waiting, *live]
        kept = _Keeper(any(each.needs.attention for each in waiting), values=bool(plan.support_every))
        now = [*live, *(_OutsideTheLoop(each) for each in waiting)]
        run = runs.start(max(plan.recurrences, end), [guard, *now])
        _start(measures, run.state)
        both = min(plan.recurrences, end)
        advance(run, 0, both, [kept, *now], measured=True, long=True)
        advance(run, both, plan.recurrences, [kept, *now], measured=True, long=False)
        advance(run, both, end, [], measured=False, long=True)
        kept.replay(waiting)
    else:
        long_run = runs.start(end, [guard])
        _start(far, long_run.state)
        advance(long_run, 0, end, [], measured=False, long=True)
        # Not before, as their arrays are as long as the measured run.
        waiting, live = made()
        measures = [*far, *waiting, *live]
        now = [*waiting, *live]
        run = runs.start(plan.recurrences, now)
        _start([*waiting, *live], run.state)
        advance(run, 0, plan.recurrences, now, measured=True, long=False)
    _end([*live, *waiting], run, tick, runs)
    return sorted(measures, key=lambda measure: kinds.index(type(measure))), horizon


def _measure_once(runs: _Runs, batch: BatchInfo, tick: Tick) -> list[Measure]:
    """A feed-forward model: one pass."""
    measures = [kind(batch) for kind in asked_for(batch)]
    guard = _FiniteGuard(batch)
    run = runs.start(0, [guard, *measures])
    guard.check()
    logits = run.decode(measures)
    tick("passes")
    for measure in measures:
        measure.ended(RunEnd(run, lambda: None, lambda recurrences, state: logits))
    return measures


def _start(measures: Iterable[Measure], state: States | None) -> None:
    for measure in measures:
        measure.start(state)


def _end(measures: Iterable[Measure], run: Run, tick: Tick, runs: _Runs) -> None:
    for measure in measures:
        measure.ended(RunEnd(run, partial(tick, "eigenvalues"), partial(_decode, runs, run)))


def _decode(runs: _Runs, measured: Run, recurrences: int, state: States | None) -> Logits:
    """Logits after that many recurrences of the measured run, whose state was this; of another run if it takes none."""
    if runs.subject.info.state_can_be_set:
        return measured.decode(state=state)
    run = runs.start(recurrences)
    for _ in range(recurrences):
        run.advance()
    logits = run.decode()
    run.close()
    return logits


def _diverged_at(arrays: xr.Dataset, batch: BatchInfo, horizon: Horizons | None) -> np.ndarray:
    """The first recurrence, from 1, whose state is not finite, in the long run or the measured one; -1 if none."""
    if horizon is None:
        return np.full(batch.prompts, -1, dtype=np.int64)
    found = horizon.diverged_at.cpu().numpy().astype(np.int64)
    broken = ~np.isfinite(arrays["residual_norm"].values).all(axis=0)
    measured = np.where(broken.any(axis=0), broken.argmax(axis=0) + 1, -1)
    return np.where(found < 0, measured, np.where(measured < 0, found, np.minimum(found, measured)))


class _Keeper(Observer):
    """Keeps what was announced, to tell it again to a measure that can only now understand it."""

    def __init__(self, attention: bool, *, values: bool) -> None:
        self._attention, self._values = attention, values
        self._events: list[Visit | LoopState] = []

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        # Without queries, keys and values, each as large as the state, unless somebody will read them.
        view = visit.attention if self._attention else None
        view = view if view is None or self._values else view.without_values()
        self._events.append(dataclasses.replace(visit, attention=view))

    def loop_state(self, loop_state: LoopState) -> None:
        self._events.append(loop_state)

    def replay(self, observers: Sequence[Observer]) -> None:
        for event in self._events:
            for observer in observers:
                if isinstance(event, Visit):
                    observer.visit(event)
                else:
                    observer.loop_state(event)
        self._events.clear()


class _OutsideTheLoop(Observer):
    """Lets an observer see prelude and coda only; it receives the loop when the horizon is known."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            self._observer.visit(visit)


class _FiniteGuard(Observer):
    """Refuses states that are broken before the loop can be blamed, when the first recurrence is over: to ask layer by
    layer would be to wait for a GPU each time."""

    def __init__(self, batch: BatchInfo) -> None:
        self._batch = batch
        self._finite: dict[str, Tensor] = {}

    def visit(self, visit: Visit) -> None:
        if visit.recurrence <= 1:
            finite: Tensor = torch.isfinite(visit.residual).all(-1) | ~self._batch.mask
            self._finite[visit.label] = finite.all(-1)

    def loop_state(self, loop_state: LoopState) -> None:
        self.check()

    def check(self) -> None:
        """Raises `NonFiniteError` for the first layer whose states are not finite."""
        if not self._finite:
            return
        labels, finite = list(self._finite), torch.stack(list(self._finite.values()))
        self._finite.clear()
        if not bool(finite.all()):
            layer, row = (~finite).nonzero()[0].tolist()
            raise NonFiniteError(
                f"The state after {labels[layer]} of prompt {self._batch.first_prompt + row} is NaN or infinite in "
                f"{self._batch.info.dtype}, before the loop could have made it grow; try a wider --dtype, "
                f"or check the weights."
            )
