"""System prompts that go by a name: the conditions under which behaviour is compared (arXiv 2604.11791).

`persona` is a long text, `maths` a short one, and `padding` as many padding tokens as the persona has tokens: what the
length alone does, without the words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loopscope.errors import PromptError
from loopscope.prompts.files import read_text
from loopscope.prompts.prompt import Prompt
from loopscope.prompts.tokenizer import SpecialToken, TextTokenizer

__all__ = ["PADDING", "SHIPPED_CONDITIONS", "condition_names", "pad_prompts", "padding_record", "read_system_prompt"]

SHIPPED_CONDITIONS: Mapping[str, str] = MappingProxyType(
    {"persona": "conditions/persona.txt", "maths": "conditions/maths.txt"}
)
"""Files of the package."""
PADDING = "padding"


def condition_names() -> list[str]:
    """Every name that --system-prompt takes."""
    return [*SHIPPED_CONDITIONS, PADDING]


def read_system_prompt(source: Path) -> str | None:
    """The text of a condition or of a file; None for `padding`, which needs a tokenizer (see `pad_prompts`).

    A name goes before a file that is called the same. Raises `PromptError` for a file that is missing or empty.
    """
    name = str(source)
    if name == PADDING:
        return None
    if name in SHIPPED_CONDITIONS:
        return _shipped(name)
    if not source.exists() and len(source.parts) == 1 and not source.suffix:
        raise PromptError(
            f"{name!r} is neither a file nor the name of a system prompt; give the path of a file, or one of "
            f"{', '.join(condition_names())}."
        )
    text = read_text(source).strip()
    if not text:
        raise PromptError(f"The system prompt {source} is empty; write one into it, or leave --system-prompt out.")
    return text


def pad_prompts(prompts: Sequence[Prompt], tokenizer: TextTokenizer | None) -> list[Prompt]:
    """The prompts with padding tokens for a system prompt, as many as the persona's text has.

    The padding token is the one that the tokenizer's files declare, else a special token that is called so, else the
    same of the token that ends a text (EOS).

    Raises `PromptError` without a tokenizer, for one that has neither token, and for prompts that are token ids.
    """
    if tokenizer is None:
        raise PromptError(
            "--system-prompt padding takes a padding token from the tokenizer, and the model has none; begin each list "
            "of token ids with the padding yourself."
        )
    token = _padding_token(tokenizer)
    text = token.text * _persona_length(tokenizer)
    return [dataclasses.replace(prompt, system=text) for prompt in prompts]


def padding_record(tokenizer: TextTokenizer) -> dict[str, Any]:
    """For the manifest: which token, and how many of it."""
    return {**dataclasses.asdict(_padding_token(tokenizer)), "tokens": _persona_length(tokenizer)}


def _shipped(name: str) -> str:
    file = resources.files("loopscope.prompts").joinpath(SHIPPED_CONDITIONS[name])
    return file.read_text(encoding="utf-8").strip()


def _persona_length(tokenizer: TextTokenizer) -> int:
    return len(tokenizer.encode(_shipped("persona"), add_special_tokens=False).ids)


def _padding_token(tokenizer: TextTokenizer) -> SpecialToken:
    token = tokenizer.padding
    if token is None:
        raise PromptError(
            "--system-prompt padding needs a padding or an end-of-text token, and the model's tokenizer has neither; "
            "name one as pad_token in tokenizer_config.json, or give a file."
        )
    if tokenizer.encode(token.text * 2, add_special_tokens=False).ids != [token.id] * 2:
        raise PromptError(
            f"--system-prompt padding cannot be written: the tokenizer reads {token.text!r} twice in a row as other "
            "tokens; give a file."
        )
    return token
