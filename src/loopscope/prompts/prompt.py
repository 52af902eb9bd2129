"""What a prompt is, before and after the tokenizer; what identifies a list of them, and a subsample of one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from loopscope.errors import PromptError

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """Text, or token ids for a model without a tokenizer.

    Raises `PromptError` unless it is exactly one of the two, and if a system prompt stands before token ids.
    """

    id: str
    """The record's own id, or where the prompt stood: `line-12`, `row-12`, `text-12`, `file`; counted from 1."""
    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    system: str | None = None
    """Text that goes before the prompt, with a blank line between."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise PromptError(f"Prompt {self.id!r} must be either text or token ids, and is both or neither.")
        if self.token_ids is not None and self.system is not None:
            raise PromptError(
                f"Prompt {self.id!r} is a list of token ids, before which the text of a system prompt cannot be put; "
                "leave --system-prompt out and begin each list with the system prompt's token ids."
            )


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model reads it."""

    id: str
    text: str | None
    """The prompt's own text, without the system prompt; None for a prompt given as token ids."""
    token_ids: tuple[int, ...]
    """Special tokens and system prompt included."""
    token_strings: tuple[str, ...]
    """One readable piece for each token."""
    system_tokens: int
    """This many leading tokens come before the prompt's text: the system prompt, or what a chat template writes there,
    with the special tokens and the blank line around it. 0 without either, even where a text begins with BOS."""
    suffix_tokens: int = 0
    """This many trailing tokens come after the prompt's text: what a chat template writes there (the end of the turn,
    the beginning of an answer), or the EOS of a tokenizer that adds one. The prompt itself is
    `token_ids[system_tokens : len(token_ids) - suffix_tokens]`."""
    generated_tokens: int = 0
    """This many tokens, behind all others, were written by the model itself. With those the prompt itself is
    `token_ids[system_tokens : len(token_ids) - suffix_tokens - generated_tokens]`."""
    special_in_text: tuple[str, ...] = ()
    """Special tokens that the prompt's own text or the system prompt spells out, such as `<s>`: they were read as those
    tokens."""


def prompts_digest(prompts: Iterable[TokenizedPrompt]) -> str:
    """SHA-256 (hexadecimal) over ids and token ids, in order: it tells whether two studies read the same."""
    digest = hashlib.sha256()
    for prompt in prompts:
        # JSON keeps ("a", [1]), ("b", [2]) apart from every other way to cut the same characters.
        digest.update(json.dumps([prompt.id, list(prompt.token_ids)]).encode() + b"\n")
    return digest.hexdigest()


def subsample(items: Sequence[T], *, limit: int | None, seed: int | None) -> list[T]:
    """Choose `limit` of the items and keep their order; all of them where there are fewer, or without a limit.

    Without a seed they are the first ones. With one, item i (from 0) has the rank SHA-256(f"{seed}:{i}") and those with
    the smallest ranks are chosen. A rank depends on nothing else, so the subset is the same on every machine and in
    every Python version, and for one seed a smaller subset is part of every larger one.

    Raises `PromptError` for a limit below 1, and for a seed without a limit.
    """
    if limit is None:
        if seed is not None:
            raise PromptError(
                f"--sample-seed {seed} draws a subset, but nothing says how large; add --limit N or leave it out."
            )
        return list(items)
    if limit < 1:
        raise PromptError(f"--limit must be at least 1, got {limit}; leave it out to use every prompt.")
    if seed is None:
        return list(items[:limit])
    by_rank = sorted(range(len(items)), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return [items[index] for index in sorted(by_rank[:limit])]
