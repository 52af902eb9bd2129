"""Causal self-attention with grouped heads, the rotation of its positions, and the norm that every layer uses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional

from loopscope._util.shapes import Keys, Queries, Rotation, SeenKeys, States, TokenIds, TokenMask
from loopscope.models.architecture import (
    VALUE_GATE_INPUTS,
    Architecture,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    Rotary,
    YarnScaling,
)
from loopscope.models.visits import QueryKeyAttention

Mix = Callable[[Queries, Keys, Keys, Tensor | None], Queries]
"""`mix(query, key, value, allowed)`: each query's mean of the values, (batch, head, token, head_dim). With None for
`allowed`, causality alone decides where a query may look; otherwise it is True there."""

LayerOutput = Literal["residual", "attention", "mlp", "head"]
"""What a layer puts out, what its attention or its MLP adds to the residual stream, all (batch, token, width), and what
each head of its attention has mixed before the output projection, (batch, head, token, head_dim)."""
Through = Callable[[LayerOutput, Tensor], Tensor]
"""`through(part, values)`: what takes the place of a part of a layer while it runs; the values themselves, where it
only looks on."""


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, arXiv 1910.07467).

    Half-precision inputs are normalised in float32 and rounded before the weight is applied, as the published code of
    the families does; OLMo-2's applies the weight first, which differs in the last bit.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            return functional.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class RotationTable:
    """Cosines and sines of the angles of each position and pair, (batch or 1, 1, token, head_dim / 2)."""

    cos: Rotation
    sin: Rotation

    def on(self, device: torch.device) -> RotationTable:
        return RotationTable(self.cos.to(device), self.sin.to(device))


def rotation_table(
    architecture: Architecture, positions: Int64[Tensor, "#batch token"], dtype: torch.dtype
) -> RotationTable | None:
    """Angles `position * base^(-2 i / d)` for pair i of a head of width d (Su et al., arXiv 2104.09864).

    Frequencies are rounded to float32 as the published code of every family does; the angles are float32, or float64
    for a float64 model.
    """
    if architecture.rotary == "none":
        return None
    exponent = torch.arange(0, architecture.head_dim, 2, dtype=torch.int64, device=positions.device).float()
    frequency = 1.0 / architecture.rope_base ** (exponent / architecture.head_dim)
    frequency, gain = _scaled(frequency, architecture.rope_base, architecture.rope_scaling)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    angle = (positions.to(precision)[..., None] * frequency.to(precision))[:, None]
    return RotationTable(angle.cos() * gain, angle.sin() * gain)


def rotate(x: Keys, table: RotationTable, layout: Rotary) -> Keys:
    """Turn each pair of `x` (batch, head, token, head_dim) by its angle, in the precision of the table."""
    turned = x.to(table.cos.dtype)
    if layout == "adjacent":
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    real = first * table.cos - second * table.sin
    imaginary = second * table.cos + first * table.sin
    if layout == "adjacent":
        return torch.stack((real, imaginary), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((real, imaginary), dim=-1).to(x.dtype)


def _scaled(frequency: Tensor, base: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Frequencies stretched for longer contexts, and the factor on cosines and sines that goes with them."""
    match scaling:
        case None:
            return frequency, 1.0
        case LinearScaling():
            return frequency / scaling.factor, 1.0
        case Llama3Scaling():
            return _llama3(frequency, scaling), 1.0
        case YarnScaling():
            return _yarn(frequency, base, scaling), scaling.attention_factor


