"""Facts about a module that are measured by running it on a few tokens, rather than assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loopscope.architecture import Stage
from loopscope.hooks.forward import HookedForward, Injected
from loopscope.subject import Batch
from loopscope.visits import LoopState, Visit

__all__ = ["Facts", "measure_facts"]

PROBE_TOKENS = 11
"""A length that no other size of a model is likely to be taken for."""

StartForward = Callable[[Batch, int | None, int], HookedForward]
"""`start(batch, recurrences, seed)`; None recurrences are the model's own number."""


@dataclass(frozen=True)
class Facts:
    """What a few forward passes on a few tokens show."""

    recurrences: int | None
    """The model's own number; None without a loop."""
    width: int
    vocab_size: int
    dtype: torch.dtype
    """Of the states."""
    heads: int | None
    carries: bool | None
    """The state at a recurrence's end is the next one's input, unchanged. None where only one recurrence can be run."""
    draws: bool
    """The forward pass takes random numbers from torch's generators."""
    random: bool
    """Another seed gives other logits."""
    overwrites: bool
    """A layer's input or output is changed in place later on."""
    causal: bool
    """What comes later does not change what came before."""
    unseen: dict[tuple[Stage, int], int] = field(default_factory=dict)
    """(stage, layer) without exactly one attention computation that is understood, with how many were seen."""


def measure_facts(start: StartForward, *, looped: bool, own: int | None, settable: bool, tokens: int) -> Facts:
    """Run the probe with the model's `own` recurrences, unless they are known already, and with another number.

    Raises `ConfigError` for a model that cannot be run on the probe, calls its layers otherwise than announced, or
    does not run as many recurrences as it is told.
    """
    records = []
    if own is None or not (looped and settable):
        records.append(_Record(start(_batch(tokens), None, 0)).run())
        own = len(records[0].carried) if looped else None
    recurrences = None
    if looped and settable:
        recurrences = 3 if own == 2 else 2
        records.append(_Record(start(_batch(tokens), recurrences, 0)).run())
    record = records[-1]
    draws = any(record.forward.drew for record in records)
    another = _Record(start(_batch(tokens), recurrences, 1)).run() if draws else record
    changed = _Record(start(_batch(tokens, last=3), recurrences, 0)).run()
    attention = {(visit.stage, visit.layer): visit.attention for visit in record.visits}
    heads = {view.heads for view in attention.values() if view is not None}
    return Facts(
        recurrences=own,
        width=record.visits[0].residual.shape[-1],
        vocab_size=record.logits.shape[-1],
        dtype=record.visits[0].residual.dtype,
        heads=heads.pop() if len(heads) == 1 else None,
        carries=record.carries if len(record.carried) > 1 else None,
        draws=draws,
        random=not torch.equal(another.logits, record.logits),
        overwrites=any(record.overwrites for record in records),
        causal=torch.equal(changed.logits[:, :-1], record.logits[:, :-1]),
        unseen={place: record.forward.attention_calls[place] for place, view in attention.items() if view is None},
    )


def _batch(tokens: int, last: int | None = None) -> Batch:
    """Ids that every vocabulary has."""
    input_ids = torch.arange(tokens)[None] % 3
    if last is not None:
        input_ids[:, -1] = last
    return Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool))


@dataclass
class _Record:
    """One forward pass, kept whole."""

    forward: HookedForward
    visits: list[Visit] = field(default_factory=list)
    injected: list[Tensor] = field(default_factory=list)
    carried: list[Tensor] = field(default_factory=list)
    versions: list[tuple[Tensor, int | None]] = field(default_factory=list)

    def run(self) -> _Record:
        try:
            for event in self.forward:
                if isinstance(event, Visit):
                    self.visits.append(event)
                    self._kept(event.residual)
                elif isinstance(event, Injected):
                    self.injected.append(self._kept(event.state))
                elif isinstance(event, LoopState):
                    self.carried.append(self._kept(event.state))
        finally:
            self.forward.close()
        return self

    def _kept(self, state: Tensor) -> Tensor:
        self.versions.append((state, None if state.is_inference() else state._version))
        return state.clone()

    @property
    def logits(self) -> Tensor:
        assert self.forward.logits is not None  # it has ended
        return self.forward.logits

    @property
    def overwrites(self) -> bool:
        """Torch counts the changes of a tensor, but not of one that was made in inference mode."""
        return any(version is None or state._version != version for state, version in self.versions)

    @property
    def carries(self) -> bool:
        return all(torch.equal(state, begun) for state, begun in zip(self.carried[:-1], self.injected[1:], strict=True))
