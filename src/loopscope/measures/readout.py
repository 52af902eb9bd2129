"""Readout: what the model would say after each number of recurrences (method, section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from loopscope._util.shapes import Logits, States
from loopscope.measures.base import BatchInfo, Measure, RunEnd, Variable, masked_mean, variable
from loopscope.measures.functions import widen
from loopscope.measures.memory import Memory, tile_entries
from loopscope.models.native.exit import exit_cumulated, exit_distribution
from loopscope.models.subject import Batch
from loopscope.models.visits import LoopState

TOKEN_READOUTS = (
    "token_loss",
    "token_entropy",
    "token_kl_to_last",
    "token_margin",
    "token_top1_probability",
    "token_top1",
)
"""Per readout, prompt and token."""

EXIT_READOUTS = ("token_kl_to_previous", "token_kl_to_full")
"""Per number of recurrences at which a token may stop, prompt and token."""

_READ, _EXIT = "readout_recurrence prompt token", "exit_recurrence prompt token"
_NO_EXITS = "the model was not read out after each recurrence of a full run (--exit-recurrences)"
_NO_ANSWER = "no answer was given to look for (--answer)"
_NO_GATE = "the model has no exit gate"

_PIECE_ENTRIES = 2**18
"""Logits that are reduced together on a CPU, in float64: 2 MiB and a few temporaries, so that the passes over them stay
in its cache."""


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
    logits: Float[Tensor, "*shape vocabulary"], other: Float[Tensor, "*shape vocabulary"]
) -> Float[Tensor, "*shape"]:
    """`KL(p || q) = sum_v p_v (log p_v - log q_v)`, nats, at least 0, of the predictions p and q that logits make.

    In float64: a small divergence is the difference of large sums, of which float32 resolves nothing below about 1e-7.
    """
    return TokenDistribution.of(logits).divergence(TokenDistribution.of(other))


@dataclass(frozen=True, eq=False)
class TokenDistribution:
    """A distribution over the vocabulary, `p_v = exp(score_v - normalizer)`, of each of some tokens."""

    scores: Tensor
    """Logits in float64, (..., vocabulary)."""
    normalizer: Tensor
    """`log sum_v exp(score_v)`, float64, (...)."""

    @classmethod
    def of(cls, logits: Tensor) -> TokenDistribution:
        scores = logits.double()
        return cls(scores, scores.logsumexp(-1))

    @cached_property
    def shares(self) -> Tensor:
        return (self.scores - self.normalizer[..., None]).exp_()

    def mean_log(self, other: TokenDistribution) -> Tensor:
        """`sum_v p_v log q_v`. Logarithms of the shares are never formed, which would be one more pass over them."""
        found: Tensor = torch.linalg.vecdot(self.shares, other.scores)
        if not self.scores.is_cpu or not bool(found.isfinite().all()):
            # A score of -infinity: what has no probability counts for nothing. To ask a GPU would be to wait for it.
            found = torch.where(self.shares == 0, 0.0, self.shares * other.scores).sum(-1)
        return found - other.normalizer

    def divergence(self, other: TokenDistribution) -> Tensor:
        """`KL(p || q)`."""
        return (self.mean_log(self) - self.mean_log(other)).clamp(min=0.0)

    @property
    def entropy(self) -> Tensor:
        """Nats."""
        return -self.mean_log(self)

    @property
    def top(self) -> tuple[Tensor, Tensor, Tensor]:
        """The most probable token, how far its logit is above the next one, and its probability."""
        top = self.scores.argmax(-1, keepdim=True)
        largest = self.scores.gather(-1, top)[..., 0]
        margin = largest - self.scores.scatter(-1, top, -torch.inf).amax(-1)
        return top[..., 0], margin, (largest - self.normalizer).exp()


@dataclass(frozen=True, slots=True, eq=False)
class _Decoded:
    """A readout of all tokens, with which others are compared."""

    logits: Logits
    normalizer: Tensor
    """Float64, (batch, token); of padding NaN."""

    def at(self, place: tuple[int, slice]) -> TokenDistribution:
        """Of some tokens of one prompt."""
        return TokenDistribution(self.logits[place].double(), self.normalizer[place])


class Readout(Measure):
    """Keeps the loop state after chosen numbers of recurrences, and the exit gate's answers; decodes them at the end.

    The last one is decoded first, for the others are compared with it. A feed-forward model has one, numbered 1. Up to
    the plan's `exits` recurrences, a full run, every state is decoded, and its prediction is compared with the one
    before it and with the full run's: what rules that stop a token early go by, and what they cost.

    Of the logits four are there at a time: those of the last readout, of the full run, of the one decoded just before,
    and of the one that is being reduced, in small pieces.
    """

    part = "readout"
    variables: ClassVar[dict[str, Variable]] = {
        "loss": variable("readout_recurrence prompt", "mean next-token loss on the prompt's own tokens", "nats"),
        "token_loss": variable(_READ, "loss of the following token; nothing at the prompt's last token", "nats"),
        "token_entropy": variable(_READ, "entropy of the prediction", "nats"),
        "token_kl_to_last": variable(
            _READ, "KL(p_last || p): the cost of answering here rather than after the last readout", "nats"
        ),
        "token_margin": variable(
            _READ,
            "logit of the most probable token minus that of the second most probable: what a change must overturn",
            "logits",
        ),
        "token_top1_probability": variable(_READ, "probability of the most probable token"),
        "token_top1": variable(_READ, "the most probable token id; -1 beyond the prompt's end", "token id"),
        "answer_rank": variable(
            f"answer {_READ}",
            "rank of a token of the answer (--answer) as the next token, 1 for the most probable; -1 beyond the "
            "prompt's end",
            otherwise=_NO_ANSWER,
        ),
        "answer_log_probability": variable(
            f"answer {_READ}",
            "log-probability of a token of the answer as the next token",
            "nats",
            otherwise=_NO_ANSWER,
        ),
        "token_kl_to_previous": variable(
            _EXIT,
            "KL(p_{t-1} || p_t) of the predictions after t - 1 and t recurrences; nothing at t = 1",
            "nats",
            otherwise=_NO_EXITS,
        ),
        "token_kl_to_full": variable(
            _EXIT,
            "KL(p_N || p_t): the cost of answering after t recurrences rather than after a full run",
            "nats",
            otherwise=_NO_EXITS,
        ),
        "exit_probability": variable(
            "recurrence prompt",
            "for a model with an exit gate: probability of stopping after each recurrence, mean over tokens; "
            "the last measured recurrence gets the remainder",
            otherwise=_NO_GATE,
        ),
        "token_exit_probability": variable(
            "recurrence prompt token", "exit_probability of each token", otherwise=_NO_GATE
        ),
        "token_exit_cumulated": variable(
            "recurrence prompt token",
            "probability of having stopped by then, summed and rounded as in the model before it compares it "
            "with its threshold (model.exit_threshold in the manifest)",
            otherwise=_NO_GATE,
        ),
    }

    def __init__(self, batch: BatchInfo) -> None:
        super().__init__(batch)
        self.exits = exits = batch.plan.exits
        self.grid = tuple(sorted({*batch.plan.readout, *range(1, exits + 1)}))
        self._lengths = batch.counts.tolist()
        self._states: dict[int, States] = {}
        self._gates: list[Tensor] = []
        shape = (batch.prompts, batch.tokens)
        self._tokens = batch.unknown(5, len(self.grid), *shape)
        self._answers = batch.plan.answers
        ranks = (len(self._answers), len(self.grid), *shape)
        self._ranks = torch.full(ranks, -1, dtype=torch.int64, device=batch.mask.device)
        self._log_probabilities = batch.unknown(*ranks)
        self._top1 = torch.full((len(self.grid), *shape), -1, dtype=torch.int64, device=batch.mask.device)
        self._losses = batch.unknown(len(self.grid), batch.prompts, dtype=torch.float64)
        self._to_previous, self._to_full = batch.unknown(2, exits, *shape)

    @classmethod
    def memory(cls, batch: BatchInfo) -> Memory:
        states, _ = batch.bytes
        logits = batch.mask.numel() * batch.info.vocab_size * batch.itemsize
        grid = len({*batch.plan.readout, *range(1, batch.plan.exits + 1)})
        most = tile_entries(batch.mask.device, _PIECE_ENTRIES, 8)
        piece = 8 * max(batch.info.vocab_size, min(most, batch.tokens * batch.info.vocab_size))
        return Memory(kept=grid * states, ended=min(4, grid) * logits + 6 * piece)

    def loop_state(self, loop_state: LoopState) -> None:
        if loop_state.recurrence in self.grid:
            self._states[loop_state.recurrence] = loop_state.state
        if loop_state.gate is not None:
            self._gates.append(loop_state.gate)

    def ended(self, end: RunEnd) -> None:
        last: _Decoded | None = None
        full: _Decoded | None = None
        after: _Decoded | None = None
        for count in reversed(self.grid):
            logits = end.decode(count, self._states.pop(count, None))
            empty = torch.full(self.batch.mask.shape, torch.nan, dtype=torch.float64, device=logits.device)
            now = _Decoded(logits, empty)
            last = last or now
            if count == self.exits:
                full, after = now, None
            self._keep(count, now, last, full, after)
            after = now

    def _pieces(self, logits: Logits) -> Iterator[tuple[int, slice]]:
        """All tokens, (row, some tokens) at a time."""
        size = max(1, tile_entries(logits.device, _PIECE_ENTRIES, 8) // logits.shape[-1])
        for row, length in enumerate(self._lengths):
            for start in range(0, length, size):
                yield row, slice(start, min(start + size, length))

    def _keep(self, count: int, now: _Decoded, last: _Decoded, full: _Decoded | None, after: _Decoded | None) -> None:
        """Reduce one readout token by token: loss of the next token, entropy, the top token with its margin and its
        probability, what it makes of the answer, and divergences from the last readout and, within a full run, from
        its last one, and of the one after from this."""
        mask = self.batch.mask
        targets = self.batch.batch.input_ids.roll(-1, dims=1)
        index = self.grid.index(count)
        values = torch.full((7, *mask.shape), torch.nan, dtype=torch.float64, device=mask.device)
        top1 = torch.full(mask.shape, -1, dtype=torch.int64, device=mask.device)
        for place in self._pieces(now.logits):
            made = TokenDistribution.of(now.logits[place])
            now.normalizer[place] = made.normalizer
            values[0][place] = made.normalizer - made.scores.gather(-1, targets[place][:, None])[:, 0]
            values[1][place] = made.entropy
            values[2][place] = last.at(place).divergence(made)
            if full is not None:
                values[5][place] = values[2][place] if full is last else full.at(place).divergence(made)
                if after is not None:
                    values[6][place] = made.divergence(after.at(place))
            top1[place], values[3][place], values[4][place] = made.top
            for answer, token in enumerate(self._answers):
                score = made.scores[:, token]
                self._log_probabilities[answer, index][place] = (score - made.normalizer).to(self.batch.stored)
                self._ranks[answer, index][place] = 1 + (made.scores > score[:, None]).sum(-1)
        followed = functional.pad(mask[:, 1:], (0, 1))
        values[0].masked_fill_(~followed, torch.nan)
        self._losses[index] = masked_mean(values[0], followed)
        self._tokens[:, index] = values[:5]
        self._top1[index] = top1
        if full is not None:
            self._to_full[count - 1] = values[5]
            if after is not None:
                self._to_previous[count] = values[6]

    def result(self) -> xr.Dataset:
        found = {"loss": self._losses, **dict(zip(TOKEN_READOUTS, (*self._tokens, self._top1), strict=True))}
        if self._answers:
            found |= {"answer_rank": self._ranks, "answer_log_probability": self._log_probabilities}
        if self.exits:
            found |= dict(zip(EXIT_READOUTS, (self._to_previous, self._to_full), strict=True))
        if self._gates:
            found |= self._exit_gate()
        return self.dataset(found)

    def _exit_gate(self) -> dict[str, Tensor]:
        """What the model's own gate says, mean over tokens and token by token."""
        mask = self.batch.mask
        distribution = exit_distribution(self._gates)
        cumulated = exit_cumulated(distribution).masked_fill(~mask[..., None], torch.nan).movedim(-1, 0)
        tokens = distribution.masked_fill(~mask[..., None], torch.nan).movedim(-1, 0)
        mean = masked_mean(distribution.movedim(-1, 0), mask)
        return {
            "exit_probability": mean.double(),
            "token_exit_probability": tokens.to(self.batch.stored),
            "token_exit_cumulated": widen(cumulated),
        }
