"""Subjects that keep the contract but for one promise, each made by changing what a right one does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from loopscope._util.shapes import Logits, States
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch, Run, SubjectInfo
from loopscope.models.visits import LoopState, MapAttention, Observer, Visit
from small_models import ADDED, LOOP_NORM, architecture, subject

TRAINED = 2


class WrappedRun:
    """A run of a wrapped subject, which passes everything on."""

    def __init__(self, owner: Wrapped, run: Run, recurrences: int) -> None:
        self.owner = owner
        self.run = run
        self.recurrences = recurrences
        self.done = 0

    @property
    def state(self) -> States | None:
        return self.run.state

    def shift(self, amount: float) -> None:
        """Move the state, from the outside."""
        assert self.run.state is not None
        self.run.state = self.run.state + amount  # type: ignore[misc]

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        self.run.advance(self.owner.through(observers))
        self.done += 1

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        return self.run.decode(self.owner.through(observers), state=state)

    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        return self.run.answer(self.owner.through(observers))

    def close(self) -> None:
        self.run.close()

    def rounding_error(self) -> Tensor | None:
        return self.run.rounding_error()


class Wrapped:
    """A subject that passes everything on; what is broken overrides a method or names an observer in between."""

    run_type: type[WrappedRun] = WrappedRun
    observer: type[Relay] | None = None

    def __init__(self, inner: NativeSubject | None = None) -> None:
        self.inner = inner or subject(architecture(recurrences=TRAINED))
        self.model = self.inner.model

    @property
    def info(self) -> SubjectInfo:
        return self.inner.info

    @property
    def tokenizer(self) -> Any:
        return self.inner.tokenizer

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def start(
        self,
        batch: Batch,
        *,
        recurrences: int,
        seed: int = 0,
        initial_state: States | None = None,
        observers: Iterable[Observer] = (),
    ) -> WrappedRun:
        run = self.inner.start(
            batch,
            recurrences=recurrences,
            seed=seed,
            initial_state=initial_state,
            observers=self.through(observers),
        )
        return self.run_type(self, run, recurrences)

    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        return self.inner.other_initial_state(batch, seed)

    def through(self, observers: Iterable[Observer]) -> list[Observer]:
        return [observer if self.observer is None else self.observer(observer) for observer in observers]


class Relay(Observer):
    """Passes on what it is told."""

    def __init__(self, target: Observer) -> None:
        self.target = target

    def visit(self, visit: Visit) -> None:
        self.target.visit(visit)

    def injected(self, recurrence: int, state: States) -> None:
        self.target.injected(recurrence, state)

    def loop_state(self, loop_state: LoopState) -> None:
        self.target.loop_state(loop_state)


def changes_visits(change: Callable[[Visit], Visit | None]) -> type[Relay]:
    """An observer in between that announces other visits than were made, or none."""

    class Changed(Relay):
        def visit(self, visit: Visit) -> None:
            changed = change(visit)
            if changed is not None:
                self.target.visit(changed)

    return Changed


class Swapped(Relay):
    """The two recurrent layers are announced in the wrong order."""

    def __init__(self, target: Observer) -> None:
        super().__init__(target)
        self.held: Visit | None = None

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.layer == 0:
            self.held = visit
            return
        self.target.visit(visit)
        if self.held is not None:
            self.target.visit(self.held)
            self.held = None


def without_the_second(visit: Visit) -> Visit | None:
    return None if visit.stage == "recurrent" and visit.layer == 1 else visit


def always_the_first(visit: Visit) -> Visit:
    """Of the recurrences, the index is forgotten."""
    return dataclasses.replace(visit, recurrence=min(visit.recurrence, 1))


def narrow(visit: Visit) -> Visit:
    return dataclasses.replace(visit, residual=visit.residual[..., :-1])


def with_maps(change: Callable[[Tensor, Tensor], Tensor]) -> type[Relay]:
    """Attention maps that are changed by a function of (maps, mask)."""

    def changed(visit: Visit) -> Visit:
        assert visit.attention is not None
        maps = visit.attention.probabilities()
        mask = maps.sum(-1)[:, 0] > 0
        return dataclasses.replace(visit, attention=MapAttention(change(maps, mask), None))

    return changes_visits(changed)


def below_zero(maps: Tensor, mask: Tensor) -> Tensor:
    """Twice what goes to the first token is taken from it and given to the token itself."""
    first = 2 * maps[..., 0]
    changed = maps + torch.diag_embed(first)
    changed[..., 0] -= first
    return changed


def looks_ahead(maps: Tensor, mask: Tensor) -> Tensor:
    both = mask[:, None, :, None] & mask[:, None, None, :]
    return (both / mask.sum(-1)[:, None, None, None]).expand_as(maps).to(maps.dtype)


def breaking(observer: type[Relay]) -> type[Wrapped]:
    return type("Broken", (Wrapped,), {"observer": observer})


def running(run_type: type[WrappedRun]) -> type[Wrapped]:
    return type("Broken", (Wrapped,), {"run_type": run_type})


class StopsAtTrained(WrappedRun):
    """Goes on announcing nothing, as a model that ignores the number it is told."""

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        if self.done < TRAINED:
            super().advance(observers)


class AnswersEarly(WrappedRun):
    """Runs on, and answers with the state after the trained number of recurrences."""

    def advance(self, observers: Iterable[Observer] = ()) -> None:
        super().advance(observers)
        if self.done == TRAINED:
            self.answered = self.run.answer()

    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        logits = super().answer(observers)
        return self.answered if self.done > TRAINED else logits


class KnowsItsNumber(Wrapped):
    """How the loop begins depends on how often it will run."""

    def start(self, batch: Batch, *, recurrences: int, **options: Any) -> WrappedRun:
        run = super().start(batch, recurrences=recurrences, **options)
        if recurrences != TRAINED:
            run.shift(0.1)
        return run


class SeesPadding(Wrapped):
    """The state depends on how much padding there is."""

    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        run = super().start(batch, **options)
        padding = int((~batch.mask).sum())
        if padding and options.get("initial_state") is None:
            run.shift(0.05 * padding)
        return run


class IgnoresSeed(Wrapped):
    def start(self, batch: Batch, *, seed: int = 0, **options: Any) -> WrappedRun:
        return super().start(batch, seed=0, **options)


class ShiftsBySeed(Wrapped):
    """A model that starts from its embeddings, but for the seed."""

    def __init__(self) -> None:
        super().__init__(subject(ADDED))

    def start(self, batch: Batch, *, seed: int = 0, **options: Any) -> WrappedRun:
        run = super().start(batch, seed=seed, **options)
        if seed != 0:
            run.shift(0.1)
        return run


class OtherEveryTime(Wrapped):
    starts = 0

    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        run = super().start(batch, **options)
        self.starts += 1
        run.shift(1e-3 * self.starts)
        return run


class ChangedByObservers(WrappedRun):
    def advance(self, observers: Iterable[Observer] = ()) -> None:
        observers = tuple(observers)
        super().advance(observers)
        if not observers:
            self.shift(1e-6)


class ChangedByDecoding(WrappedRun):
    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        logits = super().decode(observers, state=state)
        self.shift(1e-6)
        return logits


class ChangedByDecodingAnother(WrappedRun):
    """A state that is given to be decoded becomes the run's own."""

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        if state is not None:
            self.run.state = state  # type: ignore[misc]
        return super().decode(observers)


