"""Greedy generation: the likeliest next token again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from loopscope.analysis.answering import answers, batches, passes_of
from loopscope.errors import ConfigError, NonFiniteError
from loopscope.models.native.cached import CachedRun, CacheKind, Exits, cache_bytes
from loopscope.models.native.subject import NativeSubject
from loopscope.models.subject import Subject, SubjectInfo

Over = Callable[[list[int]], bool]
"""Whether a text is over with the last of these generated tokens."""


@dataclass
class Grown:
    """What was generated behind one prompt."""

    tokens: list[int] = field(default_factory=list)
    recurrences: list[int] = field(default_factory=list)
    """Of each of them, how many the token before it took, whose answer it is: the prompt's last one is run in full."""


def grow(
    subject: NativeSubject,
    prompts: Sequence[Sequence[int]],
    *,
    recurrences: int,
    most: int,
    is_over: Over,
    seed: int = 0,
    kind: CacheKind = "per-recurrence",
    exits: Exits | None = None,
    own_gate: bool = True,
) -> list[Grown]:
    """Texts that grow together, with a cache of keys and values. `recurrences` is 0 of a feed-forward model.

    Raises `ConfigError` for an intervention on a token, and `NonFiniteError` for answers that are NaN.
    """
    run = CachedRun(subject, prompts, recurrences=recurrences, most=most, seed=seed, kind=kind, own_gate=own_gate)
    texts = [Grown() for _ in prompts]
    going, logits, used = list(range(len(prompts))), run.logits, [recurrences] * len(prompts)
    for count in range(1, most + 1):
        if bool(torch.isnan(logits).any()):
            raise NonFiniteError(
                f"What {subject.info.name} answers after {recurrences} recurrences is NaN; run fewer, or in another "
                "dtype."
            )
        for row, token, taken in zip(going, logits.argmax(-1).tolist(), used, strict=True):
            texts[row].tokens.append(token)
            texts[row].recurrences.append(taken)
        going = [row for row in going if not is_over(texts[row].tokens)]
        if not going or count == most:
            break
        logits, used = run.feed(going, [texts[row].tokens[-1] for row in going], exits)
    return texts


def generate_greedily(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    most: int,
    is_over: Over,
    seed: int = 0,
) -> dict[int, list[list[int]]]:
    """The likeliest next token again and again, of each prompt and after each number of recurrences.

    A text ends with the token after which `is_over` says so, or after `most` tokens. A model that loopscope computes
    itself keeps keys and values for every recurrence, which is exact, and a state that is drawn at random is drawn on
    behind the prompt; each number of recurrences is a run of its own. Of a model that is only watched every token is a
    pass over the whole text; texts that do not differ between numbers of recurrences share their passes, and the seed
    is the same for each. Raises `ConfigError` where prompt and text need more positions than there are, and as `grow`.
    """
    check_room(subject.info, max(map(len, prompts), default=0), most)
    if isinstance(subject, NativeSubject):
        return {number: _grown(subject, prompts, number, most, is_over, seed) for number in numbers}
    texts: dict[int, list[list[int]]] = {number: [[] for _ in prompts] for number in numbers}
    going = {(number, place) for number in numbers for place in range(len(prompts))}
    for _ in range(most):
        wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for number, place in sorted(going):
            wanted.setdefault((*prompts[place], *texts[number][place]), []).append((number, place))
        following = _next_tokens(
            subject, {text: tuple(number for number, _ in users) for text, users in wanted.items()}, seed
        )
        for text, users in wanted.items():
            for number, place in users:
                own = texts[number][place]
                own.append(following[text][number])
                if is_over(own):
                    going.discard((number, place))
        if not going:
            break
    return texts


def check_room(info: SubjectInfo, longest: int, most: int) -> None:
    """Raises `ConfigError` where a prompt of so many tokens has no room for as many more."""
    if type(most) is not int or most < 1:
        raise ConfigError(f"A text grows by 1 token or more, a whole number of them, got {most!r}.")
    if info.only_tokens is not None:
        raise ConfigError(f"{info.name} runs on prompts of {info.only_tokens} tokens only, so that no text can grow.")
    if info.max_positions is not None and longest + most - 1 > info.max_positions:
        raise ConfigError(
            f"A prompt of {longest} tokens and {most} generated ones need more positions than the {info.max_positions} "
            f"of {info.name}; ask for fewer."
        )


def _grown(
    subject: NativeSubject, prompts: Sequence[Sequence[int]], number: int, most: int, is_over: Over, seed: int
) -> list[list[int]]:
    """In batches for which there is memory."""
    info, architecture = subject.info, subject.model.architecture
    recurrences = number if info.is_looped else 0
    texts: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) + most for prompt in prompts]
    kept = cache_bytes(
        architecture, "per-recurrence", recurrences, max(lengths, default=0), subject.model.dtype.itemsize
    )
    for rows in batches(lengths, info, subject.device, kept):
        some = [prompts[row] for row in rows]
        found = grow(subject, some, recurrences=recurrences, most=most, is_over=is_over, seed=seed)
        for row, text in zip(rows, found, strict=True):
            texts[row] = text.tokens
    return texts


def _next_tokens(
    subject: Subject, wanted: dict[tuple[int, ...], tuple[int, ...]], seed: int
) -> dict[tuple[int, ...], dict[int, int]]:
    """Of each text the likeliest next token after each of its numbers of recurrences."""
    found: dict[tuple[int, ...], dict[int, int]] = {text: {} for text in wanted}
    for numbers in sorted(set(wanted.values())):
        texts = [text for text, own in wanted.items() if own == numbers]
        for rows in batches([len(text) for text in texts], subject.info, subject.device):
            batch = [texts[row] for row in rows]
            for some in passes_of(subject, sorted(set(numbers))):
                for number, logits, _ in answers(subject, batch, some, seed):
                    for row, text in enumerate(batch):
                        found[text][number] = int(logits[row, len(text) - 1].argmax())
    return found
