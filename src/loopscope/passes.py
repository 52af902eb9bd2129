"""The forward passes of one batch, and the measures that watch them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loopscope.errors import NonFiniteError
from loopscope.measures import (
    Arrays,
    Convergence,
    CycleSimilarity,
    Frame,
    HorizonStates,
    Named,
    PathIndependence,
    Readout,
    Trajectories,
    noise_floor,
)
from loopscope.settings import Part
from loopscope.subject import Batch, Run, Subject
from loopscope.visits import LoopState, Observer, Visit

__all__ = ["Plan", "Tick", "kept_bytes", "measure_batch", "recurrences_run"]

Tick = Callable[[], None]
"""Called after each recurrence of each run."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one batch is run."""

    recurrences: int
    horizon: int
    keep: bool
    """Keep the measured states of the batch rather than run them a second time."""
    seed: int
    cycle_recurrences: int
    tracked: tuple[tuple[int, int], ...]
    """(row of the batch, token from 0)."""
    components: int
    readout: tuple[int, ...]
    skip: frozenset[Part]
    first_prompt: int
    """Number of the batch's first prompt, for messages."""


def kept_bytes(subject: Subject, batch: Batch, recurrences: int) -> int:
    """Bytes that the states of all measured visits take."""
    info = subject.info
    sites = info.recurrent + (0 if info.carries_raw_output else 1)
    itemsize = torch.empty(0, dtype=getattr(torch, info.dtype)).element_size()
    return batch.mask.numel() * info.width * itemsize * sites * recurrences


def recurrences_run(subject: Subject, plan: Plan) -> int:
    """Recurrences of all runs of a batch, which is how often `tick` is called."""
    if not subject.info.is_looped:
        return 0
    other = plan.recurrences if _has_other_path(subject, plan) else 0
    if plan.keep:
        return max(plan.recurrences, 2 * plan.horizon) + other
    return plan.recurrences + 2 * plan.horizon + other


def measure_batch(subject: Subject, batch: Batch, plan: Plan, tick: Tick) -> Arrays:
    """Run one batch as planned and reduce it to arrays.

    Raises `NonFiniteError` for a state that is NaN or infinite before the loop could have made it grow. A model that
    diverges in the loop is a result, found in `diverged_at`.
    """
    frame = Frame.of(subject.info, batch, subject.device, plan.recurrences if subject.info.is_looped else 0)
    if not subject.info.is_looped:
        return _measure_once(subject, batch, plan, frame)
    horizon = HorizonStates(frame, plan.horizon)
    live = _Live(subject, batch, plan, frame)
    kept = _Keeper()
    floor = Arrays()

    def advance(run: Run, first: int, last: int, observers: list[Observer], measured: bool) -> None:
        nonlocal floor
        for recurrence in range(first, last):
            run.advance(observers)
            tick()
            if measured:
                live.after(recurrence + 1, run, tick)
            if recurrence + 1 == 2 * plan.horizon and "noise-floor" not in plan.skip and horizon in observers:
                floor = noise_floor(frame, run)

    guard = _FiniteGuard(frame, plan.first_prompt)
    end = 2 * plan.horizon
    if plan.keep:
        whole = max(plan.recurrences, end)
        run = subject.start(batch, recurrences=whole, seed=plan.seed, observers=[guard, *live.observers])
        initial_state = run.state
        both = min(plan.recurrences, end)
        advance(run, 0, both, [guard, horizon, kept, *live.observers], measured=True)
        advance(run, both, plan.recurrences, [kept, *live.observers], measured=True)
        advance(run, both, end, [horizon], measured=False)
    else:
        run = subject.start(batch, recurrences=end, seed=plan.seed, observers=[guard])
        advance(run, 0, end, [guard, horizon], measured=False)
        run.close()
        run = subject.start(batch, recurrences=plan.recurrences, seed=plan.seed, observers=live.observers)
        initial_state = run.state
    convergence = Convergence(frame, horizon)
    convergence.start(initial_state)
    if plan.keep:
        kept.replay(convergence)
    else:
        advance(run, 0, plan.recurrences, [convergence, *live.observers], measured=True)
    run.close()
    live.close()
    arrays = Arrays()
    for part in (convergence.finish(), horizon.finish(), live.finish(), floor):
        arrays.update(part)
    arrays.per_prompt["diverged_at"] = _diverged_at(arrays)
    return arrays


