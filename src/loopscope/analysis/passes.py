"""The forward passes of one batch, and the measures that watch them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor

from loopscope._util.shapes import Logits, States
from loopscope.analysis.plan import Plan
from loopscope.errors import NonFiniteError
from loopscope.measures.base import Arrays, Frame, Measure, Named
from loopscope.measures.behaviour import Behaviour, StateTails, behaviour_spans
from loopscope.measures.convergence import Convergence
from loopscope.measures.heads import HeadMeasures
from loopscope.measures.horizon import HorizonStates, noise_floor
from loopscope.measures.maps import AttentionMaps
from loopscope.measures.readout import Readout
from loopscope.measures.similarity import AttentionCycle, CycleSimilarity
from loopscope.measures.stability import TokenStability, eigenvalue_products
from loopscope.measures.stages import StageMeasures
from loopscope.measures.trajectories import PathIndependence, Trajectories
from loopscope.models.subject import Batch, Run, Subject, SubjectInfo
from loopscope.models.visits import LoopState, Observer, Visit

Tick = Callable[[], None]
"""Called after each recurrence of each run, and each product for eigenvalues."""


def steps_of(subject: Subject, batch: Batch, plan: Plan) -> int:
    """Recurrences of all runs of a batch, and products for its eigenvalues: how often `tick` is called."""
    if not subject.info.is_looped:
        return 0
    other = plan.recurrences if _has_other_path(subject.info, plan) else 0
    if plan.eigenvalues is not None:
        other += eigenvalue_products(subject, batch, plan.eigenvalues)
    if plan.keep:
        return max(plan.recurrences, 2 * plan.horizon) + other
    return plan.recurrences + 2 * plan.horizon + other


def measure_batch(subject: Subject, batch: Batch, plan: Plan, tick: Tick) -> Arrays:
    """Run one batch as planned and reduce it to arrays.

    Raises `NonFiniteError` for a state that is NaN or infinite before the loop could have made it grow. A model that
    diverges in the loop is a result, found in `diverged_at`.
    """
    with ExitStack() as ends:
        runs = _Runs(subject, batch, plan.seed, ends)
        frame = Frame.of(subject.info, batch, subject.device, plan.recurrences if subject.info.is_looped else 0)
        if not subject.info.is_looped:
            return _measure_once(runs, plan, frame)
        return _measure_loop(runs, plan, frame, tick)


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


def _measure_loop(runs: _Runs, plan: Plan, frame: Frame, tick: Tick) -> Arrays:
    horizon = HorizonStates(frame, plan.horizon)
    live = _Live(runs, plan, frame)
    heads = _heads(frame, plan, horizon)
    kept = _Keeper(attention=heads is not None)
    floor = Arrays()

    def advance(run: Run, first: int, last: int, observers: list[Observer], measured: bool) -> None:
        nonlocal floor
        for recurrence in range(first, last):
            run.advance(observers)
            tick()
            if measured:
                live.after(recurrence + 1, run, tick)
            if recurrence + 1 == 2 * plan.horizon and horizon in observers:
                if "noise-floor" not in plan.skip:
                    floor = noise_floor(frame, run)
                if stability is not None and plan.eigenvalues is not None:
                    stability.take(run, tick)

    guard = _FiniteGuard(frame, plan.first_prompt)
    end = 2 * plan.horizon
    tails = _tails(frame, plan, whole=True)
    stability = _stability(runs, plan, frame)
    long: list[Observer] = [each for each in (horizon, tails, stability) if each is not None]
    if heads is not None:
        live.watch(_OutsideTheLoop(heads) if plan.keep else heads)
    if plan.keep:
        whole = max(plan.recurrences, end)
        run = runs.start(whole, [guard, *live.observers])
        initial_state = run.state
        if stability is not None:
            stability.start(initial_state)
        both = min(plan.recurrences, end)
        advance(run, 0, both, [guard, *long, kept, *live.observers], measured=True)
        advance(run, both, plan.recurrences, [kept, *live.observers], measured=True)
        advance(run, both, end, [*long], measured=False)
    else:
        long_run = runs.start(end, [guard])
        if stability is not None:
            stability.start(long_run.state)
        advance(long_run, 0, end, [guard, *long], measured=False)
        run = runs.start(plan.recurrences, live.observers)
        initial_state = run.state
    convergence = Convergence(frame, horizon)
    convergence.start(initial_state)
    if plan.keep:
        kept.replay(convergence if heads is None else _Both(convergence, heads))
    else:
        advance(run, 0, plan.recurrences, [convergence, *live.observers], measured=True)
    if live.readout is not None:
        live.readout.decode(partial(_decode, runs, run))
    arrays = Arrays()
    for part in (convergence.finish(), horizon.finish(), live.finish(), floor):
        arrays.update(part)
    if heads is not None:
        arrays.update(heads.finish())
    if tails is not None:
        behaviour = Behaviour(frame, tails, live.other_tails, plan.recurrences, plan.horizon)
        arrays.update(behaviour.finish(plan.judged_layers))
    if stability is not None:
        arrays.update(stability.finish())
    arrays.per_prompt["diverged_at"] = _diverged_at(arrays)
    return arrays


def _stability(runs: _Runs, plan: Plan, frame: Frame) -> TokenStability | None:
    if "stability" in plan.skip:
        return None
    return TokenStability(runs.subject, runs.batch, frame, plan.horizon, plan.eigenvalues)


def _tails(frame: Frame, plan: Plan, *, whole: bool) -> StateTails | None:
    """What keeps the states that are judged: of the run to the second horizon, or of the one from another state."""
    if not plan.judged_layers:
        return None
    second, first, seed = behaviour_spans(plan.recurrences, plan.horizon)
    spans = [span for span in ((second, first, seed) if whole else (seed,)) if span is not None]
    return StateTails(frame, plan.judged_layers, spans)


def _measure_once(runs: _Runs, plan: Plan, frame: Frame) -> Arrays:
    """A feed-forward model: one pass."""
    live = _Live(runs, plan, frame)
    heads = _heads(frame, plan, None)
    if heads is not None:
        live.watch(heads)
    guard = _FiniteGuard(frame, plan.first_prompt)
    run = runs.start(0, [guard, *live.observers])
    logits = run.decode(live.observers)
    if live.readout is not None:
        live.readout.decode(lambda recurrences, state: logits)
    arrays = live.finish()
    if heads is not None:
        arrays.update(heads.finish())
    arrays.per_prompt["diverged_at"] = Named(("prompt",), np.full(frame.prompts, -1, dtype=np.int64))
    return arrays


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


def _heads(frame: Frame, plan: Plan, horizon: HorizonStates | None) -> HeadMeasures | None:
    """The measures of attention, if they are asked for and any attention can be seen."""
    if "heads" in plan.skip or frame.info.heads is None:
        return None
    attention = (lambda layer: None) if horizon is None else horizon.attention
    return HeadMeasures(frame, frame.info.heads, attention, plan.head_stable)


def _diverged_at(arrays: Arrays) -> Named:
    """The first recurrence whose state is not finite, among the horizon's pass and the measured one."""
    found = arrays.per_prompt["diverged_at"].values
    broken = ~np.isfinite(arrays.per_prompt["residual_norm"].values).all(axis=0)
    measured = np.where(broken.any(axis=0), broken.argmax(axis=0), -1)
    earliest = np.where(found < 0, measured, np.where(measured < 0, found, np.minimum(found, measured)))
    return Named(("prompt",), earliest)


