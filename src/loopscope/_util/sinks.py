"""When chance alone makes an attention sink. This module imports neither torch nor numpy."""

from __future__ import annotations

import math

SINK_THRESHOLD = 0.3
"""A head has a sink where a key receives this share of all attention (the value of arXiv 2604.11791)."""


def uniform_causal_sink(tokens: int) -> float:
    """Sink score of the first key under uniform causal attention, `(1/T) sum_i 1/(i+1)`: what chance gives."""
    return math.fsum(1 / row for row in range(1, tokens + 1)) / tokens


def sink_by_chance(tokens: int, threshold: float = SINK_THRESHOLD) -> bool:
    """Whether even uniform causal attention over that many tokens counts as a sink: up to 9 tokens at 0.3."""
    return uniform_causal_sink(tokens) >= threshold
