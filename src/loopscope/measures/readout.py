"""Readout: what the model would say after each number of recurrences (method, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope._shapes import Logits, States
from loopscope.measures.base import Arrays, Frame, Measure, Named, masked_mean
from loopscope.measures.functions import widen
from loopscope.model.exit import exit_cumulated, exit_distribution
from loopscope.subject import Batch
from loopscope.visits import LoopState

__all__ = [
    "EXIT_READOUTS",
    "TOKEN_READOUTS",
    "Decode",
    "Readout",
    "kl_divergence",
    "next_token_loss",
    "readout_grid",
]

Decode = Callable[[int, States | None], Logits]
"""Logits after a number of recurrences, of which the loop state is at hand; None in a model without a loop."""

TOKEN_READOUTS = ("token_loss", "token_entropy", "token_kl_to_last", "token_top1")
"""Per readout, prompt and token."""

EXIT_READOUTS = ("token_kl_to_previous", "token_kl_to_full")
"""Per number of recurrences at which a token may stop, prompt and token."""

_PIECE_ENTRIES = 2**20
"""Logits that are reduced together, in float64: 8 MiB and a few temporaries, however large the vocabulary is."""


def readout_grid(trained: int, recurrences: int, exits: int = 0) -> tuple[int, ...]:
    """Powers of two up to the measured number, that number itself, the trained one, and every one up to `exits`."""
    powers = [2**exponent for exponent in range(recurrences.bit_length())]
    return tuple(
        sorted(count for count in {*powers, recurrences, trained, *range(1, exits + 1)} if count <= recurrences)
    )


def next_token_loss(logits: Logits, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of each prompt's own next tokens, nats, (batch,); NaN for a prompt of one token."""
    targets = batch.input_ids[:, 1:]
    loss = functional.cross_entropy(widen(logits[:, :-1]).transpose(1, 2), targets, reduction="none")
    counted = batch.mask[:, 1:]
    return torch.where(counted, loss, 0.0).sum(-1) / counted.sum(-1)


