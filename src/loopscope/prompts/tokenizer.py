"""A model's tokenizer, with what it puts around a text and what it knows about chats."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Encoding, Tokenizer

from loopscope.errors import PromptError
from loopscope.prompts.chat import ChatTemplate
from loopscope.prompts.prompt import TokenizedPrompt
from loopscope.prompts.tokenizer_config import TokenizerConfig


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """A token that stands for no text, such as the one at the beginning."""

    text: str
    id: int


class TextTokenizer:
    """A tokenizer as the instrument uses it: it never cuts, never pads, and says what it adds to a text.

    Both would change prompts unnoticed: padding would be studied as if it were text. What it adds is measured by
    encoding, as the post-processor of a tokenizer can be any program.
    """

    def __init__(
        self,
        backend: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        notes: Sequence[str] = (),
        named: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`named` are special tokens by the names under which files declare them: `pad_token` and so on."""
        if backend.truncation is not None or backend.padding is not None:
            backend = Tokenizer.from_str(backend.to_str())  # the caller's own stays as it is
            backend.no_truncation()
            backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.notes = tuple(notes)
        """What a user should know of this tokenizer, in sentences: where its files contradict each other."""
        self.before, self.after = _added(backend)
        """Special tokens that it puts in front of a text and behind it."""
        self._special = {
            token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special
        }

        self.padding = self._padding(named)
        """The token that fills up a batch, or else the one that ends a text; None where there is neither."""

    def _padding(self, named: Mapping[str, str]) -> SpecialToken | None:
        """As declared, else a special token that is called so."""
        for name, calls in (("pad_token", ("pad", "padding")), ("eos_token", ("eos", "end", "endoftext", "/s"))):
            called = [text for text in self._special if text.strip("<>[]|_ ").lower() in calls]
            for text in (named.get(name), *called):
                id_ = None if text is None else self.backend.token_to_id(text)
                if text is not None and id_ is not None:
                    return SpecialToken(text, id_)
        return None

    @property
    def bos(self) -> SpecialToken | None:
        """The token with which every text begins; None where the tokenizer puts none."""
        return self.before[0] if self.before else None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """Token ids (`.ids`) with their pieces (`.tokens`) and places in the text (`.offsets`).

        Special tokens that the text itself spells out, such as `<s>`, become those tokens, as everywhere else. Raises
        `PromptError` for a text that the tokenizer has no tokens for.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises nothing more specific
            shown = text if len(text) <= 40 else text[:39] + "…"
            raise PromptError(
                f"The model's tokenizer cannot read {shown!r} ({error}); leave this prompt out."
            ) from error

    def name(self, token: int) -> str:
        """A readable piece for a token without a text around it: decoded alone, by number where that is impossible."""
        known = self.backend.id_to_token(token) if 0 <= token < 2**32 else None  # which the library has no room for
        if known is None:
            return f"<{token}>"
        return self.backend.decode([token], skip_special_tokens=False) or known

    def special_in(self, text: str) -> tuple[str, ...]:
        """Special tokens that a text spells out and that encoding it therefore gives, sorted."""
        spelled = {content: id_ for content, id_ in self._special.items() if content in text}
        if not spelled:
            return ()
        found = set(self.encode(text, add_special_tokens=False).ids)
        return tuple(sorted(content for content, id_ in spelled.items() if id_ in found))


def load_tokenizer(folder: Path) -> TextTokenizer | None:
    """The tokenizer of a checkpoint folder; None where there is no tokenizer.json.

    The post-processor of tokenizer.json decides which special tokens are added. `add_bos_token` and `add_eos_token` of
    tokenizer_config.json do not, which is how transformers 5 reads them too; where they say something else, the
    tokenizer's `notes` tell. Tokens that only tokenizer_config.json declares are special tokens as well.

    Raises `PromptError` for a file that is there and cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    backend = read_tokenizer(path)
    config = TokenizerConfig.read(folder)
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in config.tokens:
        if token.content not in present:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    template = None if config.chat_template is None else ChatTemplate(config.chat_template, config.named)
    before, after = _added(backend)
    notes = [
        *config.notes,
        *_contradiction("bos", config.add_bos, config.named, before, "in front of"),
        *_contradiction("eos", config.add_eos, config.named, after, "behind"),
    ]
    return TextTokenizer(backend, chat_template=template, notes=notes, named=config.named)