class DecodesItsOwn(WrappedRun):
    """A state that is given to be decoded is ignored."""

    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        return super().decode(observers)


class ChangedByRounding(WrappedRun):
    def rounding_error(self) -> Tensor | None:
        error = super().rounding_error()
        self.shift(1e-6)
        return error


class MisshapenRounding(WrappedRun):
    def rounding_error(self) -> Tensor | None:
        error = super().rounding_error()
        return None if error is None else error[:1]


class Overwrites(Relay):
    """The first layer's output is a buffer that the second one clears."""

    held: Tensor | None = None

    def visit(self, visit: Visit) -> None:
        if visit.stage == "recurrent" and visit.layer == 1:
            assert self.held is not None
            self.held.zero_()
        self.held = visit.residual
        self.target.visit(visit)


class SharesItsState(Wrapped):
    """What a run does depends on whether it is the one that was started last."""

    latest: WrappedRun | None = None

    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        self.latest = super().start(batch, **options)
        return self.latest


class SharedRun(WrappedRun):
    def advance(self, observers: Iterable[Observer] = ()) -> None:
        super().advance(observers)
        assert isinstance(self.owner, SharesItsState)
        if self.owner.latest is not self:
            self.shift(1e-3)


class LeavesSomething(Wrapped):
    """A run that did not come to its end is felt by the next one."""

    unfinished = False

    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        run = super().start(batch, **options)
        if self.unfinished:
            run.shift(1e-3)
        self.unfinished = False
        return run


