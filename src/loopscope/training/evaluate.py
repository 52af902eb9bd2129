"""Loss on held-out text per number of recurrences, and the entropies to hold it against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from loopscope.model import LoopedTransformer
from loopscope.training.data import Tokens

__all__ = ["bigram_entropy", "loss_by_recurrences", "unigram_entropy"]


@torch.no_grad()
def loss_by_recurrences(
    model: LoopedTransformer, windows: Tokens, recurrences: Sequence[int], *, batch_size: int, seed: int
) -> dict[int, float]:
    """Mean next-token loss in nats for each number of recurrences, from one run to the largest of them.

    `windows` is (n, context + 1). A model without a recurrent stage has one loss, listed under 1.
    """
    wanted = sorted(set(recurrences)) if model.architecture.is_looped else [1]
    totals = dict.fromkeys(wanted, 0.0)
    for start in range(0, len(windows), batch_size):
        tokens = torch.from_numpy(windows[start : start + batch_size].copy()).to(model.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        sequence = model.encode(inputs)
        state = model.initial_state(sequence, seed) if model.architecture.is_looped else sequence.encoded
        for number in range(1, wanted[-1] + 1):
            if model.architecture.is_looped:
                state = model.recur(state, sequence, number - 1)
            if number in totals:
                totals[number] += _summed_loss(model.decode(state, sequence), targets)
    count = len(windows) * (windows.shape[1] - 1)
    return {number: total / count for number, total in totals.items()}


def _summed_loss(logits: Tensor, targets: Tensor) -> float:
    return float(functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))


def unigram_entropy(windows: Tokens) -> float:
    """Entropy in nats of the predicted tokens' own frequencies, `-sum_b p(b) log p(b)`.

    It is the loss of the best model that knows no context, fitted to these very tokens.
    """
    return _entropy(np.unique(windows[:, 1:], return_counts=True)[1])


def bigram_entropy(windows: Tokens) -> float:
    """Conditional entropy in nats of a predicted token given the one before it, `H(a, b) - H(a)` of the empirical
    frequencies (Cover and Thomas, Elements of Information Theory, section 2.2).

    It is the loss of the best model that sees one token, fitted to these very tokens, and so lower than what a bigram
    model fitted to other text reaches.
    """
    first, second = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    pairs = np.unique(first * (int(windows.max()) + 1) + second, return_counts=True)[1]
    return _entropy(pairs) - _entropy(np.unique(first, return_counts=True)[1])


def _entropy(counts: NDArray[np.int64]) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())
