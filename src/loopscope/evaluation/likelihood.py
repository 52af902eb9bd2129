"""Log-likelihoods of continuations after several numbers of recurrences, from one pass, and how the state settles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from loopscope.analysis.answering import answers, batches, passes_of
from loopscope.errors import ConfigError, ran_out
from loopscope.models.subject import Subject, SubjectInfo, recurrences_of

Request = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of its continuation, neither of them empty."""


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
