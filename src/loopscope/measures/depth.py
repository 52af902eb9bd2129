"""Realised depth: every visit of a run in order, prelude, recurrences, coda."""

from __future__ import annotations

from loopscope.architecture import Stage
from loopscope.measures.base import Frame

__all__ = ["depth_of"]


def depth_of(frame: Frame, stage: Stage, layer: int, recurrence: int) -> int:
    """Place of a visit among the p + k R + c of a run, from 0."""
    info = frame.info
    if stage == "prelude":
        return layer
    if stage == "recurrent":
        return info.prelude + recurrence * info.recurrent + layer
    return info.prelude + frame.recurrences * info.recurrent + layer
