"""A long running text as prompts of one length."""

from __future__ import annotations

from loopscope.errors import PromptError
from loopscope.prompts.prompt import Prompt, TokenizedPrompt
from loopscope.prompts.sample import draw
from loopscope.prompts.tokenizer import SpecialToken, TextTokenizer
from loopscope.prompts.tokens import Limits, TextToken, text_tokens

__all__ = ["cut_text"]


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
    starts = draw(range(0, len(ids) - own + 1, own), limit=limit, seed=seed)
    return [
        limits.applied(
            _chunk(start // own + 1, prompt.text, ids[start : start + own], tokens[start : start + own], tokenizer)
        )
        for start in starts
    ]


def _chunk(
    number: int, text: str, ids: list[int], tokens: list[TextToken], tokenizer: TextTokenizer
) -> TokenizedPrompt:
    own = text[tokens[0].start : tokens[-1].end]
    return TokenizedPrompt(
        id=f"chunk-{number}",
        text=own,
        token_ids=(*_ids(tokenizer.before), *ids, *_ids(tokenizer.after)),
        token_strings=(*_names(tokenizer.before), *(token.piece for token in tokens), *_names(tokenizer.after)),
        system_tokens=0,
        suffix_tokens=len(tokenizer.after),
        special_in_text=tokenizer.special_in(own),
    )


def _ids(special: tuple[SpecialToken, ...]) -> list[int]:
    return [token.id for token in special]


def _names(special: tuple[SpecialToken, ...]) -> list[str]:
    return [token.text for token in special]
