"""Loss and accuracy on held-out text per number of recurrences, and the entropies to hold the loss against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from loopscope.experiments.training.data import Scored, Tokens
from loopscope.models.native.transformer import LoopedTransformer


@dataclass(frozen=True)
class Score:
    """Of all predicted tokens that count."""

    loss: float
    """Mean `-log p(token | window so far)`, nats."""
    accuracy: float
    """Share of tokens that are the likeliest one."""


@torch.no_grad()
def scores_by_recurrences(
    model: LoopedTransformer,
    windows: Tokens,
    recurrences: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    counted: Scored | None = None,
) -> dict[int, Score]:
    """Loss and accuracy for each number of recurrences, from one run to the largest of them.

    `windows` is (n, context + 1); `counted`, (n, context), says which predicted tokens count, all unless given. A model
    without a recurrent stage has one score, listed under 1.
    """
    wanted = sorted(set(recurrences)) if model.architecture.is_looped else [1]
    counted = np.ones(windows[:, 1:].shape, dtype=np.bool_) if counted is None else counted
    losses, hits = dict.fromkeys(wanted, 0.0), dict.fromkeys(wanted, 0)
    for start in range(0, len(windows), batch_size):
        tokens = torch.from_numpy(windows[start : start + batch_size].copy()).to(model.device)
        counts = torch.from_numpy(counted[start : start + batch_size].copy()).to(model.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:][counts]
        sequence = model.encode(inputs)
        state = model.initial_state(sequence, seed) if model.architecture.is_looped else sequence.encoded
        for number in range(1, wanted[-1] + 1):
            if model.architecture.is_looped:
                state = model.recur(state, sequence, number)
            if number in losses:
                logits = model.decode(state, sequence)[counts].float()
                losses[number] += float(functional.cross_entropy(logits, targets, reduction="sum"))
                hits[number] += int((logits.argmax(-1) == targets).sum())
    count = int(counted.sum())
    return {number: Score(losses[number] / count, hits[number] / count) for number in wanted}


def unigram_entropy(windows: Tokens, counted: Scored | None = None) -> float:
    """Entropy in nats of the predicted tokens' own frequencies, `-sum_b p(b) log p(b)`.

    It is the loss of the best model that knows no context, fitted to these very tokens.
    """
    return _entropy(np.unique(_pairs(windows, counted)[1], return_counts=True)[1])


def bigram_entropy(windows: Tokens, counted: Scored | None = None) -> float:
    """Conditional entropy in nats of a predicted token given the one before it, `H(a, b) - H(a)` of the empirical
    frequencies (Cover and Thomas, Elements of Information Theory, section 2.2).

    It is the loss of the best model that sees one token, fitted to these very tokens, and so lower than what a bigram
    model fitted to other text reaches.
    """
    first, second = _pairs(windows, counted)
    pairs = np.unique(first * (int(windows.max()) + 1) + second, return_counts=True)[1]
    return _entropy(pairs) - _entropy(np.unique(first, return_counts=True)[1])


def _pairs(windows: Tokens, counted: Scored | None) -> tuple[Tokens, Tokens]:
    """Predicted tokens that count, and the ones before them."""
    first, second = windows[:, :-1], windows[:, 1:]
    return (first.ravel(), second.ravel()) if counted is None else (first[counted], second[counted])


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
