"""From text to token ids that fit the model, with a readable piece for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from loopscope.errors import PromptError
from loopscope.prompts.prompt import Prompt, TokenizedPrompt

__all__ = ["encode_prompts", "load_tokenizer"]

BETWEEN = "\n\n"
"""A blank line between system prompt and prompt."""
CONTINUED = "\N{REPLACEMENT CHARACTER}"
"""Stands for a token that holds only further bytes of a character whose first bytes are in the token before."""
BLANK_MARKS = ("▁", "Ġ")
"""A blank, as tokenizers write it. Some put one in front of the text, with the offsets of the first character."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, and switch off the truncation and padding that it may ask for.

    Both would change prompts unnoticed: padding would be studied as if it were text.

    Raises `PromptError` if the file is missing or no tokenizer.
    """
    if not path.is_file():
        raise PromptError(f"The tokenizer {path} does not exist; a model's tokenizer is its file tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise PromptError(f"{path} is not a readable tokenizer ({error}); get the file again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    truncate: int | None = None,
) -> list[TokenizedPrompt]:
    """Token ids for every prompt, in order.

    The tokenizer's own post-processor adds its special tokens. System prompt, blank line and prompt are encoded as one
    text, as the model would meet them. `truncate` keeps the first so many tokens, special ones included.

    Raises `PromptError` for text without a tokenizer, a token id that is not below `vocab_size`, a prompt longer than
    `max_positions`, and a truncation that leaves nothing of a prompt.
    """
    if truncate is not None and truncate < 1:
        raise PromptError(f"--truncate must be at least 1, got {truncate}; leave it out to keep every token.")
    if tokenizer is None:
        for prompt in prompts:
            if prompt.text is not None:
                raise PromptError(
                    f"Prompt {prompt.id!r} is text, but the model has no tokenizer; put a tokenizer.json beside its "
                    "weights, or give lists of token ids in a JSONL file (--field)."
                )
    limits = _Limits(vocab_size, max_positions, truncate, tokenizer.get_vocab_size() if tokenizer else None)
    return [limits.applied(_encode(prompt, tokenizer)) for prompt in prompts]


@dataclass(frozen=True)
class _Limits:
    """What the model and the user ask of every prompt."""

    vocab_size: int
    max_positions: int | None
    truncate: int | None
    tokenizer_size: int | None

    def applied(self, prompt: TokenizedPrompt) -> TokenizedPrompt:
        """The prompt cut to `truncate` tokens; raises `PromptError` if it does not fit the model then."""
        prompt = self._truncated(prompt)
        length = len(prompt.token_ids)
        if not length:
            raise PromptError(f"Prompt {prompt.id!r} has no tokens; the tokenizer leaves nothing of its text.")
        if self.max_positions is not None and length > self.max_positions:
            system = f", {prompt.system_tokens} of them the system prompt" if prompt.system_tokens else ""
            raise PromptError(
                f"Prompt {prompt.id!r} has {length} tokens{system}, but the model has {self.max_positions} positions; "
                f"keep the first ones with --truncate {self.max_positions}, or leave this prompt out."
            )
        outside = [token for token in prompt.token_ids if not 0 <= token < self.vocab_size]
        if outside:
            if prompt.text is None or self.tokenizer_size is None:
                cause = "the list of token ids was made for another model"
            else:
                cause = f"its tokenizer has {self.tokenizer_size} tokens, so it belongs to another model"
            raise PromptError(
                f"Prompt {prompt.id!r} has the token id {outside[0]}, but the model has {self.vocab_size} tokens "
                f"(ids 0 to {self.vocab_size - 1}): {cause}."
            )
        return prompt

    def _truncated(self, prompt: TokenizedPrompt) -> TokenizedPrompt:
        if self.truncate is None or len(prompt.token_ids) <= self.truncate:
            return prompt
        if prompt.system_tokens >= self.truncate:
            raise PromptError(
                f"--truncate {self.truncate} leaves nothing of prompt {prompt.id!r}, as its system prompt has "
                f"{prompt.system_tokens} tokens; keep more, or shorten the system prompt."
            )
        return TokenizedPrompt(
            prompt.id,
            prompt.text,
            prompt.token_ids[: self.truncate],
            prompt.token_strings[: self.truncate],
            prompt.system_tokens,
        )


def _encode(prompt: Prompt, tokenizer: Tokenizer | None) -> TokenizedPrompt:
    if prompt.token_ids is not None:
        strings = tuple(_name(token, tokenizer) for token in prompt.token_ids)
        return TokenizedPrompt(prompt.id, None, prompt.token_ids, strings, 0)
    assert prompt.text is not None  # or Prompt would have refused
    assert tokenizer is not None  # or encode_prompts would have
    before = "" if prompt.system is None else prompt.system + BETWEEN
    encoding = tokenizer.encode(before + prompt.text)
    return TokenizedPrompt(
        prompt.id,
        prompt.text,
        tuple(encoding.ids),
        tuple(_pieces(encoding, before + prompt.text)),
        _tokens_before(encoding, len(before)),
    )


def _tokens_before(encoding: Encoding, boundary: int) -> int:
    """Leading tokens without any character at or beyond `boundary`; 0 if there is nothing before it.

    A token that reaches across the boundary belongs to the prompt, so that the prompt's tokens hold all of its text.
    """
    if boundary == 0:
        return 0
    beyond = (index for index, (_, end) in enumerate(encoding.offsets) if end > boundary)
    return next(beyond, len(encoding.ids))


def _pieces(encoding: Encoding, text: str) -> list[str]:
    """What each token stands for in the text; special tokens that the tokenizer added keep their names.

    Blanks that a tokenizer leaves out of its offsets go to the token after them, and a character whose bytes are
    shared out over several tokens goes to the first: put together, the pieces are the text, except for a blank that the
    tokenizer itself puts in front.
    """
    pieces = []
    done = 0
    for token, (start, end), added in zip(encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True):
        if added:
            pieces.append(token)
            continue
        if token in BLANK_MARKS and not text[done:end].isspace():
            pieces.append(" ")
            continue
        begin = done if start < done or text[done:start].isspace() else start
        pieces.append(text[begin:end] or (CONTINUED if start < done else token))
        done = max(done, end)
    return pieces


def _name(token: int, tokenizer: Tokenizer | None) -> str:
    """A token without a text around it: decoded alone, or by its number where that is impossible."""
    known = None if tokenizer is None else tokenizer.id_to_token(token)
    if tokenizer is None or known is None:
        return f"<{token}>"
    return tokenizer.decode([token], skip_special_tokens=False) or known