def as_tokenizer(given: Any) -> TextTokenizer:
    """A tokenizer in memory: ours, one of the package tokenizers, or a fast one of transformers, which is one with
    named tokens and a chat template. Raises `PromptError` for anything else."""
    if isinstance(given, TextTokenizer):
        return given
    backend = getattr(given, "backend_tokenizer", given)
    if not isinstance(backend, Tokenizer):
        raise PromptError(
            f"tokenizer is a {type(given).__name__}; what can be used is a tokenizer of the package tokenizers or a "
            "fast one of transformers; leave it out, and give lists of token ids."
        )
    named = {
        name: text
        for name, text in getattr(given, "special_tokens_map", {}).items()
        if isinstance(text, str)  # not the lists of more of them
    }
    template = getattr(given, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return TextTokenizer(
        backend,
        chat_template=ChatTemplate(template, named) if isinstance(template, str) else None,
        named=named,
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, and switch off the truncation and padding that it may ask for.

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


def _added(backend: Tokenizer) -> tuple[tuple[SpecialToken, ...], tuple[SpecialToken, ...]]:
    """Special tokens that encoding puts in front of a text and behind it."""
    encoding = _probe(backend)
    added = [bool(mark) for mark in encoding.special_tokens_mask]
    tokens = [SpecialToken(text, id_) for text, id_ in zip(encoding.tokens, encoding.ids, strict=True)]
    first = added.index(False) if False in added else len(added)
    last = len(added) - added[::-1].index(False) if False in added else len(added)
    return tuple(tokens[:first]), tuple(tokens[last:])


def _probe(backend: Tokenizer) -> Encoding:
    """The encoding of some text that leaves at least one token of its own, if any does."""
    known = sorted(backend.get_vocab(with_added_tokens=False))
    for text in ("a", *known[:1000]):  # a tokenizer of whole words knows no others
        with suppress(Exception):  # the library raises nothing more specific for a word that it does not know
            encoding = backend.encode(text)
            if 0 in encoding.special_tokens_mask:
                return encoding
    return backend.encode("")


def _contradiction(
    kind: str, asked: bool | None, named: Mapping[str, str], added: Sequence[SpecialToken], where: str
) -> list[str]:
    """A sentence, if tokenizer_config.json asks for another treatment of BOS or EOS than tokenizer.json gives."""
    token = named.get(f"{kind}_token")
    if asked is None or token is None or asked == any(each.text == token for each in added):
        return []
    does = "puts none" if asked else f"puts {token}"
    return [
        f"tokenizer_config.json says add_{kind}_token = {'true' if asked else 'false'}, but tokenizer.json {does} "
        f"{where} a text; tokenizer.json decides."
    ]


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
        "notes": [
            *tokenizer.notes,
            *_date(tokenizer, chat),
            *_spelled(spelled, len(prompts)),
            *_doubled(tokenizer, prompts),
        ],
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


def _doubled(tokenizer: TextTokenizer, prompts: Sequence[TokenizedPrompt]) -> list[str]:
    """Prompts that begin with a special token twice, as a chat that was pasted as text does."""
    found = [
        prompt
        for prompt in prompts
        if prompt.text is not None and len(prompt.token_ids) > 1 and prompt.token_ids[0] == prompt.token_ids[1]
    ]
    names = {prompt.id: tokenizer.backend.id_to_token(prompt.token_ids[0]) or "" for prompt in found}
    twice = [prompt for prompt in found if tokenizer.special_in(names[prompt.id])]
    if not twice:
        return []
    return [
        f"{len(twice)} of {len(prompts)} prompts begin with {names[twice[0].id]} twice, as their text spells out what "
        "is put before it anyway: no model has seen that in training, and what it does with its first token changes; "
        f"take it out of the text. The first is {twice[0].id!r}."
    ]


def _spelled(spelled: Sequence[TokenizedPrompt], count: int) -> list[str]:
    if not spelled:
        return []
    tokens = ", ".join(sorted({token for prompt in spelled for token in prompt.special_in_text}))
    return [
        f"{len(spelled)} of {count} prompts spell out special tokens ({tokens}), which the model reads as those tokens "
        f"and not as text; the first is {spelled[0].id!r}."
    ]