def _measure_once(subject: Subject, batch: Batch, plan: Plan, frame: Frame) -> Arrays:
    """A feed-forward model: one pass."""
    live = _Live(subject, batch, plan, frame)
    guard = _FiniteGuard(frame, plan.first_prompt)
    run = subject.start(batch, recurrences=0, seed=plan.seed, observers=[guard, *live.observers])
    live.after(1, run, lambda: None)
    if live.cycle is not None:
        run.decode([live.cycle])
    run.close()
    arrays = live.finish()
    arrays.per_prompt["diverged_at"] = Named(("prompt",), np.full(frame.prompts, -1, dtype=np.int64))
    return arrays


def _diverged_at(arrays: Arrays) -> Named:
    """The first recurrence whose state is not finite, among the horizon's pass and the measured one."""
    found = arrays.per_prompt["diverged_at"].values
    broken = ~np.isfinite(arrays.per_prompt["residual_norm"].values).all(axis=0)
    measured = np.where(broken.any(axis=0), broken.argmax(axis=0), -1)
    earliest = np.where(found < 0, measured, np.where(measured < 0, found, np.minimum(found, measured)))
    return Named(("prompt",), earliest)


def _has_other_path(subject: Subject, plan: Plan) -> bool:
    return "path-independence" not in plan.skip and subject.info.can_start_elsewhere


class _Live:
    """The measures that need no horizon: they watch the measured run while it goes by."""

    def __init__(self, subject: Subject, batch: Batch, plan: Plan, frame: Frame) -> None:
        self.cycle: CycleSimilarity | None = None
        self.readout: Readout | None = None
        self.trajectories: Trajectories | None = None
        self.path: PathIndependence | None = None
        self._plan = plan
        if "cycle-similarity" not in plan.skip:
            self.cycle = CycleSimilarity(frame, plan.cycle_recurrences)
        if "readout" not in plan.skip:
            self.readout = Readout(frame, batch, plan.readout)
        if "trajectories" not in plan.skip and plan.tracked and subject.info.is_looped:
            self.trajectories = Trajectories(frame, plan.tracked, plan.components)
        if subject.info.is_looped and _has_other_path(subject, plan):
            other = subject.other_initial_state(batch, plan.seed)
            if other is not None:
                self.path = PathIndependence(frame)
                self._other = subject.start(batch, recurrences=plan.recurrences, seed=plan.seed, initial_state=other)

    @property
    def observers(self) -> list[Observer]:
        return [measure for measure in (self.cycle, self.trajectories, self.path) if measure is not None]

    def after(self, recurrences: int, run: Run, tick: Tick) -> None:
        """So many recurrences of the measured run are done."""
        if self.path is not None:
            self._other.advance([self.path.second])
            tick()
        if self.readout is not None:
            self.readout.after(recurrences, run)
        if self.cycle is not None and recurrences == self._plan.recurrences:
            run.decode([self.cycle])

    def close(self) -> None:
        """No further recurrence is run."""
        if self.path is not None:
            self._other.close()

    def finish(self) -> Arrays:
        arrays = Arrays()
        for measure in (self.cycle, self.trajectories, self.path, self.readout):
            if measure is not None:
                arrays.update(measure.finish())
        return arrays


class _Keeper(Observer):
    """Keeps what was announced, to tell it again to a measure that can only now understand it."""

    def __init__(self) -> None:
        self._events: list[Visit | LoopState] = []

    def visit(self, visit: Visit) -> None:
        # Without the queries and keys, which are larger than the state and which no replayed measure reads.
        self._events.append(Visit(visit.stage, visit.layer, visit.recurrence, visit.residual, attention=None))

    def loop_state(self, loop_state: LoopState) -> None:
        self._events.append(loop_state)

    def replay(self, observer: Observer) -> None:
        for event in self._events:
            if isinstance(event, Visit):
                observer.visit(event)
            else:
                observer.loop_state(event)
        self._events.clear()


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
