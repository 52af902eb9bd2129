"""Attention whose derivatives see one token at a time, the others' keys and values standing still."""

from __future__ import annotations

import torch
from torch import Tensor

from loopscope._shapes import Keys, Queries

__all__ = ["mix_with_others_frozen"]


def mix_with_others_frozen(query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
    """softmax(q k^T / sqrt(d)) v, with derivatives by each token's own state alone.

    Keys and values are cut off from their gradients, and a token's own are put back on the diagonal of the map:
    `scores = q k' + diag(q . (k - k'))`, `output = A v' + diag(A) (v - v')`, where the primes have no gradient. The
    differences are zero, so the value is that of ordinary attention. In a causal model no token before i depends on
    the state of i, and none after it is seen, so that a layer's derivative becomes the diagonal block of its Jacobian,
    and products of layers the diagonal blocks of products.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    still_key, still_value = key.detach(), value.detach()
    scores = query @ still_key.transpose(-1, -2) + torch.diag_embed((query * (key - still_key)).sum(-1))
    if allowed is None:
        tokens = query.shape[2]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    maps = (scores * query.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    own = maps.diagonal(dim1=-2, dim2=-1)[..., None]
    mixed: Tensor = maps @ still_value + own * (value - still_value)
    return mixed
