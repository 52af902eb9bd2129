"""Runs of the native model that take one token of each prompt after the other, with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from loopscope._util.shapes import Keys, Queries, SeenKeys, States, TokenValues
from loopscope._util.sites import Stage
from loopscope.errors import ConfigError
from loopscope.models.architecture import Architecture
from loopscope.models.interventions.kinds import ReplaceToken
from loopscope.models.native.attention import AttentionContext, Mix, mix_values, rotation_table
from loopscope.models.native.exit import ExitRule
from loopscope.models.native.interventions import AppliedInterventions, growing_noise
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import Sequence as TokenSequence
from loopscope.models.subject import Batch

CacheKind = Literal["per-recurrence", "last"]
"""What a recurrent layer keeps of a token: its keys and values after every recurrence, or of the last one alone.

With `per-recurrence` a token in recurrence t looks at those of recurrence t; where a token before it stopped earlier,
at those of its last one, which is the convention of Huginn's published code (the latest that is there). With `last`
every recurrence looks at the last ones of the tokens before it, and at its own (Ouro; Zhu et al., arXiv 2510.25741, on
shared caches); prompts are read as ever, all their tokens at once. That is another computation, with a cache as small
as that of a model without a loop.
"""

Row = Int64[Tensor, " row"]


def cache_bytes(architecture: Architecture, kind: CacheKind, recurrences: int, tokens: int, itemsize: int) -> int:
    """Of one text of that many tokens."""
    slots = recurrences if kind == "per-recurrence" else 1
    layers = architecture.prelude + architecture.recurrent * slots + architecture.coda
    return 2 * layers * architecture.kv_heads * architecture.head_dim * tokens * itemsize


class KeyValueCache:
    """Keys and values of every layer, of texts that grow; a token lies at its position."""

    def __init__(self, kind: CacheKind, recurrences: int, rows: int, tokens: int) -> None:
        self._slots = recurrences if kind == "per-recurrence" else 1
        self._rows, self._tokens = rows, tokens
        self._stored: dict[tuple[Stage, int], Tensor] = {}
        """Of a layer, (keys or values, slot, row, kv_head, token, head_dim)."""

    def mixing(
        self,
        stage: Stage,
        recurrence: int = 0,
        at: tuple[Row, Row] | None = None,
        maps: list[Float[Tensor, "row head key"]] | None = None,
    ) -> Mix:
        """How the layers of a stage mix values in one recurrence, to be called once by each in order.

        `at` are the rows of the texts and the positions of one token of each, which looks at all before it; None for
        whole prompts, with which the texts begin. Into `maps` goes what each layer's new tokens look at.
        """
        layers = itertools.count()
        slot = recurrence - 1 if stage == "recurrent" and self._slots > 1 else 0

        def mix(query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
            layer = next(layers)
            if (stage, layer) not in self._stored:
                slots = self._slots if stage == "recurrent" else 1
                shape = (2, slots, self._rows, key.shape[1], self._tokens, key.shape[3])
                self._stored[stage, layer] = key.new_zeros(shape)
            keys, values = self._stored[stage, layer][:, slot]
            if at is None:
                keys[:, :, : key.shape[2]], values[:, :, : key.shape[2]] = key, value
                return mix_values(query, key, value, allowed)
            assert allowed is not None
            rows, positions = (each.to(key.device) for each in at)
            keys[rows, :, positions], values[rows, :, positions] = key[:, :, 0], value[:, :, 0]
            some = slice(None) if len(rows) == self._rows else rows
            keys, values = (each[some, :, : allowed.shape[-1]] for each in (keys, values))
            if maps is not None:
                maps.append(_map(query, keys, allowed))
            return mix_values(query, keys, values, allowed)

        return mix

    def stop(self, rows: Row, positions: Row, recurrence: int) -> None:
        """These tokens go around no more: later recurrences see what they left in this one."""
        for (stage, _), stored in self._stored.items():
            if stage == "recurrent" and self._slots > recurrence:
                where = rows.to(stored.device), positions.to(stored.device)
                for slots in stored:  # keys, then values
                    left = slots[recurrence - 1][where[0], :, where[1]]
                    for later in slots[recurrence:]:
                        later[where[0], :, where[1]] = left


def _map(query: Queries, keys: SeenKeys, allowed: Tensor) -> Float[Tensor, "batch head key"]:
    """What one new token of each text looks at."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    spread = keys.to(dtype).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = (query.to(dtype) * query.shape[-1] ** -0.5) @ spread.transpose(-1, -2)
    found: Tensor = scores.masked_fill(~allowed, -torch.inf).softmax(-1)[:, :, 0]
    return found


