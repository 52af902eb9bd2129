"""What a study keeps about how its prompts were made into tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from loopscope.prompts.prompt import TokenizedPrompt
from loopscope.prompts.tokenizer import SpecialToken, TextTokenizer

__all__ = ["tokenizer_record"]


def tokenizer_record(
    tokenizer: TextTokenizer | None, prompts: Sequence[TokenizedPrompt], *, chat: bool
) -> dict[str, Any] | None:
    """The manifest's entry `tokenizer`; None without a tokenizer, and where every prompt was given as token ids.

    `bos` is the special token with which every prompt begins, as text and id: put there by the tokenizer, or written
    by the chat template; None where there is no such token. `notes` are sentences that a user should read.
    """
    if tokenizer is None or all(prompt.text is None for prompt in prompts):
        return None
    spelled = [prompt for prompt in prompts if prompt.special_in_text]
    bos = _written_bos(tokenizer, prompts) if chat else tokenizer.bos
    return {
        "vocabulary": tokenizer.vocab_size,
        "bos": None if bos is None else dataclasses.asdict(bos),
        "added_before": [] if chat else [token.text for token in tokenizer.before],
        "added_after": [] if chat else [token.text for token in tokenizer.after],
        "chat_template": "used" if chat else "none" if tokenizer.chat_template is None else "available, not used",
        "prompts_with_special_tokens": len(spelled),
        "notes": [*tokenizer.notes, *_date(tokenizer, chat), *_spelled(spelled, len(prompts))],
    }


def _written_bos(tokenizer: TextTokenizer, prompts: Sequence[TokenizedPrompt]) -> SpecialToken | None:
    """The first token of every prompt, if it is the same special token: templates begin with BOS or a turn's mark."""
    first = {prompt.token_ids[0] for prompt in prompts}
    text = tokenizer.backend.id_to_token(min(first)) if len(first) == 1 else None
    return SpecialToken(text, min(first)) if text is not None and tokenizer.special_in(text) else None


def _date(tokenizer: TextTokenizer, chat: bool) -> list[str]:
    if not chat or tokenizer.chat_template is None or not tokenizer.chat_template.uses_date:
        return []
    return ["The chat template can write the current date, so the tokens of a prompt may differ from day to day."]


def _spelled(spelled: Sequence[TokenizedPrompt], count: int) -> list[str]:
    if not spelled:
        return []
    tokens = ", ".join(sorted({token for prompt in spelled for token in prompt.special_in_text}))
    return [
        f"{len(spelled)} of {count} prompts spell out special tokens ({tokens}), which the model reads as those tokens "
        f"and not as text; the first is {spelled[0].id!r}."
    ]
