"""What a run announces while it advances: visits to layers, and the states carried around the loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopscope._shapes import Keys, Maps, Queries, Rows, States, TokenMask
from loopscope.architecture import Stage

__all__ = ["AttentionView", "LoopState", "Observer", "Visit"]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionView:
    """A visit's attention, as the queries and keys that make it: no T x T map exists until one is asked for.

    Probabilities are computed in float32, or float64 where queries are float64, whatever the model runs in.
    """

    query: Queries
    """After normalisation, bias and rotation."""
    key: Keys
    """Likewise, one per key-value head."""
    scale: float
    """Factor on the scores."""
    mask: TokenMask | None
    """True for tokens, False for padding; None where there is no padding."""

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    def probabilities(self) -> Maps:
        """Post-softmax maps of all heads, (batch, head, query, key); rows and columns of padding are zero."""
        return self.rows(0, self.query.shape[2])

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start:stop` of the maps, (batch, head, stop - start, key)."""
        dtype = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        query = self.query[:, :, start:stop].to(dtype)
        key = self.key.to(dtype)
        batch, heads, rows, dim = query.shape
        groups = key.shape[1]
        grouped = query.reshape(batch, groups, heads // groups, rows, dim)
        scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).reshape(batch, heads, rows, key.shape[2])
        position = torch.arange(key.shape[2], device=key.device)
        allowed = (position <= position[start:stop, None])[None, None]
        if self.mask is not None:
            allowed = allowed & self.mask[:, None, None, :]
        probabilities = (scores * self.scale).masked_fill(~allowed, float("-inf")).softmax(-1)
        if self.mask is not None:
            # A row of left padding has no key to look at, which makes its softmax 0/0.
            probabilities = probabilities.masked_fill(~self.mask[:, None, start:stop, None], 0.0)
        return probabilities


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """One application of one layer."""

    stage: Stage
    layer: int
    """Index in its stage, from 0."""
    recurrence: int
    """From 0; always 0 in prelude and coda."""
    residual: States
    """The layer's raw output, (batch, token, width). It must not be changed in place."""
    attention: AttentionView | None
    """None where the layer's attention cannot be seen."""

    @property
    def label(self) -> str:
        """`prelude.0`, `recurrent.2@5` (layer 2 in recurrence 5), `coda.1`."""
        suffix = f"@{self.recurrence}" if self.stage == "recurrent" else ""
        return f"{self.stage}.{self.layer}{suffix}"


@dataclass(frozen=True, slots=True, eq=False)
class LoopState:
    """The state at the end of a recurrence, as the next one receives it."""

    recurrence: int
    state: Tensor


class Observer:
    """Told of everything that happens in a run, in order. Override what you need."""

    def visit(self, visit: Visit) -> None:
        """A layer was applied."""

    def injected(self, recurrence: int, state: States) -> None:
        """The state after injection, the input of recurrent layer 0."""

    def loop_state(self, loop_state: LoopState) -> None:
        """A recurrence ended."""
