"""Runs of a subject of which everything announced is kept, as copies, at the real tokens alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from loopscope._util.shapes import States
from loopscope.models.contract.results import CheckFailed
from loopscope.models.subject import Batch, Subject
from loopscope.models.visits import AttentionView, LoopState, Observer, Visit

Place = tuple[int, int]
"""(prompt, token), both from 0."""

RunPhase = Literal["start", "advance", "answer"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two tensors of one label, at the entry where they differ most."""

    label: str
    size: float
    """|got - expected| over the largest magnitude in the token's expected vector."""
    description: str

    def __str__(self) -> str:
        return f"{self.label} {self.description}"


def require_close(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], places: Sequence[Place], limit: float, what: str
) -> str:
    """What was compared and how well it agrees; raises `CheckFailed` with the first and the largest difference.

    The tensors of a label have one row a real token, in the order of `places`.
    """
    missing = [label for label in expected if label not in got]
    if missing:
        raise CheckFailed(f"{what}: got no {missing[0]}, expected it and {len(expected) - 1} other tensors")
    differences = [_difference(label, got[label], expected[label], places) for label in expected]
    beyond = [difference for difference in differences if not difference.size <= limit]
    largest = max(differences, key=lambda difference: difference.size)
    if beyond:
        more = f"; largest at {largest}" if largest is not beyond[0] else ""
        raise CheckFailed(f"{what} at {beyond[0]}, allowed {limit:.2g}{more}; {len(beyond)} of {len(expected)} differ")
    if largest.size == 0:
        return f"{len(expected)} tensors equal bit for bit"
    return (
        f"{len(expected)} tensors, largest relative difference {largest.size:.2g} (of {limit:.2g}) at {largest.label}"
    )


def _difference(label: str, got: Tensor, expected: Tensor, places: Sequence[Place]) -> Difference:
    if got.shape != expected.shape:
        return Difference(label, math.inf, f"(got shape {tuple(got.shape)}, expected {tuple(expected.shape)})")
    got, expected = (tensor.double().reshape(len(tensor), -1) for tensor in (got, expected.to(got.device)))
    # NaN in both is the same result, which another check judges.
    same = (got == expected) | (got.isnan() & expected.isnan())
    scale = expected.nan_to_num().abs().amax(-1, keepdim=True)
    sizes = (got - expected).abs() / torch.where(scale == 0, 1.0, scale)
    sizes = torch.where(same, 0.0, sizes.nan_to_num(nan=math.inf, posinf=math.inf))
    row, entry = divmod(int(sizes.argmax()), sizes.shape[1])
    prompt, token = places[row] if row < len(places) else (-1, -1)  # states of another shape than the tokens have
    return Difference(
        label,
        float(sizes[row, entry]),
        f"(prompt {prompt}, token {token}: got {float(got[row, entry]):.6g}, expected "
        f"{float(expected[row, entry]):.6g}, relative difference {float(sizes[row, entry]):.2g})",
    )


@dataclass(frozen=True, slots=True)
class Announcement:
    """Something announced to an observer."""

    phase: RunPhase
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
    events: list[Announcement] = field(default_factory=list)
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
        self.phase: RunPhase = "start"

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
        self.recording.events.append(Announcement(self.phase, label))
        self.recording.keep(label, tensor)


class RecordedRun:
    """One run, advanced from outside, which its `with` closes whatever happens. Unless `observed`, nobody watches it,
    and only its states and logits are kept."""

    def __init__(
        self,
        subject: Subject,
        batch: Batch,
        recurrences: int,
        *,
        seed: int,
        initial_state: States | None,
        observed: bool,
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

    def __enter__(self) -> RecordedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()

    def advance(self) -> None:
        self._recorder.phase = "advance"
        self.run.advance(self._observers)
        self._done += 1
        if self.run.state is not None:
            self.recording.keep(f"state@{self._done}", self.run.state)

    def complete(self) -> Recording:
        """All recurrences and the answer."""
        with self:
            for _ in range(self.recording.recurrences):
                self.advance()
            return self.finish()

    def finish(self) -> Recording:
        """Ask for the model's answer and close the run."""
        self._recorder.phase = "answer"
        self.recording.keep("logits", self.run.answer(self._observers))
        self.run.close()
        return self.recording