def _has_other_path(info: SubjectInfo, plan: Plan) -> bool:
    return "path-independence" not in plan.skip and info.can_start_elsewhere


class _Live:
    """The measures that need no horizon: they watch the measured run while it goes by."""

    def __init__(self, runs: _Runs, plan: Plan, frame: Frame) -> None:
        self.cycle: CycleSimilarity | None = None
        self.attention_cycle: AttentionCycle | None = None
        self.readout: Readout | None = None
        self.trajectories: Trajectories | None = None
        self.path: PathIndependence | None = None
        self.stages: StageMeasures | None = None
        self.other_tails: StateTails | None = None
        self.maps: AttentionMaps | None = None
        self._plan = plan
        self._also: list[Observer] = []
        if "cycle-similarity" not in plan.skip:
            self.cycle = CycleSimilarity(frame, plan.cycle_recurrences)
            if frame.info.heads is not None and "heads" not in plan.skip:
                self.attention_cycle = AttentionCycle(frame, frame.info.heads, plan.cycle_recurrences)
        if plan.maps is not None and frame.info.heads is not None:
            self.maps = AttentionMaps(frame, frame.info.heads, plan.maps)
        if "stages" not in plan.skip:
            self.stages = StageMeasures(frame)
        if "readout" not in plan.skip:
            self.readout = Readout(frame, runs.batch, plan.readout, plan.exits)
        if "trajectories" not in plan.skip and plan.tracked and frame.info.is_looped:
            self.trajectories = Trajectories(frame, plan.tracked, plan.components)
        if frame.info.is_looped and _has_other_path(frame.info, plan):
            other = runs.subject.other_initial_state(runs.batch, plan.seed)
            if other is not None:
                self.path = PathIndependence(frame)
                self.other_tails = _tails(frame, plan, whole=False)
                self._other = runs.start(plan.recurrences, initial_state=other)

    def watch(self, observer: Observer) -> None:
        """Let something else see all that these measures see."""
        self._also.append(observer)

    @property
    def observers(self) -> list[Observer]:
        return [*self._measures, *self._also]

    @property
    def _measures(self) -> list[Measure]:
        """Those that were asked for."""
        measures = (
            self.cycle,
            self.attention_cycle,
            self.maps,
            self.stages,
            self.trajectories,
            self.path,
            self.readout,
        )
        return [measure for measure in measures if measure is not None]

    def after(self, recurrences: int, run: Run, tick: Tick) -> None:
        """That many recurrences of the measured run are done."""
        if self.path is not None:
            tails = [] if self.other_tails is None else [self.other_tails]
            self._other.advance([self.path.second, *tails])
            tick()
        if recurrences == self._plan.recurrences:
            run.decode(self.observers)

    def finish(self) -> Arrays:
        arrays = Arrays()
        for measure in self._measures:
            arrays.update(measure.finish())
        return arrays


