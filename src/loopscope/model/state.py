"""The random initial state of a loop, a function of (seed, prompt) and of nothing else."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

from loopscope._shapes import Noise, TokenIds, TokenMask

__all__ = ["initial_noise"]

_CUT = 3.0
"""Standard deviations at which the normal distribution is cut, as Huginn's published code does."""


def initial_noise(input_ids: TokenIds, mask: TokenMask | None, width: int, *, std: float, seed: int) -> Noise:
    """Normal noise, cut at three standard deviations, (batch, token, width), float32 on the CPU.

    Each prompt has a generator of its own, keyed by the seed and the prompt's token ids. So neither batching, padding,
    order nor sharding changes a prompt's state, on any device and in any dtype. Padding gets zeros.
    """
    batch, tokens = input_ids.shape
    noise = torch.zeros(batch, tokens, width)
    ids = input_ids.cpu()
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu()
    for row in range(batch):
        prompt = ids[row][keep[row]].numpy()
        noise[row, keep[row]] = torch.from_numpy(_prompt_noise(prompt, width, seed)).float() * std
    return noise


def _prompt_noise(prompt: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Standard normal values cut at `_CUT`, (token, width), float64, by inversion of the distribution function."""
    digest = hashlib.sha256(f"{seed}:".encode() + prompt.astype("<i8").tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    uniform = torch.from_numpy(generator.random((prompt.size, width)))
    lowest = 0.5 * math.erfc(_CUT / math.sqrt(2))
    values: np.ndarray = torch.special.ndtri(lowest + (1 - 2 * lowest) * uniform).numpy()
    return values
