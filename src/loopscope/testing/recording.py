"""Runs of a subject of which everything announced is kept, as copies, at the real tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from loopscope._shapes import States
from loopscope.subject import Batch, Subject
from loopscope.testing.comparison import Place
from loopscope.visits import AttentionView, LoopState, Observer, Visit

__all__ = ["Event", "RecordedRun", "Recording", "record", "recorded"]

Phase = Literal["start", "advance", "answer"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something announced to an observer."""

    phase: Phase
    """The call of the subject or its run in which it was announced."""
    label: str

    def __str__(self) -> str:
        return f"{self.label} (in `{self.phase}`)"


@dataclass(eq=False)
class Recording:
    """What one run announced and gave.

    Tensors have one row a real token, prompt after prompt: (tokens, ...). Labels are those of `Visit`, and `initial
    state`, `injected@3`, `loop state@3`, `state@3` (the run's own after recurrence 3), `gate@3`,
    `attention of recurrent.1@3`, `logits`.
    """

    batch: Batch
    recurrences: int
    events: list[Event] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    originals: dict[str, Tensor | AttentionView] = field(default_factory=dict)
    """What was handed out, of which `tensors` has copies made at once."""

    @property
    def places(self) -> list[Place]:
        """(prompt, token) of each row."""
        return [(int(prompt), int(token)) for prompt, token in self.batch.mask.nonzero()]

    def keep(self, label: str, tensor: Tensor) -> None:
        self.originals[label] = tensor
        self.shapes[label] = tuple(tensor.shape)
        self.dtypes[label] = str(tensor.dtype).removeprefix("torch.")
        self.tensors[label] = self.at_tokens(tensor)

    def keep_attention(self, label: str, view: AttentionView) -> None:
        self.originals[label] = view
        maps = view.probabilities()
        self.shapes[label] = tuple(maps.shape)
        self.tensors[label] = self.at_tokens(maps.transpose(1, 2))

    def at_tokens(self, tensor: Tensor) -> Tensor:
        """A copy of the rows of real tokens of (batch, token, ...); of all of it where the shape is another."""
        mask = self.batch.mask.to(tensor.device)
        return tensor.detach()[mask] if tensor.shape[:2] == mask.shape else tensor.detach().clone()

    def of(self, *kinds: str) -> dict[str, Tensor]:
        """The tensors whose label begins with one of these words; all of them without one."""
        return {label: tensor for label, tensor in self.tensors.items() if not kinds or label.startswith(kinds)}


class _Recorder(Observer):
    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.phase: Phase = "start"

    def visit(self, visit: Visit) -> None:
        self._announced(visit.label, visit.residual)
        if visit.attention is not None:
            self.recording.keep_attention(f"attention of {visit.label}", visit.attention)

    def injected(self, recurrence: int, state: States) -> None:
        self._announced(f"injected@{recurrence}", state)

    def loop_state(self, loop_state: LoopState) -> None:
        self._announced(f"loop state@{loop_state.recurrence}", loop_state.state)
        if loop_state.gate is not None:
            self.recording.keep(f"gate@{loop_state.recurrence}", loop_state.gate)

    def _announced(self, label: str, tensor: Tensor) -> None:
        self.recording.events.append(Event(self.phase, label))
        self.recording.keep(label, tensor)


class RecordedRun:
    """One run, advanced from outside. Unless `observed`, nobody watches it, and only its states and logits are kept."""

    def __init__(
        self,
        subject: Subject,
        batch: Batch,
        recurrences: int,
        *,
        seed: int = 0,
        initial_state: States | None = None,
        observed: bool = True,
    ) -> None:
        self.recording = Recording(batch, recurrences)
        self._recorder = _Recorder(self.recording)
        self._observers = [self._recorder] if observed else []
        self._done = 0
        self.run = subject.start(
            batch, recurrences=recurrences, seed=seed, initial_state=initial_state, observers=self._observers
        )
        if self.run.state is not None and subject.info.is_looped:
            self.recording.keep("initial state", self.run.state)

    def advance(self) -> None:
        self._recorder.phase = "advance"
        self.run.advance(self._observers)
        if self.run.state is not None:
            self.recording.keep(f"state@{self._done}", self.run.state)
        self._done += 1

    def complete(self) -> Recording:
        """All recurrences and the answer."""
        for _ in range(self.recording.recurrences):
            self.advance()
        return self.finish()

    def finish(self) -> Recording:
        """Ask for the model's answer and close the run."""
        self._recorder.phase = "answer"
        self.recording.keep("logits", self.run.answer(self._observers))
        self.run.close()
        return self.recording


@contextmanager
def recorded(
    subject: Subject,
    batch: Batch,
    recurrences: int,
    *,
    seed: int = 0,
    initial_state: States | None = None,
    observed: bool = True,
) -> Iterator[RecordedRun]:
    """A run that is closed whatever happens."""
    run = RecordedRun(subject, batch, recurrences, seed=seed, initial_state=initial_state, observed=observed)
    try:
        yield run
    finally:
        run.run.close()


def record(
    subject: Subject,
    batch: Batch,
    recurrences: int,
    *,
    seed: int = 0,
    initial_state: States | None = None,
    observed: bool = True,
) -> Recording:
    """A whole run."""
    with recorded(subject, batch, recurrences, seed=seed, initial_state=initial_state, observed=observed) as run:
        return run.complete()
