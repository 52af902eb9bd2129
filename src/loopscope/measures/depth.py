"""Realised depth: every visit of a run in order, prelude, recurrences, coda."""

from __future__ import annotations

from loopscope.architecture import Stage
from loopscope.measures.base import Frame
from loopscope.subject import SubjectInfo

__all__ = ["depth_count", "depth_of", "depth_sites"]


def depth_count(frame: Frame) -> int:
    """Visits of a run, p + k R + c."""
    return depth_of(frame, "coda", frame.info.coda, 0)


def depth_of(frame: Frame, stage: Stage, layer: int, recurrence: int) -> int:
    """Place of a visit among the p + k R + c of a run, from 0."""
    info = frame.info
    if stage == "prelude":
        return layer
    if stage == "recurrent":
        return info.prelude + recurrence * info.recurrent + layer
    return info.prelude + frame.recurrences * info.recurrent + layer


def depth_sites(info: SubjectInfo, recurrences: int) -> list[tuple[Stage, int, int]]:
    """(stage, layer, recurrence) of every visit, in order; the recurrence is 0 in prelude and coda."""
    return [
        *(("prelude", layer, 0) for layer in range(info.prelude)),
        *(("recurrent", layer, recurrence) for recurrence in range(recurrences) for layer in range(info.recurrent)),
        *(("coda", layer, 0) for layer in range(info.coda)),
    ]