class LeavingRun(WrappedRun):
    answered = False

    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        self.answered = True
        return super().answer(observers)

    def close(self) -> None:
        super().close()
        assert isinstance(self.owner, LeavesSomething)
        if not self.answered:
            self.owner.unfinished = True


class TwiceTheLogits(WrappedRun):
    def answer(self, observers: Iterable[Observer] = ()) -> Logits:
        return 2 * super().answer(observers)


class SilentLater(Wrapped):
    """Announces its second layer in the first four runs that are observed, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.observed = 0

    def start(self, batch: Batch, *, observers: Iterable[Observer] = (), **options: Any) -> WrappedRun:
        self.observed += bool(tuple(observers))
        return super().start(batch, observers=observers, **options)

    def through(self, observers: Iterable[Observer]) -> list[Observer]:
        relay = changes_visits(without_the_second) if self.observed > 4 else Relay
        return [relay(observer) for observer in observers]


class IgnoresInitialState(Wrapped):
    def start(self, batch: Batch, *, initial_state: States | None = None, **options: Any) -> WrappedRun:
        return super().start(batch, **options)


class NoOtherState(Wrapped):
    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        return None


class SameOtherState(Wrapped):
    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        return self.inner.start(batch, recurrences=1, seed=seed).state


class OtherStateOfAnotherPrompt(Wrapped):
    """The prompt of this model enters by the initial state alone."""

    def __init__(self) -> None:
        super().__init__(subject(LOOP_NORM))

    def other_initial_state(self, batch: Batch, seed: int) -> States | None:
        return torch.ones(*batch.input_ids.shape, self.info.width)


class Trains(Wrapped):
    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        self.model.coda.train()
        return super().start(batch, **options)


class LeavesHooks(Wrapped):
    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        self.model.norm.register_forward_hook(lambda *_: None)
        return super().start(batch, **options)


class ChangesWeights(Wrapped):
    """Of a buffer that no result shows."""

    def __init__(self) -> None:
        super().__init__()
        self.model.norm.register_buffer("unused", torch.zeros(2))

    def start(self, batch: Batch, **options: Any) -> WrappedRun:
        self.model.norm.get_buffer("unused").fill_(1.0)
        return super().start(batch, **options)


def saying(**facts: Any) -> type[Wrapped]:
    """A subject of which some facts are wrong."""

    class Says(Wrapped):
        @property
        def info(self) -> SubjectInfo:
            return dataclasses.replace(self.inner.info, **facts)

    return Says


class Raises(WrappedRun):
    def decode(self, observers: Iterable[Observer] = (), *, state: States | None = None) -> Logits:
        raise RuntimeError("no kernel image is available\nfor execution")


def records_gradients(visit: Visit) -> Visit:
    return dataclasses.replace(visit, residual=visit.residual.clone().requires_grad_())


def with_nan(visit: Visit) -> Visit:
    residual = visit.residual.clone()
    residual[:, 0, 3] = torch.nan
    return dataclasses.replace(visit, residual=residual)


class OtherLoopState(Relay):
    """What is announced as carried is not what the run carries."""

    def loop_state(self, loop_state: LoopState) -> None:
        self.target.loop_state(dataclasses.replace(loop_state, state=2 * loop_state.state))