def _llama3(frequency: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, interpolate between (Llama 3.1 model card and code)."""
    turns = scaling.original_max_positions * frequency / (2 * math.pi)  # turns over the original context
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return frequency * (share + (1 - share) / scaling.factor)


def _yarn(frequency: Tensor, base: float, scaling: YarnScaling) -> Tensor:
    """Interpolate between pairs that turn `beta_fast` and `beta_slow` times over the original context.

    Linear in the index of the pair, not in its turns (YaRN, section 3.2 and published code).
    """
    pairs = frequency.shape[0]

    def pair_of(turns: float) -> float:
        return pairs * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / math.log(base)

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    index = torch.arange(pairs, dtype=torch.float32, device=frequency.device)
    # A range of no width would divide by zero; the published code widens it by this much.
    stretched = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequency * (1 - stretched + stretched / scaling.factor)


def mix_values(query: Queries, key: SeenKeys, value: SeenKeys, allowed: Tensor | None) -> Queries:
    """softmax(q k^T / sqrt(d)) v, by whichever of torch's kernels is fastest."""
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, is_causal=allowed is None, enable_gqa=query.shape[1] != key.shape[1]
    )


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What every layer of one run shares."""

    input_ids: TokenIds
    rotation: RotationTable | None
    mask: TokenMask | None
    """True for tokens; None where no row is padded."""
    allowed: Tensor | None
    """(batch, 1, query, key), True where a query may look; None where causality alone decides."""
    near: Tensor | None
    """The same for layers with a sliding window, (batch or 1, 1, query, key)."""
    mix: Mix = mix_values
    """How values are mixed; another function of the same value has other derivatives."""
    _copies: dict[torch.device, AttentionContext] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> AttentionContext:
        """The same for layers on another device, made once for each."""
        if self.input_ids.device == device:
            return self
        if device not in self._copies:
            mask, allowed, near = (
                None if each is None else each.to(device) for each in (self.mask, self.allowed, self.near)
            )
            rotation = None if self.rotation is None else self.rotation.on(device)
            self._copies[device] = replace(
                self, input_ids=self.input_ids.to(device), rotation=rotation, mask=mask, allowed=allowed, near=near
            )
        return self._copies[device]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v per head, with optional q/k norm (before the bias) and q/k bias (before the
    rotation), or a q/k norm without weights (after it), and an embedding of the tokens in the values.
    """

    def __init__(self, architecture: Architecture, place: int) -> None:
        super().__init__()
        self.window = architecture.window(place)
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
        self.norms_rotated = architecture.qk_norm == "unweighted"
        if architecture.qk_norm in ("head", "full"):
            widths = (self.head_dim, self.head_dim) if self.norm_per_head else (query_width, key_width)
            self.query_norm = RMSNorm(widths[0], architecture.norm_eps)
            self.key_norm = RMSNorm(widths[1], architecture.norm_eps)
        self.query_bias: nn.Parameter | None = None
        self.key_bias: nn.Parameter | None = None
        if architecture.qk_bias:
            self.query_bias = nn.Parameter(torch.zeros(query_width))
            self.key_bias = nn.Parameter(torch.zeros(key_width))
        self.value_embedding: nn.Embedding | None = None
        self.value_gate: nn.Linear | None = None
        if place in architecture.value_embeddings:
            # As for the token embeddings, not drawn by nn.Embedding.
            table = torch.empty(architecture.vocab_size, key_width).uniform_(-1, 1)
            self.value_embedding = nn.Embedding.from_pretrained(table, freeze=False)
            self.value_gate = nn.Linear(VALUE_GATE_INPUTS, architecture.kv_heads, bias=False)

    def forward(
        self, x: States, context: AttentionContext, through: Through | None = None
    ) -> tuple[States, QueryKeyAttention]:
        query = self._heads(self.query(x), self.query_norm, self.query_bias, context)
        key = self._heads(self.key(x), self.key_norm, self.key_bias, context)
        value = self._split(self.value(x))
        if self.value_embedding is not None and self.value_gate is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_INPUTS]))
            value = value + gate.transpose(1, 2)[..., None] * self._split(self.value_embedding(context.input_ids))
        allowed = context.allowed if self.window is None else context.near
        mixed = context.mix(query, key, value, allowed)
        if through is not None:
            mixed = through("head", mixed)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output, QueryKeyAttention(query, key, self.head_dim**-0.5, context.mask, self.window, value=value)

    def _heads(self, x: Tensor, norm: RMSNorm | None, bias: Tensor | None, context: AttentionContext) -> Tensor:
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2) if self.norm_per_head else norm(x)
        if bias is not None:
            x = x + bias
        split = self._split(x)
        turned = split if context.rotation is None else rotate(split, context.rotation, self.rotary)
        return functional.rms_norm(turned, turned.shape[-1:]) if self.norms_rotated else turned

    def _split(self, x: Tensor) -> Tensor:
        """From (batch, token, head * head_dim) to (batch, head, token, head_dim)."""
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)
