"""What a run announces while it advances: visits to layers, and the states carried around the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from loopscope._util.shapes import Keys, Maps, Queries, Rows, States, TokenMask, Values
from loopscope._util.sites import Site, Stage


class AttentionView(ABC):
    """A visit's attention, of which rows are computed when they are asked for.

    Probabilities are float32, or float64 where the model's queries are, whatever the model runs in.
    """

    @property
    @abstractmethod
    def heads(self) -> int:
        """Query heads."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Rows of a map: queries, padding included."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the view keeps alive."""

    @abstractmethod
    def tile(self, start: int, stop: int) -> Rows:
        """Rows `start:stop` of the post-softmax maps, (batch, head, stop - start, key), padding zero.

        Keys that none of these queries can see may be left out at the end: under a causal mask there are `stop`.
        """

    def without_values(self) -> AttentionView:
        """The same for who keeps views, and reads rows alone."""
        return self

    @abstractmethod
    def prompt(self, row: int) -> AttentionView:
        """The attention of one prompt of the batch alone; it shares the memory of this view."""

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start:stop` of the post-softmax maps with every key, (batch, head, stop - start, key); padding is
        zero."""
        tile = self.tile(start, stop)
        return functional.pad(tile, (0, self.tokens - tile.shape[-1]))

    def probabilities(self) -> Maps:
        """The maps of all heads, (batch, head, query, key); rows and columns of padding are zero."""
        return self.rows(0, self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class QueryKeyAttention(AttentionView):
    """Attention as the queries and keys that make it: no T x T map exists until one is asked for."""

    query: Queries
    """After normalisation, bias and rotation."""
    key: Keys
    """Likewise, one per key-value head."""
    scale: float
    """Factor on the scores."""
    mask: TokenMask | None
    """True for tokens, False for padding; None where there is no padding."""
    window: int | None = None
    """A query looks at itself and the keys before it, that many in all; None for no limit."""
    causal: bool = True
    """A query looks at no later key."""
    added: Tensor | None = None
    """What the model adds to the scores, broadcast to (batch, head, query, key): -infinity where a key is hidden."""
    value: Values | None = None
    """What the rows mix, one per key-value head; None where it is not kept."""

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def tokens(self) -> int:
        return self.query.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(0 if each is None else each.nbytes for each in (self.query, self.key, self.value, self.added))

    def tile(self, start: int, stop: int) -> Rows:
        keys = min(stop, self.key.shape[2]) if self.causal else self.key.shape[2]
        scores = self._scores(self.query[:, :, start:stop], self.key[:, :, :keys])
        if self.added is not None:
            added = self.added if self.added.shape[-2] == 1 else self.added[..., start:stop, :]
            scores = scores + (added if added.shape[-1] == 1 else added[..., :keys]).to(scores.dtype)
        self._hide(scores, start, stop)
        probabilities = scores.softmax(-1)
        if self.mask is not None and _may_hide((tokens := self.mask[:, start:stop]).logical_not()):
            # A row of padding may have no key to look at, which makes its softmax 0/0.
            probabilities.masked_fill_(~tokens[:, None, :, None], 0.0)
        return probabilities

    def on(self, device: torch.device) -> QueryKeyAttention:
        """The same on another device."""
        if self.query.device == device:
            return self
        mask, added, value = (None if each is None else each.to(device) for each in (self.mask, self.added, self.value))
        return replace(self, query=self.query.to(device), key=self.key.to(device), mask=mask, added=added, value=value)

    def without_values(self) -> QueryKeyAttention:
        return self if self.value is None else replace(self, value=None)

    def prompt(self, row: int) -> QueryKeyAttention:
        one = slice(row, row + 1)
        added = self.added if self.added is None or self.added.shape[0] == 1 else self.added[one]
        mask, value = (None if each is None else each[one] for each in (self.mask, self.value))
        return replace(self, query=self.query[one], key=self.key[one], mask=mask, added=added, value=value)

    def _scores(self, query: Tensor, key: Tensor) -> Rows:
        batch, heads, rows, dim = query.shape
        groups, keys = key.shape[1:3]
        if _multiplies_widely(query, key):
            grouped = query.reshape(batch * groups, heads // groups * rows, dim)
            wide = torch.bmm(grouped, key.reshape(batch * groups, keys, dim).mT, out_dtype=torch.float32)
            return wide.mul_(self.scale).reshape(batch, heads, rows, keys)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        grouped = (query.to(dtype) * self.scale).reshape(batch, groups, heads // groups, rows, dim)
        return (grouped @ key.to(dtype).unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, rows, keys)

    def _hide(self, scores: Tensor, start: int, stop: int) -> None:
        """Set the scores of keys that may not be looked at to -infinity, in place."""
        keys = scores.shape[-1]
        position = torch.arange(keys, device=scores.device)
        query = torch.arange(start, stop, device=scores.device)
        if self.causal:
            # Every key before the first of these queries is behind all of them.
            scores[..., start:].masked_fill_(position[start:] > query[:, None], float("-inf"))
        if self.window is not None and self.window < stop:
            scores.masked_fill_(position <= query[:, None] - self.window, float("-inf"))
        # Under a causal mask, padding after the last token is hidden already.
        if self.mask is not None and (not self.causal or _may_hide(self.mask[:, 1:] & ~self.mask[:, :-1])):
            scores.masked_fill_(~self.mask[:, None, None, :keys], float("-inf"))


def _multiplies_widely(query: Tensor, key: Tensor) -> bool:
    """Whether a GPU's units for products of half precision can add them up in float32. The products are exact there, so
    that nothing is lost against widening both first, which keeps those units idle."""
    half = query.dtype == key.dtype and query.dtype in (torch.bfloat16, torch.float16)
    return half and query.is_cuda and "dtype" in torch.ops.aten.bmm.overloads()


def _may_hide(places: Tensor) -> bool:
    """Whether any of these is True. A GPU is not asked, which would be to wait for it: there one may be."""
    return not places.is_cpu or bool(places.any())


@dataclass(frozen=True, slots=True, eq=False)
class MapAttention(AttentionView):
    """Attention of a model that computes its maps itself and hands them out whole."""

    maps: Tensor
    """Post-softmax, (batch, head, query, key), in the model's dtype."""
    mask: TokenMask | None

    @property
    def heads(self) -> int:
        return self.maps.shape[1]

    @property
    def tokens(self) -> int:
        return self.maps.shape[2]

    @property
    def nbytes(self) -> int:
        return self.maps.nbytes

    def tile(self, start: int, stop: int) -> Rows:
        dtype = torch.float64 if self.maps.dtype == torch.float64 else torch.float32
        rows = self.maps[:, :, start:stop].to(dtype)
        if self.mask is None:
            return rows
        return rows.masked_fill(~self.mask[:, None, start:stop, None] | ~self.mask[:, None, None, :], 0.0)

    def prompt(self, row: int) -> MapAttention:
        one = slice(row, row + 1)
        return MapAttention(self.maps[one], None if self.mask is None else self.mask[one])


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """One application of one layer."""

    stage: Stage
    layer: int
    """Index in its stage, from 0."""
    recurrence: int
    """Which one, from 1; 0 in prelude and coda, which are outside all of them."""
    residual: States
    """The layer's raw output, (batch, token, width). It must not be changed in place."""
    attention: AttentionView | None
    """None where the layer's attention cannot be seen."""
    sink: Tensor | None = None
    """What each query gives to a column beside the tokens, (batch, head, query); None where there is none."""

    @property
    def site(self) -> Site:
        return Site(self.stage, self.layer, self.recurrence)

    @property
    def label(self) -> str:
        """`prelude.0`, `recurrent.2@5` (layer 2 in the fifth recurrence), `coda.1`."""
        return self.site.label


@dataclass(frozen=True, slots=True, eq=False)
class LoopState:
    """The state at the end of a recurrence, as the next one receives it."""

    recurrence: int
    """How many are done, from 1."""
    state: Tensor
    gate: Tensor | None = None
    """The exit gate's answer to the state before its sigmoid, (batch, token), where the model has one."""


class Observer:
    """Notified of everything that happens in a run, in order. Override what you need."""

    def visit(self, visit: Visit) -> None:
        """A layer was applied."""

    def injected(self, recurrence: int, state: States) -> None:
        """The state after injection, the input of recurrent layer 0 in this recurrence, from 1."""

    def loop_state(self, loop_state: LoopState) -> None:
        """A recurrence ended."""
