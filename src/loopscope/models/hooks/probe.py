"""Facts about a module that are measured by running it on a few tokens, rather than assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from loopscope._util.shapes import States
from loopscope._util.sites import Stage
from loopscope.errors import ConfigError, LoopscopeError
from loopscope.models.hooks.forward import HookedForward, Injected
from loopscope.models.subject import Batch
from loopscope.models.visits import AttentionView, LoopState, MapAttention, QueryKeyAttention, Visit

PROBE_TOKENS = 11
"""A length that no other size of a model is likely to be taken for."""

_FEW = 3
"""Recurrences of the probe: enough to see the second one again, and what it passes on."""

_SHORTER = 4
"""The second prompt of a padded batch has this many tokens less."""

_ROUNDINGS = 64.0
_ROUNDINGS_OF_A_CHAIN = 1024.0
_ROUNDINGS_IN_HALF = 4.0
"""In units of the dtype's: what two orders of adding the same numbers leave. Where the loop enlarges it, it is that
many times what becomes of one rounding at its start; of layers that are called once, the second number. In float32 they
are 8e-6 and 1e-4, and a token that is looked at in earnest changes 1e-3 and more. In half precision a product is added
up in float32 and rounded once."""
_ROUNDING = 1e-2
_ROUNDING_IN_HALF = 0.3
"""Two computations of the same numbers differ by less than this, relative to the largest. Rounding is far below it, but
for a bfloat16 that a loop enlarges; what another state or padding changes is of the numbers' own size."""


@runtime_checkable
class StartForward(Protocol):
    """Begins a forward pass."""

    def __call__(
        self, batch: Batch, recurrences: int | None, seed: int = 0, begins_with: States | None = None
    ) -> HookedForward:
        """None recurrences are the model's own number; `begins_with` is given to the first recurrent layer instead of
        what it would receive."""


@dataclass(frozen=True, slots=True)
class Padding:
    """What later tokens and padding do to a prompt, in a run of some number of recurrences."""

    causal: bool
    """What comes later does not change what came before, but for rounding."""
    effect: str | None
    """What happens to a prompt that is padded on the right, in words; None where its numbers stay the same but for
    rounding, and where states are random or padding cannot be hidden, so that this was not tried."""


@dataclass(frozen=True)
class Facts:
    """What a few forward passes on a few tokens show."""

    recurrences: int | None
    """The model's own number; None without a loop."""
    only_tokens: int | None
    """Prompts of that many tokens alone can be run; None where other numbers can."""
    width: int
    vocab_size: int
    dtype: torch.dtype
    """Of the states."""
    heads: int | None
    """Query heads; None where no attention can be seen, or layers have different numbers."""
    carries: bool | None
    """The state at a recurrence's end is the next one's input, unchanged. None where only one recurrence can be run."""
    prompt_enters: bool | None
    """The prompt enters the loop by more than the initial state. None where the loop does not carry its state
    unchanged, so that this was not tried."""
    one_map: bool | None
    """Entered with what the first recurrent layer receives in the second recurrence, the first one does what the second
    does, and likewise with the last but one of the model's own number. None where fewer than two can be run."""
    restarts: bool
    """The first recurrent layer receives the same in every recurrence, so that what goes round passes beside it."""
    keeps: bool
    """Some tokens begin a recurrence with what they began the last one with, while others go on from what was put
    out."""
    foresees: bool
    """The loop knows how often it will run: its first recurrences depend on it."""
    draws: bool
    """The forward pass takes random numbers from torch's generators."""
    random: bool
    """Another seed gives other logits."""
    overwrites: bool
    """A layer's input or output, or what its attention was computed from, is changed in place later on."""
    behind: Padding
    """What a later token and padding do, at the model's own number of recurrences."""
    sink_heads: int | None = None
    """Heads that give a part of their attention to a column beside the tokens, where that is seen in a layer; None
    without one, or where layers have different numbers."""
    attention_calls: int = 1
    """The most attention computations in one call of a layer."""
    unseen: dict[tuple[Stage, int], int] = field(default_factory=dict)
    """(stage, layer) without exactly one attention computation that is understood, with how many were seen."""


