"""Prompts that a model cannot have in one padded batch, run apart and announced as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loopscope._util.shapes import Logits, Rows
from loopscope.models.hooks.forward import Event, HookedForward, Injected, Ready
from loopscope.models.subject import Batch
from loopscope.models.visits import AttentionView, LoopState, Visit


@runtime_checkable
class SteppedForward(Protocol):
    """A forward pass as `HookedForward` is one."""

    logits: Logits | None
    listening: bool

    def nudge(self, factors: Tensor) -> None: ...

    def next(self) -> Event | None: ...

    def __iter__(self) -> Iterator[Event]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Group:
    """Prompts of one length."""

    rows: tuple[int, ...]
    """Which of the batch they are."""
    tokens: int


def groups_of(batch: Batch) -> list[Group]:
    """The prompts of a batch that is padded behind them, by length."""
    lengths = batch.counts.tolist()
    return [
        Group(tuple(row for row, length in enumerate(lengths) if length == tokens), tokens)
        for tokens in sorted(set(lengths))
    ]


class ForwardsApart:
    """A forward pass for each group, advanced side by side; each event is that of all of them.

    Where a shorter prompt has ended, states go on with its last one, and rows of attention with zeros.
    """

    def __init__(self, batch: Batch, begin: Callable[[Group, Batch], HookedForward]) -> None:
        self.logits: Logits | None = None
        self._batch = batch
        self._groups = groups_of(batch)
        self._forwards: list[HookedForward] = []
        for group in self._groups:
            rows = torch.tensor(group.rows, device=batch.input_ids.device)
            ids = batch.input_ids[rows, : group.tokens]
            self._forwards.append(begin(group, Batch(ids, torch.ones_like(ids, dtype=torch.bool))))

    @property
    def listening(self) -> bool:
        return self._forwards[0].listening

    @listening.setter
    def listening(self, value: bool) -> None:
        for forward in self._forwards:
            forward.listening = value

    def nudge(self, factors: Tensor) -> None:
        for group, forward in zip(self._groups, self._forwards, strict=True):
            forward.nudge(factors[list(group.rows), : group.tokens])

    def next(self) -> Event | None:
        if self.logits is not None:
            return None
        try:
            events = [forward.next() for forward in self._forwards]
        except BaseException:
            self.close()
            raise
        there = [event for event in events if event is not None]
        if not there:
            self.logits = self._states([forward.logits for forward in self._forwards])
            return None
        assert len(there) == len(events)  # each follows the same layout
        return self._together(there)

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def close(self) -> None:
        for forward in self._forwards:
            forward.close()

    def _together(self, events: Sequence[Event]) -> Event:
        match events[0]:
            case Ready():
                return Ready(self._states([event.state for event in events if isinstance(event, Ready)]))
            case Injected(recurrence):
                return Injected(recurrence, self._states([e.state for e in events if isinstance(e, Injected)]))
            case LoopState(recurrence):
                return LoopState(recurrence, self._states([e.state for e in events if isinstance(e, LoopState)]))
            case Visit(stage, layer, recurrence):
                visits = [event for event in events if isinstance(event, Visit)]
                attention = self._attention([visit.attention for visit in visits])
                state = self._states([visit.residual for visit in visits])
                return Visit(stage, layer, recurrence, state, attention, self._sink([visit.sink for visit in visits]))

    def _states(self, states: Sequence[Tensor | None]) -> Tensor:
        batch, tokens = self._batch.input_ids.shape
        whole: Tensor | None = None
        for group, state in zip(self._groups, states, strict=True):
            assert state is not None  # all forward passes stand at the same event
            places = torch.arange(tokens, device=state.device).clamp(max=group.tokens - 1)
            if whole is None:
                whole = state.new_empty(batch, tokens, state.shape[-1])
            whole[list(group.rows)] = state[:, places]
        assert whole is not None  # a batch has a prompt
        return whole

    def _sink(self, sinks: Sequence[Tensor | None]) -> Tensor | None:
        seen = [sink.mT for sink in sinks if sink is not None]
        return self._states(seen).mT if len(seen) == len(sinks) else None

    def _attention(self, views: Sequence[AttentionView | None]) -> AttentionView | None:
        seen = [view for view in views if view is not None]
        if len(seen) < len(views):
            return None
        return AttentionApart(tuple(self._groups), tuple(seen), self._batch.input_ids.shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class AttentionApart(AttentionView):
    """The attention of groups of prompts as that of one batch."""

    groups: tuple[Group, ...]
    views: tuple[AttentionView, ...]
    tokens_of_batch: int

    @property
    def heads(self) -> int:
        return self.views[0].heads

    @property
    def tokens(self) -> int:
        return self.tokens_of_batch

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self.views)

    def tile(self, start: int, stop: int) -> Rows:
        batch = sum(len(group.rows) for group in self.groups)
        tiles = [
            view.tile(start, min(stop, group.tokens)) if start < group.tokens else None
            for group, view in zip(self.groups, self.views, strict=True)
        ]
        like = next((tile for tile in tiles if tile is not None), None)
        if like is None:
            return self.views[0].tile(0, 1).new_zeros(batch, self.heads, stop - start, self.tokens)
        keys = max(tile.shape[-1] for tile in tiles if tile is not None)
        whole = like.new_zeros(batch, self.heads, stop - start, keys)
        for group, tile in zip(self.groups, tiles, strict=True):
            if tile is not None:
                whole[list(group.rows), :, : tile.shape[2], : tile.shape[3]] = tile
        return whole

    def prompt(self, row: int) -> AttentionView:
        for group, view in zip(self.groups, self.views, strict=True):
            if row in group.rows:
                one = view.prompt(group.rows.index(row))
                return AttentionApart((Group((0,), group.tokens),), (one,), self.tokens_of_batch)
        raise IndexError(row)
