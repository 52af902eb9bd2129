"""Measures on their own: what an analysis tells them of a batch, and a run that they watch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loopscope import AnalyzeSettings, Subject
from loopscope.analysis.plan import choose
from loopscope.measures.base import BatchInfo, Measure
from loopscope.models.subject import Batch, Run


def batch_info(subject: Subject, batch: Batch, **settings: Any) -> BatchInfo:
    plan = choose(subject, batch.counts.tolist(), AnalyzeSettings(**settings), lambda note: None)
    return BatchInfo.of(subject, batch, plan)


def watched(measures: Sequence[Measure], info: BatchInfo, initial_state: torch.Tensor | None = None) -> Run:
    """A run through the measured recurrences, and decoded."""
    run = info.subject.start(info.batch, recurrences=info.recurrences, initial_state=initial_state, observers=measures)
    for _ in range(info.recurrences):
        run.advance(measures)
    run.decode(measures)
    return run