def measure_facts(
    start: StartForward, *, looped: bool, own: int | None, settable: bool, takes_mask: bool, probe: Batch
) -> Facts:
    """Run the probe with the model's `own` recurrences, unless they are known already, and with another number.

    Raises `ConfigError` for a model that cannot be run on the probe, calls its layers otherwise than announced, does
    not run as many recurrences as it is told, or gives other numbers when it is run again.
    """
    records = []
    if own is None or not (looped and settable):
        records.append(_Record(start(probe, None)).run())
        own = len(records[0].carried) if looped else None
    recurrences = None
    if looped and settable:
        recurrences = _FEW
        try:
            records.append(_Record(start(probe, recurrences)).run())
        except Exception:
            # It may have an embedding for each of its recurrences, and no more of them.
            if own != 2:
                raise
            recurrences = own
            records.append(_Record(start(probe, recurrences)).run())
    record = records[-1]
    again = _Record(start(probe, recurrences)).run()
    _require_same_again(again, record)
    _refuse_states(record)
    draws = any(record.forward.drew for record in records)
    another = _Record(start(probe, recurrences, 1)).run() if draws else record
    random = not torch.equal(another.logits, record.logits)
    prompt_enters = None
    if record.carries:
        # The last token differs from the record's, and the loop begins with the record's state all the same.
        elsewhere = _Record(start(with_other_end(probe), recurrences, begins_with=record.injected[0])).run()
        prompt_enters = not elsewhere.same_loop(record)
    other_loop = record
    if recurrences is not None:
        other_loop = _Record(start(probe, recurrences - 1)).run()
    # An acceleration may begin later than in the first few recurrences.
    longest = recurrences if recurrences is None else max(own or 0, recurrences)
    one_map = restarts = None
    if len(record.carried) > 1:
        restarts = all(torch.equal(record.injected[0], state) for state in record.injected[1:])
        entered = _Record(start(probe, recurrences, begins_with=record.injected[1])).run()
        exactly = again.same_loop(record)
        one_map = entered.repeats(record, 1, exactly=exactly)
        # What changes with the number of the recurrence may change later than in the first few.
        whole = _Record(start(probe, longest)).run() if one_map and longest != recurrences else record
        if one_map and len(whole.carried) > 3:
            late = len(whole.carried) - 2
            entered = _Record(start(probe, recurrences, begins_with=whole.injected[late])).run()
            one_map = entered.repeats(whole, late, exactly=exactly)
    another_length = _of_another_length(start, probe, recurrences)
    _require_one_width([*record.visits, *(another_length.visits if another_length is not None else ())])
    behind = measure_padding(
        start, longest, probe, takes_mask=takes_mask, random=random, only_tokens=another_length is None
    )
    attention = {(visit.stage, visit.layer): visit.attention for visit in record.visits}
    heads = {view.heads for view in attention.values() if view is not None}
    return Facts(
        recurrences=own,
        only_tokens=probe.input_ids.shape[1] if another_length is None else None,
        width=record.visits[0].residual.shape[-1],
        vocab_size=record.logits.shape[-1],
        dtype=record.visits[0].residual.dtype,
        heads=heads.pop() if len(heads) == 1 else None,
        carries=record.carries,
        prompt_enters=prompt_enters,
        one_map=one_map,
        restarts=restarts is True,
        keeps=record.keeps,
        foresees=not other_loop.same_loop(record, exactly=again.same_loop(record)),
        draws=draws,
        random=random,
        overwrites=any(record.overwrites for record in records),
        behind=behind,
        sink_heads=_sink_heads(record, heads),
        attention_calls=max(record.forward.attention_calls.values(), default=1),
        unseen={place: record.forward.attention_calls[place] for place, view in attention.items() if view is None},
    )


def _sink_heads(record: _Record, heads: set[int]) -> int | None:
    found = {visit.sink.shape[1] for visit in record.visits if visit.sink is not None}
    return found.pop() if len(found) == 1 and not heads - found else None


def _of_another_length(start: StartForward, probe: Batch, recurrences: int | None) -> _Record | None:
    """A shorter prompt, or a longer one; None for a model that fails on both, as one of boards does."""
    longer = Batch(*(torch.cat((each, each[:, :1]), 1) for each in (probe.input_ids, probe.mask)))
    for other in (shortened(probe), longer):
        try:
            return _Record(start(other, recurrences)).run()
        except LoopscopeError:
            raise
        except Exception:
            continue
    return None


