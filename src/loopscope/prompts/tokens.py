"""From text to token ids that fit the model, with a readable piece for each: whole prompts, or a text in chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from loopscope.errors import PromptError
from loopscope.prompts.chat import RenderedChat
from loopscope.prompts.prompt import Prompt, TokenizedPrompt, subsample
from loopscope.prompts.tokenizer import Encoded, TextTokenizer

BETWEEN = "\n\n"
"""A blank line between system prompt and prompt."""
CONTINUED = "\N{REPLACEMENT CHARACTER}"
"""Stands for a token that holds only further bytes of a character whose first bytes are in the token before."""
BLANK_MARKS = ("▁", "Ġ")
"""A blank, as tokenizers write it. Some put one in front of the text, with the offsets of the first character."""


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: TextTokenizer | None,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    truncate: int | None = None,
    chat: bool = False,
) -> list[TokenizedPrompt]:
    """Token ids for every prompt, in order.

    The tokenizer's own post-processor adds its special tokens. System prompt, blank line and prompt are encoded as one
    text, as the model would meet them. With `chat` the model's chat template writes that text instead, special tokens
    included, with the system prompt as the system's turn and the prompt as the user's. `truncate` keeps the first so
    many tokens, special ones included.

    Raises `PromptError` for text without a tokenizer, a token id that is not below `vocab_size`, a prompt longer than
    `max_positions`, a truncation that leaves nothing of a prompt, and a chat without a template or with prompts that
    are token ids.
    """
    if truncate is not None and truncate < 1:
        raise PromptError(f"--truncate must be at least 1, got {truncate}; leave it out to keep every token.")
    if tokenizer is None:
        for prompt in prompts:
            if prompt.text is not None:
                raise PromptError(
                    f"Prompt {prompt.id!r} is text, but the model has no tokenizer; put a tokenizer.json beside its "
                    "weights, or analyze lists of token ids in a JSONL file (--field)."
                )
    if chat:
        _check_chat(prompts, tokenizer)
    limits = Limits(vocab_size, max_positions, truncate, tokenizer.vocab_size if tokenizer else None)
    now = datetime.now().astimezone() if chat else None  # one date for all prompts, even at midnight
    return [limits.applied(_encode(prompt, tokenizer, now)) for prompt in prompts]


def _check_chat(prompts: Sequence[Prompt], tokenizer: TextTokenizer | None) -> None:
    for prompt in prompts:
        if prompt.text is None:
            raise PromptError(
                f"--chat makes a text the user's turn, but prompt {prompt.id!r} is a list of token ids; leave --chat "
                "out and write the template's token ids into the lists."
            )
    if tokenizer is None or tokenizer.chat_template is None:
        raise PromptError(
            "--chat needs the model's chat template, and there is none (no chat_template in tokenizer_config.json, no "
            "chat_template.jinja beside it); leave --chat out."
        )


@dataclass(frozen=True)
class Limits:
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
            before = f", {prompt.system_tokens} of them before its own text" if prompt.system_tokens else ""
            raise PromptError(
                f"Prompt {prompt.id!r} has {length} tokens{before}, but the model has {self.max_positions} positions; "
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
                f"--truncate {self.truncate} leaves nothing of prompt {prompt.id!r}, as what comes before its own text "
                f"has {prompt.system_tokens} tokens; keep more, or shorten the system prompt."
            )
        cut = len(prompt.token_ids) - self.truncate
        return dataclasses.replace(
            prompt,
            token_ids=prompt.token_ids[: self.truncate],
            token_strings=prompt.token_strings[: self.truncate],
            suffix_tokens=max(0, prompt.suffix_tokens - cut),
        )


def _encode(prompt: Prompt, tokenizer: TextTokenizer | None, now: datetime | None) -> TokenizedPrompt:
    """`now` is the date for the chat template; None where none is used."""
    if prompt.token_ids is not None:
        strings = tuple(f"<{token}>" if tokenizer is None else tokenizer.name(token) for token in prompt.token_ids)
        return TokenizedPrompt(prompt.id, None, prompt.token_ids, strings, 0)
    assert prompt.text is not None  # or Prompt would have refused
    assert tokenizer is not None  # or encode_prompts would have
    whole = _whole(prompt.text, prompt.system, tokenizer, now)
    encoding = tokenizer.encode(whole.text, add_special_tokens=now is None)
    if all(encoding.special_tokens_mask):
        raise PromptError(f"Prompt {prompt.id!r} has no tokens; the tokenizer leaves nothing of its text.")
    tokens = text_tokens(encoding, whole.text)
    before = _tokens_before(tokens, whole.start)
    return TokenizedPrompt(
        id=prompt.id,
        text=prompt.text,
        token_ids=tuple(encoding.ids),
        token_strings=tuple(token.piece for token in tokens),
        system_tokens=before,
        suffix_tokens=min(_tokens_after(tokens, whole.end), len(tokens) - before),
        special_in_text=tuple(sorted({*tokenizer.special_in(prompt.text), *tokenizer.special_in(prompt.system or "")})),
    )


def _whole(text: str, system: str | None, tokenizer: TextTokenizer, now: datetime | None) -> RenderedChat:
    """What is encoded, and where the prompt stands in it."""
    if now is None:
        before = "" if system is None else system + BETWEEN
        return RenderedChat(before + text, len(before), len(before + text))
    assert tokenizer.chat_template is not None  # or encode_prompts would have refused
    return tokenizer.chat_template.render(text, system, now=now)


@dataclass(frozen=True, slots=True)
class TextToken:
    """What one token stands for in the text."""

    piece: str
    start: int
    """First character that it holds a part of."""
    end: int
    added: bool
    """A special token that the tokenizer added, which stands for no text."""


def _tokens_before(tokens: Sequence[TextToken], boundary: int) -> int:
    """Leading tokens without any character at or beyond `boundary`; 0 if there is nothing before it.

    A token that reaches across the boundary belongs to the prompt, so that the prompt's tokens hold all of its text.
    """
    if boundary == 0:
        return 0
    return next((index for index, token in enumerate(tokens) if token.end > boundary), len(tokens))


def _tokens_after(tokens: Sequence[TextToken], boundary: int) -> int:
    """Trailing tokens without any character before `boundary`, those that the tokenizer added included.

    A token that reaches across the boundary belongs to the prompt, as at its beginning.
    """
    trailing = enumerate(reversed(tokens))
    return next((count for count, token in trailing if not token.added and token.start < boundary), len(tokens))


def text_tokens(encoding: Encoded, text: str) -> list[TextToken]:
    """What each token stands for in the text; special tokens that the tokenizer added keep their names.

    Blanks that a tokenizer leaves out of its offsets go to the token after them, and a character whose bytes are
    shared out over several tokens goes to the first: put together, the pieces are the text, except for a blank that the
    tokenizer itself puts in front.
    """
    tokens = []
    done = 0
    for name, (start, end), added in zip(encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True):
        if added:
            tokens.append(TextToken(name, start, end, added=True))
            continue
        if name in BLANK_MARKS and not text[done:end].isspace():
            tokens.append(TextToken(" ", start, end, added=False))
            continue
        begin = done if start < done or text[done:start].isspace() else start
        piece = text[begin:end] or (CONTINUED if start < done else name)
        tokens.append(TextToken(piece, min(begin, start), end, added=False))
        done = max(done, end)
    return tokens


def cut_text(
    prompt: Prompt,
    tokenizer: TextTokenizer | None,
    chunk: int,
    *,
    vocab_size: int,
    max_positions: int | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> list[TokenizedPrompt]:
    """Prompts of `chunk` tokens each, one after the other through a text; those that `draw` chooses.

    The text is encoded once, as a whole, and its tokens are cut: a chunk may begin in the middle of a line, or of a
    word. Each gets the special tokens that the tokenizer puts around a text, which count among its `chunk` tokens. What
    is left at the end and would be shorter is left out. The ids are `chunk-1`, `chunk-2` and so on.

    Raises `PromptError` for a prompt without text, a missing tokenizer, a chunk that leaves no room beside the special
    tokens or does not fit the model, and a text that is shorter than one chunk.
    """
    if prompt.text is None or tokenizer is None:
        raise PromptError("--chunk cuts a text into tokens, and the model has no tokenizer; give lists of token ids.")
    around = len(tokenizer.before) + len(tokenizer.after)
    own = chunk - around
    if own < 1:
        raise PromptError(
            f"--chunk {chunk} leaves no token of the text beside the {around} special tokens that the model's "
            "tokenizer puts around it; make chunks longer."
        )
    encoding = tokenizer.encode(prompt.text, add_special_tokens=False)
    ids, tokens = encoding.ids, text_tokens(encoding, prompt.text)
    if len(ids) < own:
        raise PromptError(
            f"The text has {len(ids)} tokens, too few for a single chunk of {own}; lower --chunk, or take it whole "
            "with --whole-file."
        )
    limits = Limits(vocab_size, max_positions, None, tokenizer.vocab_size)
    starts = subsample(range(0, len(ids) - own + 1, own), limit=limit, seed=seed)
    return [
        limits.applied(
            _chunk(start // own + 1, prompt.text, ids[start : start + own], tokens[start : start + own], tokenizer)
        )
        for start in starts
    ]


def _chunk(
    number: int, text: str, ids: list[int], tokens: list[TextToken], tokenizer: TextTokenizer
) -> TokenizedPrompt:
    own, before, after = text[tokens[0].start : tokens[-1].end], tokenizer.before, tokenizer.after
    return TokenizedPrompt(
        id=f"chunk-{number}",
        text=own,
        token_ids=(*(each.id for each in before), *ids, *(each.id for each in after)),
        token_strings=(
            *(each.text for each in before),
            *(each.piece for each in tokens),
            *(each.text for each in after),
        ),
        system_tokens=0,
        suffix_tokens=len(after),
        special_in_text=tokenizer.special_in(own),
    )
