"""What a prompt is, before and after the tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from loopscope.errors import PromptError

__all__ = ["Prompt", "TokenizedPrompt", "prompts_digest"]


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
    """So many leading tokens are the system prompt, with the special tokens and the blank line around it: the prompt
    itself is `token_ids[system_tokens:]`. 0 without a system prompt."""


def prompts_digest(prompts: Iterable[TokenizedPrompt]) -> str:
    """SHA-256 (hexadecimal) over ids and token ids, in order: it tells whether two studies read the same."""
    digest = hashlib.sha256()
    for prompt in prompts:
        # JSON keeps ("a", [1]), ("b", [2]) apart from every other way to cut the same characters.
        digest.update(json.dumps([prompt.id, list(prompt.token_ids)]).encode() + b"\n")
    return digest.hexdigest()