class _Keeper(Observer):
    """Keeps what was announced, to tell it again to a measure that can only now understand it."""

    def __init__(self, attention: bool) -> None:
        self._attention = attention
        self._events: list[Visit | LoopState] = []

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            return
        # Without the queries and keys, which are larger than the state, unless somebody will read them.
        kept = visit if self._attention else dataclasses.replace(visit, attention=None)
        self._events.append(kept)

    def loop_state(self, loop_state: LoopState) -> None:
        self._events.append(loop_state)

    def replay(self, observer: Observer) -> None:
        for event in self._events:
            if isinstance(event, Visit):
                observer.visit(event)
            else:
                observer.loop_state(event)
        self._events.clear()


class _Both(Observer):
    """Two observers as one."""

    def __init__(self, first: Observer, second: Observer) -> None:
        self._observers = (first, second)

    def visit(self, visit: Visit) -> None:
        for observer in self._observers:
            observer.visit(visit)

    def loop_state(self, loop_state: LoopState) -> None:
        for observer in self._observers:
            observer.loop_state(loop_state)


class _OutsideTheLoop(Observer):
    """Tells an observer of prelude and coda only; it will be notified of the loop when the horizon is known."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def visit(self, visit: Visit) -> None:
        if visit.stage != "recurrent":
            self._observer.visit(visit)


class _FiniteGuard(Observer):
    """Refuses states that are broken before the loop can be blamed."""

    def __init__(self, frame: Frame, first_prompt: int) -> None:
        self._frame = frame
        self._first_prompt = first_prompt

    def visit(self, visit: Visit) -> None:
        if visit.recurrence > 0:
            return
        finite: Tensor = torch.isfinite(visit.residual).all(-1) | ~self._frame.mask
        if not bool(finite.all()):
            row = int((~finite).any(-1).nonzero()[0])
            raise NonFiniteError(
                f"The state after {visit.label} of prompt {self._first_prompt + row} is NaN or infinite in "
                f"{self._frame.info.dtype}, before the loop could have made it grow; try a wider --dtype, "
                f"or check the weights."
            )
