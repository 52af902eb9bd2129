"""What a model answers to texts after several numbers of recurrences, from one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loopscope._util.shapes import Logits, States
from loopscope.measures.functions import relative_distance
from loopscope.models.checkpoints.free_memory import available_memory
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Batch, Run, Subject, SubjectInfo

_MOST_ROWS = 64
_SHARE = 0.5
"""Of the memory that is free; the rest is for what the estimate of a batch leaves out."""
_WIDTHS = 64
"""States of one token that a layer holds at once: queries, keys, values, and an MLP of up to 8 widths several times."""


def passes_of(subject: Subject, numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Which numbers of recurrences are read in one pass: all of them, unless the loop depends on how often it will run,
    so that each is a pass of its own."""
    foresees = isinstance(subject, HookedSubject) and subject.facts.foresees
    return [(number,) for number in numbers] if foresees else [tuple(numbers)]


def batches(lengths: Sequence[int], info: SubjectInfo, device: torch.device, kept: int = 0) -> Iterator[list[int]]:
    """Which rows go together, longest first, as many as there is memory for; each keeps so many bytes besides."""
    left = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while left:
        rows = rows_at_once(info, lengths[left[0]], available_memory(device), kept)
        yield left[:rows]
        left = left[rows:]


def rows_at_once(info: SubjectInfo, tokens: int, memory: int, kept: int = 0) -> int:
    """Texts of that many tokens that run together in that many free bytes, from 1 to 64: logits twice, the states that
    a layer holds, and two maps of attention per head. A count made beforehand, not a measurement."""
    size = torch.finfo(getattr(torch, info.dtype.removeprefix("torch."))).bits // 8
    maps = 2 * (info.heads or 1) * tokens
    row = tokens * size * (2 * info.vocab_size + _WIDTHS * info.width + maps) + kept
    return max(1, min(_MOST_ROWS, int(_SHARE * memory / row)))


def answers(
    subject: Subject, prompts: Sequence[Sequence[int]], numbers: Sequence[int], seed: int, *, begun: int | None = None
) -> Iterator[tuple[int, Logits, Tensor]]:
    """One pass: each number of recurrences with the logits there, (prompt, token, vocabulary), and the relative length
    of the last step, (prompt, token). Of a text that begins with a prompt of `begun` tokens and was written on from
    there, a random initial state is drawn on too."""
    looped = subject.info.is_looped
    most = max(numbers) if looped else 0
    batch = Batch.of(prompts).to(subject.device)
    run: Run
    if isinstance(subject, NativeSubject):
        run = subject.start(batch, recurrences=most, seed=seed, begun=begun)
    else:
        run = subject.start(batch, recurrences=most, seed=seed)
    try:
        for number in itertools.count(1):
            before = run.state
            if looped:
                run.advance()
            if number in numbers:
                logits = run.answer()
                yield number, logits, _step(before, run.state if looped else None, logits)
            if number >= most:
                return
    finally:
        run.close()


def _step(before: States | None, after: States | None, logits: Logits) -> Tensor:
    if before is None or after is None:
        return torch.full(logits.shape[:2], math.nan)
    return relative_distance(before, after)