@runtime_checkable
class Exits(Protocol):
    """Decides, recurrence by recurrence, which of some tokens go around no more."""

    decodes: bool
    """It wants to know what the model would answer after each recurrence."""
    attends: bool
    """It wants to know what the tokens look at."""

    def begin(self, state: States) -> None:
        """Some tokens, one of each text, are about to go around from these states, (row, 1, width)."""

    def after(
        self,
        state: States,
        gate: TokenValues | None,
        logits: Float[Tensor, "row vocabulary"] | None,
        maps: Sequence[Float[Tensor, "row head key"]],
    ) -> Bool[Tensor, " row"]:
        """Which stop, of the tokens that were there after the recurrence before and did not. `maps` are those of the
        recurrent layers."""


class CachedRun:
    """Texts that grow by one token at a time, of which every layer keeps keys and values.

    The prompts, all their tokens at once, run the full number of recurrences, as in Huginn's published code; so does
    every later token unless exits stop it. A state that is drawn at random is drawn on for the tokens behind a prompt
    (`growing_noise`). `logits`, (row, vocabulary), are the answers at the prompts' ends.
    """

    @torch.no_grad()
    def __init__(
        self,
        subject: NativeSubject,
        prompts: Sequence[Sequence[int]],
        *,
        recurrences: int,
        most: int,
        seed: int = 0,
        kind: CacheKind = "per-recurrence",
        own_gate: bool = True,
    ) -> None:
        """`recurrences` is 0 of a feed-forward model; `most` is how many tokens a text grows by. A model with an exit
        gate answers as it says, unless `own_gate` is False: then as from the state where a token stopped.

        Raises `ConfigError` for an intervention on a token, of which a text that grows has no fixed number.
        """
        check_can_grow(subject)
        self._subject, self._model = subject, subject.model
        self._recurrences, self._seed, self._own_gate = recurrences, seed, own_gate
        self._lengths = torch.tensor([len(prompt) for prompt in prompts])
        capacity = int(self._lengths.max()) + most
        self._cache = KeyValueCache(kind, recurrences, len(prompts), capacity)
        batch = Batch.of(prompts).to(subject.device)
        applied = subject.applied(batch, seed)
        architecture = self._model.architecture
        self._noise: Tensor | None = None
        if architecture.is_looped and architecture.state_init == "normal":
            std, seed = architecture.state_std, applied.seed(seed)
            noise = [growing_noise(each, capacity, architecture.width, std=std, seed=seed) for each in prompts]
            self._noise = torch.stack(noise).to(self._model.device, self._model.dtype)
        context = self._model.context(batch.input_ids, batch.mask)
        sequence = self._encoded(batch.input_ids, context, applied, None)
        width = batch.input_ids.shape[1]
        state = self._started(sequence, None if self._noise is None else self._noise[:, :width])
        gated = self._gated()
        for recurrence in range(1, recurrences + 1):
            state = self._model.recur(state, self._mixing(sequence, "recurrent", recurrence), recurrence)
            if gated is not None:
                gated.after(state, self._model.gate(state))
        answer = state if gated is None else gated.answer(state)
        logits = self._model.decode(answer, self._mixing(sequence, "coda"))
        self.logits: Tensor = logits[torch.arange(len(prompts)), self._lengths - 1]

    @torch.no_grad()
    def feed(
        self, rows: Sequence[int], tokens: Sequence[int], exits: Exits | None = None
    ) -> tuple[Float[Tensor, "row vocabulary"], list[int]]:
        """Put a token behind each of some texts, which are named once and in order: the answers there, and how many
        recurrences each token took."""
        texts = torch.tensor(rows)
        positions = self._lengths[texts]
        self._lengths[texts] += 1
        ids = torch.tensor(tokens, device=self._model.device)[:, None]
        applied = self._subject.applied(Batch(ids, torch.ones_like(ids, dtype=torch.bool)), self._seed)
        sequence = self._encoded(ids, self._context(ids, positions), applied, (texts, positions))
        state = self._started(sequence, None if self._noise is None else self._noise[texts, positions][:, None])
        going, ended, used = torch.arange(len(rows)), state.clone(), torch.full((len(rows),), self._recurrences)
        answers: list[Tensor | None] = [None] * len(rows)
        gated, some, at = self._gated(), sequence, (texts, positions)
        if exits is not None:
            exits.begin(state)
        for recurrence in range(1, self._recurrences + 1):
            maps: list[Tensor] = []
            wanted = maps if exits is not None and exits.attends else None
            state = self._model.recur(state, self._mixing(some, "recurrent", recurrence, at, wanted), recurrence)
            gate = None if self._model.exit_gate is None else self._model.gate(state)
            if gated is not None and gate is not None:
                gated.after(state, gate)
            if exits is None or recurrence == self._recurrences:
                continue
            logits = self._model.decode(state, self._mixing(some, "coda", 0, at))[:, 0] if exits.decodes else None
            stops = exits.after(state, gate, logits, maps).cpu()
            if not bool(stops.any()):
                continue
            for place in stops.nonzero()[:, 0].tolist():
                answers[int(going[place])] = None if logits is None else logits[place]
            self._cache.stop(at[0][stops], at[1][stops], recurrence)
            used[going[stops]] = recurrence
            ended[going[stops]] = state[stops]
            going, state = going[~stops], state[~stops]
            if not len(going):
                break
            some, at = sequence.rows(going, None), (texts[going], positions[going])
        if len(going):
            ended[going] = state if gated is None else gated.answer(state)
        left = torch.tensor([place for place, answer in enumerate(answers) if answer is None], dtype=torch.int64)
        if len(left):
            late = self._mixing(sequence.rows(left, None), "coda", 0, (texts[left], positions[left]))
            for place, logits in zip(left.tolist(), self._model.decode(ended[left], late)[:, 0], strict=True):
                answers[place] = logits
        return torch.stack([answer for answer in answers if answer is not None]), used.tolist()

    def _gated(self) -> ExitRule | None:
        gated = self._own_gate and self._model.exit_gate is not None
        return ExitRule(self._model.architecture.exit_threshold) if gated else None

    def _encoded(
        self, ids: Tensor, context: AttentionContext, applied: AppliedInterventions, at: tuple[Row, Row] | None
    ) -> TokenSequence:
        context = dataclasses.replace(context, mix=self._cache.mixing("prelude", 0, at))
        return self._model.encode(ids, applied=applied, context=context)

    def _started(self, sequence: TokenSequence, noise: Tensor | None) -> States:
        return sequence.applied.started(sequence.encoded if noise is None else noise, sequence.encoded)

    def _mixing(
        self,
        sequence: TokenSequence,
        stage: Stage,
        recurrence: int = 0,
        at: tuple[Row, Row] | None = None,
        maps: list[Tensor] | None = None,
    ) -> TokenSequence:
        mix = self._cache.mixing(stage, recurrence, at, maps)
        return dataclasses.replace(sequence, context=dataclasses.replace(sequence.context, mix=mix))

    def _context(self, ids: Tensor, positions: Row) -> AttentionContext:
        """Of one token of each text, which looks at all tokens up to itself, or at those within its window."""
        architecture, at = self._model.architecture, positions.to(ids.device)[:, None]
        place = torch.arange(int(positions.max()) + 1, device=ids.device)
        allowed = (place <= at)[:, None, None]
        window = architecture.sliding_window
        near = None if window is None else allowed & (place > at - window)[:, None, None]
        return AttentionContext(ids, rotation_table(architecture, at, self._model.dtype), None, allowed, near)


def check_can_grow(subject: NativeSubject) -> None:
    """Raises `ConfigError` for an intervention on a token."""
    for each in subject.interventions:
        if isinstance(each, ReplaceToken):
            raise ConfigError(
                f"The intervention {each} names a token of a prompt, and a text that is generated grows; leave it out."
            )
