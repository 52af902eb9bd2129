"""Greedy generation after several numbers of recurrences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loopscope.errors import ConfigError
from loopscope.evaluation.likelihood import answers, batches, passes_of
from loopscope.models.subject import Subject


def generate_greedily(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    most: int,
    is_over: Callable[[list[int]], bool],
    seed: int = 0,
) -> dict[int, list[list[int]]]:
    """The likeliest next token again and again, of each prompt and after each number of recurrences.

    A text ends with the token after which `is_over` says so, or after `most` tokens. Every token is a pass over the
    whole text: there is no cache of keys and values. Texts that do not differ between numbers of recurrences share
    their passes, so that the cost is between that of the largest number and that of all. The seed of a random initial
    state is the same for every pass. Raises `ConfigError` where prompt and text need more positions than there are.
    """
    info = subject.info
    longest = max(map(len, prompts), default=0)
    if info.max_positions is not None and longest + most - 1 > info.max_positions:
        raise ConfigError(
            f"A prompt of {longest} tokens and {most} generated ones need more positions than the {info.max_positions} "
            f"of {info.name}; ask for fewer."
        )
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
