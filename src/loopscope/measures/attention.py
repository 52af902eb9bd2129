"""Attention measures as pure functions of post-softmax maps, (..., query, key): causal, rows summing to 1.

They take tensors or numpy arrays and answer in kind. Logarithms are natural. Formulas: method, section 3, after
arXiv 2604.11791, section 4.1 and appendix E.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from loopscope._util.sinks import SINK_THRESHOLD
from loopscope.measures.base import on_arrays
from loopscope.measures.functions import widen

Maps = Float[Tensor, "*shape query key"]
HeadMaps = Float[Tensor, "*shape head query key"]
Columns = Float[Tensor, "*shape key"]
Values = Float[Tensor, "*shape"]


@on_arrays
def sink_scores(attention: Maps) -> Columns:
    """`c_j = (1/T) sum_i A_ij`: the share of all attention that each key receives."""
    return widen(attention).mean(-2)


@on_arrays
def sink_score(attention: Maps, position: int = 0) -> Values:
    """`(1/T) sum_i A_ij` of one key j, the first unless told otherwise."""
    return widen(attention[..., position]).mean(-1)


@on_arrays
def strongest_sink(attention: Maps) -> Values:
    """The largest sink score of any key; some models sink on punctuation rather than on the first token."""
    return sink_scores(attention).amax(-1)


@on_arrays
def strongest_sink_position(attention: Maps) -> Int64[Tensor, "*shape"]:
    """The key with the largest sink score, from 0; the first of equals."""
    return sink_scores(attention).argmax(-1)


@on_arrays
def sink_rate(attention: HeadMaps, threshold: float = SINK_THRESHOLD, position: int = 0) -> Values:
    """Share of heads (the dimension before query and key) whose sink score at a position is at least the threshold.

    At T <= 9 even uniform causal attention counts as a sink at position 0.
    """
    return (sink_score(attention, position) >= threshold).to(widen(attention).dtype).mean(-1)


@on_arrays
def colsum_concentration(attention: Maps) -> Values:
    """`1 + (1/log T) sum_j c_j log c_j` with c the sink scores, in [0, 1]; NaN for T = 1.

    1 where all attention goes to one key, 0 where each key receives as much as any other. Causal attention has a floor
    above 0 that falls slowly with T: 0.15 for uniform attention at T = 8, 0.08 at T = 256.
    """
    return concentration(sink_scores(attention), torch.tensor(attention.shape[-1], device=attention.device))


def concentration(scores: Columns, tokens: Tensor) -> Values:
    """`colsum_concentration` from the sink scores; `tokens` is T, and broadcasts."""
    negative = torch.special.entr(scores).sum(-1)
    return torch.where(tokens > 1, 1 - negative / tokens.to(negative.dtype).log(), torch.nan)


@on_arrays
def row_entropy(attention: Maps) -> Float[Tensor, "*shape query"]:
    """`H(A_i) = -sum_j A_ij log A_ij`, nats."""
    return entropy_of_rows(widen(attention))


def entropy_of_rows(maps: Maps) -> Float[Tensor, "*shape query"]:
    """`row_entropy` of tensors that are wide enough.

    An entry below the smallest normal number counts as 0 does. This logarithm is vectorised, which makes it twice as
    fast as `torch.special.entr`.
    """
    smallest = torch.finfo(maps.dtype).tiny
    return 0.0 - (maps.clamp(min=smallest).log() * maps).sum(-1)


@on_arrays
def mixing_score(attention: Maps) -> Values:
    """Mean entropy of the rows, `(1/T) sum_i H(A_i)`, nats: 0 where every query looks at one key."""
    return row_entropy(attention).mean(-1)


@on_arrays
def relative_mixing_score(attention: Maps) -> Values:
    """Mean of `H(A_i) / log(i + 1)` over the rows i > 0, in [0, 1]: 1 for uniform causal attention, NaN for T = 1.

    Row i of a causal map has i + 1 keys to look at, so this is the entropy over the largest there can be.
    """
    entropy = row_entropy(attention)[..., 1:]
    return (entropy / most_entropy(attention.shape[-2], entropy)[1:]).mean(-1)


def most_entropy(tokens: int, like: Tensor) -> Float[Tensor, " query"]:
    """`log(i + 1)` for the rows of a causal map."""
    seen = torch.arange(1, tokens + 1, dtype=like.dtype, device=like.device)
    return seen.log()


@on_arrays
def attention_distance(attention: Maps, reference: Maps) -> Values:
    """Frobenius distance `||A - B||` of two maps."""
    away: Tensor = torch.linalg.matrix_norm(widen(attention) - widen(reference))
    return away


@on_arrays
def stable_from(change: Float[Tensor, "*shape recurrence"], threshold: float) -> Values:
    """The number of recurrences after which every change stays at or below the threshold; NaN where there is none.

    `change[..., t - 1]` is the change from recurrence t - 1 to t, with nothing (NaN) for t = 1. The last recurrence is
    no answer: after it nothing was measured.
    """
    above = ~(change[..., 1:] <= threshold)
    steps = torch.arange(2, change.shape[-1] + 1, device=change.device)
    last = torch.where(above, steps, 1).amax(-1) if change.shape[-1] > 1 else torch.ones(change.shape[:-1])
    return torch.where(last < change.shape[-1], last.to(change.dtype), torch.nan)
