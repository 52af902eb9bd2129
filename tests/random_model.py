"""A small looped transformer in which no weight is neutral, of which tests change one setting at a time."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from loopscope import Architecture, LoopedTransformer

__all__ = ["random_architecture", "random_ids", "random_model"]

_BASE = Architecture(
    vocab_size=19,
    width=12,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=20,
    prelude=1,
    recurrent=2,
    coda=1,
    recurrences=3,
    injection="linear",
    state_init="normal",
    state_std=0.5,
)


def random_architecture(**changes: Any) -> Architecture:
    """(1, 2 x 3, 1) with injection, grouped heads, and heads that together are wider than the residual stream."""
    return dataclasses.replace(_BASE, **changes)


def random_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> LoopedTransformer:
    """Weights large enough that every part of the model leaves its mark on the output; no norm or bias is neutral."""
    model = LoopedTransformer(random_architecture(**changes)).initialize(seed, std=0.3)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids of the small vocabulary."""
    return torch.randint(0, _BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