def kl_divergence(
    log_p: Float[Tensor, "*shape vocabulary"], log_q: Float[Tensor, "*shape vocabulary"]
) -> Float[Tensor, "*shape"]:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)`, nats, of logarithms of probabilities; at least 0.

    Take it in float64: a small divergence is the difference of large sums, and in float32 nothing below about 1e-7 is
    resolved.
    """
    return _expected(log_p.exp(), log_p - log_q).clamp(min=0.0)


def _expected(shares: Tensor, values: Tensor) -> Tensor:
    """Mean of values under a distribution over the last dimension. What has no probability counts for nothing,
    whatever its value."""
    return torch.where(shares == 0, 0.0, shares * values).sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Prediction:
    """A readout that others are compared with."""

    logits: Logits
    normalizer: Tensor
    """`log sum_v exp(logit_v)`, float64, (batch, token)."""

    def log_shares(self, place: tuple[int, slice]) -> Float[Tensor, "token vocabulary"]:
        """Of some tokens of one prompt, float64."""
        return self.logits[place].double() - self.normalizer[place][:, None]


class Readout(Measure):
    """Keeps the loop state after chosen numbers of recurrences, and the exit gate's answers; decodes them at the end.

    The last one is decoded first, for the others are compared with it. A feed-forward model has one, numbered 1. Up to
    `exits` recurrences, a full run, every state is decoded, and its prediction is compared with the one before it and
    with the full run's: what rules that stop a token early go by, and what they cost.

    Of the logits four are there at a time: those of the last readout, of the full run, of the one decoded just before,
    and of the one that is being reduced, in small pieces.
    """

    def __init__(self, frame: Frame, batch: Batch, grid: Sequence[int], exits: int = 0) -> None:
        self.frame = frame
        self.grid = tuple(sorted({*grid, *range(1, exits + 1)}))
        self.exits = exits
        self._batch = batch.to(frame.mask.device)
        self._lengths = frame.counts.tolist()
        self._states: dict[int, States] = {}
        self._gates: list[Tensor] = []
        shape = (frame.prompts, frame.tokens)
        self._tokens = np.full((3, len(self.grid), *shape), np.nan, dtype=np.float32)
        self._top1 = np.full((len(self.grid), *shape), -1, dtype=np.int64)
        self._losses = np.full((len(self.grid), frame.prompts), np.nan)
        self._to_previous, self._to_full = np.full((2, exits, *shape), np.nan, dtype=np.float32)

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence + 1 in self.grid:
            self._states[loop_state.recurrence + 1] = loop_state.state
        if loop_state.gate is not None:
            self._gates.append(loop_state.gate)

    def decode(self, decode: Decode) -> None:
        """To be called once, when the run is over."""
        last: _Prediction | None = None
        full: _Prediction | None = None
        after: _Prediction | None = None
        for count in reversed(self.grid):
            logits = decode(count, self._states.pop(count, None))
            normalizer = torch.full(logits.shape[:2], torch.nan, dtype=torch.float64, device=logits.device)
            for place in self._pieces(logits):
                normalizer[place] = logits[place].double().logsumexp(-1)
            now = _Prediction(logits, normalizer)
            last = now if last is None else last
            self._keep(count, now, last)
            if count == self.exits:
                full, after = now, None
            if full is not None:
                self._keep_exit(count, now, full, after)
            after = now

    def _pieces(self, logits: Logits) -> Iterator[tuple[int, slice]]:
        """All tokens, (row, some tokens) at a time."""
        size = max(1, _PIECE_ENTRIES // logits.shape[-1])
        for row, length in enumerate(self._lengths):
            for start in range(0, length, size):
                yield row, slice(start, min(start + size, length))

    def _keep(self, count: int, now: _Prediction, last: _Prediction) -> None:
        """Token by token: loss of the next token, entropy, divergence from the last readout, and the top token."""
        mask = self.frame.mask
        targets = self._batch.input_ids.roll(-1, dims=1)
        values = torch.full((3, *mask.shape), torch.nan, dtype=torch.float64, device=mask.device)
        top1 = torch.full(mask.shape, -1, dtype=torch.int64, device=mask.device)
        for place in self._pieces(now.logits):
            log_shares = now.log_shares(place)
            values[0][place] = -log_shares.gather(-1, targets[place][:, None])[:, 0]
            values[1][place] = -_expected(log_shares.exp(), log_shares)
            values[2][place] = kl_divergence(last.log_shares(place), log_shares)
            top1[place] = log_shares.argmax(-1)
        followed = functional.pad(mask[:, 1:], (0, 1))
        values[0].masked_fill_(~followed, torch.nan)
        index = self.grid.index(count)
        self._losses[index] = masked_mean(values[0], followed).cpu().numpy()
        self._tokens[:, index] = values.float().cpu().numpy()
        self._top1[index] = top1.cpu().numpy()

    def _keep_exit(self, count: int, now: _Prediction, full: _Prediction, after: _Prediction | None) -> None:
        """Token by token: the divergence of this prediction from the full run's, and of the one after from this."""
        values = torch.full((2, *now.logits.shape[:2]), torch.nan, dtype=torch.float64, device=now.logits.device)
        for place in self._pieces(now.logits):
            log_shares = now.log_shares(place)
            values[0][place] = kl_divergence(full.log_shares(place), log_shares)
            if after is not None:
                values[1][place] = kl_divergence(log_shares, after.log_shares(place))
        to_full, to_this = values.float().cpu().numpy()
        self._to_full[count - 1] = to_full
        if after is not None:
            self._to_previous[count] = to_this

    def finish(self) -> Arrays:
        arrays = Arrays({"loss": Named(("readout_recurrence", "prompt"), self._losses)})
        dims = ("readout_recurrence", "prompt", "token")
        for name, values in zip(TOKEN_READOUTS, (*self._tokens, self._top1), strict=True):
            arrays.per_prompt[name] = Named(dims, values)
        if self.exits:
            dims = ("exit_recurrence", "prompt", "token")
            for name, values in zip(EXIT_READOUTS, (self._to_previous, self._to_full), strict=True):
                arrays.per_prompt[name] = Named(dims, values)
        if self._gates:
            arrays.update(self._exit_gate())
        return arrays

    def _exit_gate(self) -> Arrays:
        """What the model's own gate says, mean over tokens and token by token."""
        mask = self.frame.mask
        distribution = exit_distribution(self._gates)
        cumulated = exit_cumulated(distribution).masked_fill(~mask[..., None], torch.nan).movedim(-1, 0)
        tokens = distribution.masked_fill(~mask[..., None], torch.nan).movedim(-1, 0)
        mean = masked_mean(distribution.movedim(-1, 0), mask)
        dims = ("recurrence", "prompt", "token")
        return Arrays(
            {
                "exit_probability": Named(dims[:2], mean.double().cpu().numpy()),
                "token_exit_probability": Named(dims, tokens.float().cpu().numpy()),
                "token_exit_cumulated": Named(dims, widen(cumulated).cpu().numpy()),
            }
        )
