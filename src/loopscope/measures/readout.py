"""Readout: what the model would say after each number of recurrences (method, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope._shapes import Logits, States
from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import widen
from loopscope.model.exit import exit_distribution
from loopscope.subject import Batch
from loopscope.visits import LoopState

__all__ = ["TOKEN_READOUTS", "Decode", "Readout", "next_token_loss", "readout_grid"]

Decode = Callable[[int, States | None], Logits]
"""Logits after a number of recurrences, of which the loop state is at hand; None in a model without a loop."""

TOKEN_READOUTS = ("token_loss", "token_entropy", "token_kl_to_last", "token_top1")
"""Per readout, prompt and token."""


def readout_grid(trained: int, recurrences: int) -> tuple[int, ...]:
    """Powers of two up to the measured number, that number itself, and the trained one."""
    powers = [2**exponent for exponent in range(recurrences.bit_length()) if 2**exponent <= recurrences]
    return tuple(sorted({*powers, recurrences, *((trained,) if trained <= recurrences else ())}))


def next_token_loss(logits: Logits, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of each prompt's own next tokens, nats, (batch,); NaN for a prompt of one token."""
    targets = batch.input_ids[:, 1:]
    loss = functional.cross_entropy(widen(logits[:, :-1]).transpose(1, 2), targets, reduction="none")
    counted = batch.mask[:, 1:]
    return torch.where(counted, loss, 0.0).sum(-1) / counted.sum(-1)


class Readout(Measure):
    """Keeps the loop state after chosen numbers of recurrences, and the exit gate's answers; decodes them at the end.

    The last one is decoded first, for the others are compared with it. A feed-forward model has one, numbered 1.
    """

    def __init__(self, frame: Frame, batch: Batch, grid: Sequence[int]) -> None:
        self.frame = frame
        self.grid = tuple(grid)
        self._batch = batch.to(frame.mask.device)
        self._states: dict[int, States] = {}
        self._gates: list[Tensor] = []

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence + 1 in self.grid:
            self._states[loop_state.recurrence + 1] = loop_state.state
        if loop_state.gate is not None:
            self._gates.append(loop_state.gate)

    def decode(self, decode: Decode) -> None:
        """To be called once, when the run is over."""
        shape = (len(self.grid), self.frame.prompts, self.frame.tokens)
        self._tokens = np.full((3, *shape), np.nan, dtype=np.float32)
        self._top1 = np.full(shape, -1, dtype=np.int64)
        self._losses = np.full(shape[:2], np.nan)
        last: Tensor | None = None
        for place in reversed(range(len(self.grid))):
            logits = decode(self.grid[place], self._states.get(self.grid[place]))
            self._losses[place] = next_token_loss(logits, self._batch).double().cpu().numpy()
            log_shares = widen(logits).log_softmax(-1)
            last = log_shares if last is None else last
            self._keep(place, log_shares, last)
        self._states.clear()

    def _keep(self, place: int, log_shares: Tensor, last: Tensor) -> None:
        """Token by token: loss of the next token, entropy, divergence from the last readout, and the top token."""
        mask = self.frame.mask
        targets = self._batch.input_ids[:, 1:, None]
        loss = torch.full_like(log_shares[..., 0], torch.nan)
        loss[:, :-1] = torch.where(mask[:, 1:], -log_shares[:, :-1].gather(-1, targets)[..., 0], torch.nan)
        shares = log_shares.exp()
        entropy = -(shares * log_shares).sum(-1)
        divergence = (last.exp() * (last - log_shares)).sum(-1)
        values = torch.stack((loss, entropy, divergence)).masked_fill(~mask, torch.nan)
        self._tokens[:, place] = values.float().cpu().numpy()
        self._top1[place] = log_shares.argmax(-1).masked_fill(~mask, -1).cpu().numpy()

    def finish(self) -> Arrays:
        arrays = Arrays({"loss": Named(("readout_recurrence", "prompt"), self._losses)})
        dims = ("readout_recurrence", "prompt", "token")
        for name, values in zip(TOKEN_READOUTS, (*self._tokens, self._top1), strict=True):
            arrays.per_prompt[name] = Named(dims, values)
        if self._gates:
            distribution = exit_distribution(self._gates).movedim(-1, 0)
            mean = masked_mean(distribution, self.frame.mask)
            tokens = distribution.masked_fill(~self.frame.mask, torch.nan)
            arrays.per_prompt["exit_probability"] = Named(("recurrence", "prompt"), mean.double().cpu().numpy())
            arrays.per_prompt["token_exit_probability"] = Named(
                ("recurrence", "prompt", "token"), tokens.float().cpu().numpy()
            )
        return arrays