def _require_same_again(again: _Record, record: _Record) -> None:
    apart = _apart(again.logits, record.logits)
    if apart is not None:
        raise ConfigError(
            "The model gives other numbers when it is run again on the same tokens with the same seed (logits differ "
            f"by {apart:.2g} of their size), so that its runs cannot be compared; it must draw random numbers from "
            "torch's own generators and keep nothing from one call for the next."
        )


def _refuse_states(record: _Record) -> None:
    if any(torch.equal(record.logits, each) for each in (record.visits[-1].residual, *record.carried[-1:])):
        raise ConfigError(
            "What the model returned, or the first thing of it, are the states of its last layer and no logits; give a "
            "model with a head, or forward=, which returns the logits (without a head, perhaps the states times the "
            "embedding)."
        )


def _require_one_width(visits: Sequence[Visit]) -> None:
    """Of all layers, whatever the number of tokens: a layer may hand out (batch, token, token) before its state."""
    labels = {visit.residual.shape[-1]: visit.label for visit in reversed(visits)}
    if len(labels) > 1:
        found = ", ".join(f"{label} of {width}" for width, label in labels.items())
        raise ConfigError(
            f"The layers' first outputs differ in width ({found}); name modules whose first output is the state, which "
            "has one width in all of them and for every prompt."
        )


def measure_padding(
    start: StartForward,
    recurrences: int | None,
    probe: Batch,
    *,
    takes_mask: bool,
    random: bool,
    only_tokens: bool = False,
) -> Padding:
    """A prompt with another last token, and one that is the shorter of a batch, against the same alone."""
    record = _Record(start(probe, recurrences)).run()
    changed = _Record(start(with_other_end(probe), recurrences)).run()

    def noise() -> float:
        """How far the logits go where every entry of the first recurrence's input is off by a rounding."""
        forward = start(probe, recurrences)
        if not record.injected:
            return 0.0
        state = record.injected[0]
        factors = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        forward.nudge(1 + factors.to(state.device) * torch.finfo(state.dtype).eps)
        return _relative(_Record(forward).run().logits, record.logits)

    before = changed.logits[:, :-1], record.logits[:, :-1]
    causal = torch.equal(*before) or _explained(_relative(*before), record, noise)
    if random or only_tokens or not (takes_mask or causal):
        return Padding(causal, None)
    cut = shortened(probe)
    short, tokens = cut.input_ids.shape[1], probe.input_ids.shape[1]
    alone = _Record(start(cut, recurrences)).run()
    shown = torch.arange(tokens, device=probe.mask.device)[None] < short
    padded = Batch(probe.input_ids.expand(2, tokens), torch.cat((probe.mask, shown)))
    try:
        together = _Record(start(padded, recurrences)).run()
    except Exception as error:  # its owner may never need padding
        return Padding(causal, f"it fails with {type(error).__name__} ({str(error).partition(chr(10))[0]})")
    apart = _relative(together.logits[1:, :short], alone.logits)
    if _explained(apart, record, noise):
        return Padding(causal, None)
    return Padding(causal, f"its logits change by {apart:.2g} of their size")


def _explained(apart: float, record: _Record, noise: Callable[[], float]) -> bool:
    """Whether rounding makes such a difference: a little of it at once, or as much as the loop makes of one."""
    dtype = record.logits.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    at_once = _ROUNDINGS if record.injected else _ROUNDINGS_OF_A_CHAIN
    if apart <= (_ROUNDINGS_IN_HALF if half else at_once) * torch.finfo(dtype).eps:
        return True
    return apart <= min(
        (_ROUNDINGS_IN_HALF if half else _ROUNDINGS) * noise(), _ROUNDING_IN_HALF if half else _ROUNDING
    )


def _apart(got: Tensor, expected: Tensor) -> float | None:
    """How far they differ, None where that may be rounding."""
    limit = _ROUNDING_IN_HALF if expected.dtype in (torch.float16, torch.bfloat16) else _ROUNDING
    apart = _relative(got, expected)
    return apart if apart > limit else None


