"""Log-likelihoods of continuations after several numbers of recurrences, from one pass, and how the state settles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loopscope._util.shapes import Logits, States
from loopscope.errors import ConfigError, ran_out
from loopscope.measures.functions import relative_distance
from loopscope.models.checkpoints.free_memory import available_memory
from loopscope.models.hooks.hooked import HookedSubject
from loopscope.models.subject import Batch, Run, Subject, SubjectInfo, recurrences_of

Request = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of its continuation, neither of them empty."""

_MOST_ROWS = 64
_SHARE = 0.5
"""Of the memory that is free; the rest is for what the estimate of a batch leaves out."""
_WIDTHS = 64
"""States of one token that a layer holds at once: queries, keys, values, and an MLP of up to 8 widths several times."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one continuation after one number of recurrences."""

    logprob: float
    """Natural logarithm of the probability of all its tokens in a row."""
    greedy: bool
    """Each of its tokens is the likeliest one where the tokens before it are given."""
    step: float
    """`|s_R - s_(R-1)| / |s_R|`, mean over the positions that predict the continuation; NaN without a loop, and where
    the state before the first recurrence cannot be seen."""


def numbers_of(info: SubjectInfo, asked: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of recurrences, sorted; the trained one unless any are asked for, and 1 of a feed-forward model.

    Raises `ConfigError` for none, for one below 1, and for any but 1 where there is no loop.
    """
    if asked is not None and not asked:
        raise ConfigError("No number of recurrences was given; name at least one, such as 1.")
    found = {recurrences_of(info, number) for number in ([None] if asked is None else asked)}
    return tuple(sorted(found)) if info.is_looped else (1,)


def passes_of(subject: Subject, numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """Which numbers of recurrences are read in one pass: all of them, unless the loop depends on how often it will run,
    so that each is a pass of its own."""
    foresees = isinstance(subject, HookedSubject) and subject.facts.foresees
    return [(number,) for number in numbers] if foresees else [tuple(numbers)]


def likelihoods(
    subject: Subject,
    requests: Sequence[Request],
    numbers: Sequence[int],
    *,
    seed: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> dict[int, list[Likelihood]]:
    """Of each request, in its order, after each number of recurrences.

    Each request runs once to the largest number, and is decoded after every one (of a model with an exit gate: answered
    as the model would with that many). `seed` is that of random initial states; `done` is told how many requests a
    batch had. Raises `ConfigError` for more tokens than the model has positions.
    """
    longest = max((len(context) + len(continuation) - 1 for context, continuation in requests), default=0)
    if subject.info.max_positions is not None and longest > subject.info.max_positions:
        raise ConfigError(f"A request has {longest} tokens; {subject.info.name} has {subject.info.max_positions}.")
    found: dict[int, list[Likelihood | None]] = {number: [None] * len(requests) for number in numbers}
    lengths = [len(context) + len(continuation) for context, continuation in requests]
    for rows in batches(lengths, subject.info, subject.device):
        batch = [requests[row] for row in rows]
        for some in passes_of(subject, numbers):
            read = functools.partial(_of_batch, subject, numbers=some, seed=seed)
            for number, answered in halved(read, batch).items():
                for row, answer in zip(rows, answered, strict=True):
                    found[number][row] = answer
        done(len(batch))
    return {number: [each for each in answers if each is not None] for number, answers in found.items()}


def batches(lengths: Sequence[int], info: SubjectInfo, device: torch.device) -> Iterator[list[int]]:
    """Which rows go together, longest first, as many as there is memory for."""
    left = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while left:
        rows = rows_at_once(info, lengths[left[0]], available_memory(device))
        yield left[:rows]
        left = left[rows:]


def rows_at_once(info: SubjectInfo, tokens: int, memory: int) -> int:
    """Texts of that many tokens that run together in that many free bytes, from 1 to 64: logits twice, the states that
    a layer holds, and two maps of attention per head. A count made beforehand, not a measurement."""
    size = torch.finfo(getattr(torch, info.dtype.removeprefix("torch."))).bits // 8
    maps = 2 * (info.heads or 1) * tokens
    row = tokens * size * (2 * info.vocab_size + _WIDTHS * info.width + maps)
    return max(1, min(_MOST_ROWS, int(_SHARE * memory / row)))


def halved(
    run: Callable[[Sequence[Request]], dict[int, list[Likelihood]]], batch: Sequence[Request]
) -> dict[int, list[Likelihood]]:
    """What `run` finds of a batch, in two halves where a device's memory runs out."""
    try:
        return run(batch)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if len(batch) == 1 or not ran_out(error):
            raise
    middle = len(batch) // 2
    first, second = halved(run, batch[:middle]), halved(run, batch[middle:])
    return {number: first[number] + second[number] for number in first}


def _of_batch(
    subject: Subject, batch: Sequence[Request], numbers: Sequence[int], seed: int
) -> dict[int, list[Likelihood]]:
    prompts = [(*context, *continuation)[:-1] for context, continuation in batch]
    return {
        number: [
            _likelihood(logits[row], steps[row], context, continuation)
            for row, (context, continuation) in enumerate(batch)
        ]
        for number, logits, steps in answers(subject, prompts, numbers, seed)
    }


def answers(
    subject: Subject, prompts: Sequence[Sequence[int]], numbers: Sequence[int], seed: int
) -> Iterator[tuple[int, Logits, Tensor]]:
    """One pass: each number of recurrences with the logits there, (prompt, token, vocabulary), and the relative length
    of the last step, (prompt, token)."""
    looped = subject.info.is_looped
    most = max(numbers) if looped else 0
    run: Run = subject.start(Batch.of(prompts).to(subject.device), recurrences=most, seed=seed)
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


def _likelihood(logits: Tensor, steps: Tensor, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
    """From one prompt's logits, (token, vocabulary), and steps, (token,), padding included."""
    places = slice(len(context) - 1, len(context) - 1 + len(continuation))
    given = logits[places]
    scores = functional.log_softmax(given.to(torch.promote_types(given.dtype, torch.float32)), dim=-1)
    targets = torch.tensor(continuation, device=scores.device)
    return Likelihood(
        float(scores.gather(-1, targets[:, None]).sum()),
        bool((scores.argmax(-1) == targets).all()),
        float(np.mean(steps[places].cpu().numpy())),
    )
