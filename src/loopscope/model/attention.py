"""Causal self-attention with grouped heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from loopscope._shapes import Keys, Queries, States, TokenMask
from loopscope.architecture import Architecture
from loopscope.model.norm import RMSNorm
from loopscope.model.rotary import RotationTable, rotate
from loopscope.visits import QueryKeyAttention

__all__ = ["Attention", "AttentionContext", "Mix", "mix_values"]

Mix = Callable[[Queries, Keys, Keys, Tensor | None], Queries]
"""`mix(query, key, value, allowed)`: each query's mean of the values, (batch, head, token, head_dim). With None for
`allowed`, causality alone decides where a query may look; otherwise it is True there."""


def mix_values(query: Queries, key: Keys, value: Keys, allowed: Tensor | None) -> Queries:
    """softmax(q k^T / sqrt(d)) v, by whichever of torch's kernels is fastest."""
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, enable_gqa=query.shape[1] != key.shape[1]
    )


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What every layer of one run shares."""

    rotation: RotationTable | None
    mask: TokenMask | None
    """True for tokens; None where no row is padded."""
    allowed: Tensor | None
    """(batch, 1, query, key), True where a query may look; None where causality alone decides."""
    near: Tensor | None
    """The same for layers with a sliding window, (batch or 1, 1, query, key)."""
    mix: Mix = mix_values
    """How values are mixed; another function of the same value has other derivatives."""


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v per head, with optional q/k norm (before the bias) and q/k bias (before the
    rotation).
    """

    def __init__(self, architecture: Architecture, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.head_dim = architecture.head_dim
        self.rotary = architecture.rotary
        self.norm_per_head = architecture.qk_norm == "head"
        query_width = architecture.heads * architecture.head_dim
        key_width = architecture.kv_heads * architecture.head_dim
        self.query = nn.Linear(architecture.width, query_width, bias=False)
        self.key = nn.Linear(architecture.width, key_width, bias=False)
        self.value = nn.Linear(architecture.width, key_width, bias=False)
        self.output = nn.Linear(query_width, architecture.width, bias=False)
        self.query_norm: RMSNorm | None = None
        self.key_norm: RMSNorm | None = None
        if architecture.qk_norm != "none":
            widths = (self.head_dim, self.head_dim) if self.norm_per_head else (query_width, key_width)
            self.query_norm = RMSNorm(widths[0], architecture.norm_eps)
            self.key_norm = RMSNorm(widths[1], architecture.norm_eps)
        self.query_bias: nn.Parameter | None = None
        self.key_bias: nn.Parameter | None = None
        if architecture.qk_bias:
            self.query_bias = nn.Parameter(torch.zeros(query_width))
            self.key_bias = nn.Parameter(torch.zeros(key_width))

    def forward(self, x: States, context: AttentionContext) -> tuple[States, QueryKeyAttention]:
        query = self._heads(self.query(x), self.query_norm, self.query_bias, context)
        key = self._heads(self.key(x), self.key_norm, self.key_bias, context)
        value = self._split(self.value(x))
        allowed = context.allowed if self.window is None else context.near
        mixed = context.mix(query, key, value, allowed)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output, QueryKeyAttention(query, key, self.head_dim**-0.5, context.mask, self.window)

    def _heads(self, x: Tensor, norm: RMSNorm | None, bias: Tensor | None, context: AttentionContext) -> Tensor:
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2) if self.norm_per_head else norm(x)
        if bias is not None:
            x = x + bias
        split = self._split(x)
        return split if context.rotation is None else rotate(split, context.rotation, self.rotary)

    def _split(self, x: Tensor) -> Tensor:
        """From (batch, token, head * head_dim) to (batch, head, token, head_dim)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)