def _relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest magnitude."""
    scale = expected.double().abs().amax()
    return float((got.double() - expected.double()).abs().amax() / scale.clamp_min(torch.finfo(torch.float64).tiny))


def probe_batch(tokens: int) -> Batch:
    """Ids that every vocabulary has."""
    input_ids = torch.arange(tokens)[None] % 3
    return Batch(input_ids, torch.ones_like(input_ids, dtype=torch.bool))


def with_other_end(probe: Batch, place: int = -1) -> Batch:
    """The last token, or that in another place, is another of the prompt, or, where they are all the same, one that is
    not."""
    input_ids = probe.input_ids.clone()
    others = input_ids[input_ids != input_ids[0, place]]
    input_ids[0, place] = others[0] if len(others) else (input_ids[0, place] == 0).long()
    return Batch(input_ids, probe.mask)


def shortened(probe: Batch) -> Batch:
    """The same without its last few tokens."""
    tokens = max(1, probe.input_ids.shape[1] - _SHORTER)
    return Batch(probe.input_ids[:, :tokens], probe.mask[:, :tokens])


@dataclass
class _Record:
    """One forward pass, kept whole."""

    forward: HookedForward
    visits: list[Visit] = field(default_factory=list)
    injected: list[Tensor] = field(default_factory=list)
    """Inputs of the first recurrent layer."""
    carried: list[Tensor] = field(default_factory=list)
    versions: list[tuple[Tensor, int | None]] = field(default_factory=list)

    def run(self) -> _Record:
        try:
            for event in self.forward:
                if isinstance(event, Visit):
                    self.visits.append(event)
                    for tensor in (event.residual, *_behind(event.attention)):
                        self._note(tensor)
                elif isinstance(event, Injected):
                    self.injected.append(self._kept(event.state))
                elif isinstance(event, LoopState):
                    self.carried.append(self._kept(event.state))
        finally:
            self.forward.close()
        return self

    def _kept(self, state: Tensor) -> Tensor:
        self._note(state)
        return state.clone()

    def _note(self, tensor: Tensor) -> None:
        self.versions.append((tensor, None if tensor.is_inference() else tensor._version))

    @property
    def logits(self) -> Tensor:
        assert self.forward.logits is not None  # it has ended
        return self.forward.logits

    @property
    def overwrites(self) -> bool:
        """Torch counts the changes of a tensor, but not of one that was made in inference mode."""
        return any(version is None or state._version != version for state, version in self.versions)

    @property
    def carries(self) -> bool | None:
        if len(self.carried) < 2:
            return None
        return all(torch.equal(state, begun) for state, begun in zip(self.carried[:-1], self.injected[1:], strict=True))

    @property
    def keeps(self) -> bool:
        for before, ended, begun in zip(self.injected, self.carried, self.injected[1:], strict=False):
            if before.shape == ended.shape == begun.shape:
                goes_on = (begun == ended).all(-1)
                if bool(goes_on.any()) and bool(((begun == before).all(-1) & ~goes_on).any()):
                    return True
        return False

    def same_loop(self, other: _Record, *, exactly: bool = True) -> bool:
        """The states are the same as far as both go: bit for bit, or but for rounding."""
        pairs = zip(self.carried, other.carried, strict=False)
        return all(torch.equal(*pair) if exactly else _apart(*pair) is None for pair in pairs)

    def repeats(self, other: _Record, at: int, *, exactly: bool) -> bool:
        """Begun with what the other's recurrence `at` (from 0) receives, this one's first does the same: it passes on
        the same, and the next receives the same."""
        pairs = [(self.carried[0], other.carried[at])]
        if len(other.injected) > at + 1:
            pairs.append((self.injected[1], other.injected[at + 1]))
        return all(_same(*pair, exactly) for pair in pairs)


def _same(got: Tensor, expected: Tensor, exactly: bool) -> bool:
    return is_rounding(got, expected) if exactly else _apart(got, expected) is None


def is_rounding(got: Tensor, expected: Tensor) -> bool:
    """For the same operations on the same numbers in tensors of the same shape, which may lie otherwise in memory."""
    if not expected.numel():
        return True
    limit = min(_ROUNDINGS * torch.finfo(expected.dtype).eps, _ROUNDING_IN_HALF / 10)
    apart = (got.double() - expected.double()).abs().amax()
    return bool(apart <= limit * expected.double().abs().amax())


def _behind(view: AttentionView | None) -> list[Tensor]:
    """The model's tensors that a view computes its rows from."""
    match view:
        case QueryKeyAttention(query=query, key=key, added=added, value=value):
            return [query, key, *(each for each in (added, value) if each is not None)]
        case MapAttention(maps=maps):
            return [maps]
        case _:
            return []
