"""Rotary position embedding: pairs of coordinates of a query or key turn by an angle that grows with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from loopscope._shapes import Keys, Rotation
from loopscope.architecture import (
    Architecture,
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    Rotary,
    YarnScaling,
)

__all__ = ["RotationTable", "rotate", "rotation_table"]


@dataclass(frozen=True, slots=True)
class RotationTable:
    """Cosines and sines of the angles of each position and pair, (batch or 1, 1, token, head_dim / 2)."""

    cos: Rotation
    sin: Rotation


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
