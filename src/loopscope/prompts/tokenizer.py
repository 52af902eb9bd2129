"""A model's tokenizer, with what it puts around a text and what it knows about chats."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer

from loopscope._util.reading import foreign, parse_json, read_text
from loopscope.errors import PromptError, one_line
from loopscope.prompts.chat import ChatTemplate
from loopscope.prompts.prompt import TokenizedPrompt
from loopscope.prompts.sandbox import RefusedError, sandbox
from loopscope.prompts.tokenizer_config import TokenizerConfig

_LONGEST = 2_000_000
"""Characters of a text: tokens take 300 bytes each while they are made."""


class Encoded(NamedTuple):
    """A text as tokens, an entry each."""

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    """First character in the text, and the one behind the last."""
    special_tokens_mask: list[int]
    """1 for what the tokenizer added."""


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
        program: Mapping[str, Any] | None = None,
    ) -> None:
        """`named` are special tokens by the names under which files declare them: `pad_token` and so on. `program`, for
        the sandbox, reads text in the place of the backend, of which only the vocabulary is then used."""
        if backend.truncation is not None or backend.padding is not None:
            backend = Tokenizer.from_str(backend.to_str())  # the caller's own stays as it is
            backend.no_truncation()
            backend.no_padding()
        self.backend = backend
        self._program = program
        self.chat_template = chat_template
        self.notes = tuple(notes)
        """What a user should know of this tokenizer, in sentences: where its files contradict each other."""
        self.before, self.after = self._added()
        """Special tokens that it puts in front of a text and behind it."""
        self._special = {
            token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special
        }

        self.end = self._called("eos_token", ("eos", "end", "endoftext", "/s"), named)
        """The token that ends a text; None where there is none."""
        self.padding = self._called("pad_token", ("pad", "padding"), named) or self.end
        """The token that fills up a batch, or else the one that ends a text; None where there is neither."""

    def _called(self, name: str, calls: Sequence[str], named: Mapping[str, str]) -> SpecialToken | None:
        """As declared by that name, else a special token that is called so."""
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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        """Token ids with their pieces and places in the text.

        Special tokens that the text itself spells out, such as `<s>`, become those tokens, as everywhere else. Raises
        `PromptError` for a text that the tokenizer has no tokens for, and for one that is too long to be a prompt.
        """
        shown = text if len(text) <= 40 else text[:39] + "…"
        if len(text) > _LONGEST:
            raise PromptError(
                f"The text {shown!r} has {len(text):,} characters, and at most {_LONGEST:,} are read; put its parts "
                "into files of their own."
            )
        try:
            return self._encode(text, add_special_tokens=add_special_tokens)
        except (ValueError, RefusedError) as error:
            raise PromptError(
                f"The model's tokenizer cannot read {shown!r} ({error}); leave this prompt out."
            ) from error

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> Encoded:
        if self._program is not None:
            ids, tokens, offsets, mask = sandbox().call(
                "encode", self._program, text=text, add_special_tokens=add_special_tokens
            )
            return Encoded(ids, tokens, [(start, end) for start, end in offsets], mask)
        with foreign():
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Token ids as text. Raises `PromptError` for an id that is none of this tokenizer's."""
        plain = [int(each) for each in ids]
        for each in plain:
            if not 0 <= each < 2**32 or self.backend.id_to_token(each) is None:
                raise PromptError(f"{each} is the number of no token of this tokenizer, which has {self.vocab_size:,}.")
        try:
            return self._decode(plain, skip_special_tokens)
        except (ValueError, RefusedError) as error:
            raise PromptError(f"The model's tokenizer cannot write these tokens as text ({error}).") from error

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if self._program is not None:
            text: str = sandbox().call("decode", self._program, ids=ids, skip_special_tokens=skip_special_tokens)
            return text
        with foreign():
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _added(self) -> tuple[tuple[SpecialToken, ...], tuple[SpecialToken, ...]]:
        """Special tokens that encoding puts in front of a text and behind it."""
        encoding = self._probe()
        added = [bool(mark) for mark in encoding.special_tokens_mask]
        tokens = [SpecialToken(text, id_) for text, id_ in zip(encoding.tokens, encoding.ids, strict=True)]
        first = added.index(False) if False in added else len(added)
        last = len(added) - added[::-1].index(False) if False in added else len(added)
        return tuple(tokens[:first]), tuple(tokens[last:])

    def _probe(self) -> Encoded:
        """The encoding of some text that leaves at least one token of its own, if any does."""
        known = sorted(self.backend.get_vocab(with_added_tokens=False))
        for text in ("a", *known[:1000]):  # a tokenizer of whole words knows no others
            with suppress(ValueError, RefusedError):
                encoding = self._encode(text)
                if 0 in encoding.special_tokens_mask:
                    return encoding
        return self.encode("")

    def name(self, token: int) -> str:
        """A readable piece for a token without a text around it: decoded alone, by number where that is impossible."""
        known = self.backend.id_to_token(token) if 0 <= token < 2**32 else None  # which the library has no room for
        if known is None:
            return f"<{token}>"
        try:
            return self._decode([token], False) or known
        except RefusedError:
            return known

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
    text, fields = _read(path)
    config = TokenizerConfig.read(folder)
    tame = is_tame(fields)
    backend = _made(path, text if tame else json.dumps({name: fields.get(name) for name in _VOCABULARY}))
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    added = [token for token in config.tokens if token.content not in present]
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    template = None if config.chat_template is None else ChatTemplate(config.chat_template, config.named)
    program = None if tame else {"tokenizer": text, "added": [_fields_of(token) for token in added]}
    try:
        found = TextTokenizer(backend, chat_template=template, notes=config.notes, named=config.named, program=program)
    except PromptError as error:
        raise PromptError(f"{path} cannot be used: {error}") from error
    found.notes = (
        *config.notes,
        *_contradiction("bos", config.add_bos, config.named, found.before, "in front of"),
        *_contradiction("eos", config.add_eos, config.named, found.after, "behind"),
    )
    return found


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
        program=_program_of(backend),
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, and switch off the truncation and padding that it may ask for.

    Raises `PromptError` if the file is missing or no tokenizer, and if it takes too much to be made.
    """
    text, fields = _read(path)
    if not is_tame(fields):
        try:
            sandbox().call("ids", {"tokenizer": text, "added": []}, texts=[])
        except RefusedError as error:
            raise PromptError(f"{path} is not a readable tokenizer ({error}); get the file again.") from error
    tokenizer = _made(path, text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ids_of(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of many texts, without special tokens around them. Raises `PromptError` if they cannot be had within
    the sandbox's limits, which a tokenizer that is tame does not need."""
    program = _program_of(tokenizer)
    found: list[list[int]] = []
    try:
        if program is None:
            with foreign():
                return [each.ids for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
        # As many at a time as a single text may be long.
        ends = np.cumsum([len(text) for text in texts])
        for _, group in groupby(zip(texts, ends // _LONGEST, strict=True), lambda each: each[1]):
            found += sandbox().call("ids", program, texts=[text for text, _ in group])
    except (ValueError, RefusedError) as error:
        raise PromptError(f"The tokenizer cannot read the text ({one_line(error)}); use another one.") from error
    return found


def _program_of(backend: Tokenizer) -> dict[str, Any] | None:
    """For the sandbox; None for a tokenizer that is tame, or has parts in Python, which only this process has."""
    try:
        with foreign():
            text = backend.to_str()
    except ValueError:
        return None
    return None if is_tame(parse_json(text)) else {"tokenizer": text, "added": []}


_VOCABULARY = ("version", "added_tokens", "model")


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text and what it says."""
    try:
        text = read_text(path)
        fields = parse_json(text)
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
    except FileNotFoundError:
        raise PromptError(
            f"The tokenizer {path} does not exist; a model's tokenizer is its file tokenizer.json."
        ) from None
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} is not a readable tokenizer ({one_line(error)}); get the file again.") from error
    return text, fields


def _made(path: Path, text: str) -> Tokenizer:
    try:
        with foreign():
            return Tokenizer.from_str(text)
    except ValueError as error:
        raise PromptError(f"{path} is not a readable tokenizer ({one_line(error)}); get the file again.") from error


def _fields_of(token: AddedToken) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def is_tame(fields: Mapping[str, Any]) -> bool:
    """Whether a tokenizer takes a time and gives a number of tokens in proportion to its text, and cannot fail: it has
    no expressions, and replaces nothing by what is longer."""
    parts = [fields.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            if not _is_tame_part(part):
                return False
            parts += [each for name, each in part.items() if name != "special_tokens"]
    return True


_TAME = {"BertNormalizer", "BertPreTokenizer", "BertProcessing", "ByteFallback", "ByteLevel", "Digits", "Fuse"} | {
    *("Lowercase", "Metaspace", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Punctuation", "Replace", "RobertaProcessing"),
    *("Sequence", "Strip", "StripAccents", "TemplateProcessing", "Whitespace", "WhitespaceSplit", "WordPiece"),
}
_FEW = 64
"""Characters that a part may add, or tokens."""


def _is_tame_part(part: Mapping[str, Any]) -> bool:
    match part.get("type"):
        case "Replace":
            pattern, content = part.get("pattern"), part.get("content")
            replaced = pattern.get("String") if isinstance(pattern, dict) else None
            return isinstance(replaced, str) and isinstance(content, str) and 1 <= len(content) <= len(replaced)
        case "Prepend":
            return len(str(part.get("prepend"))) <= _FEW
        case "TemplateProcessing":
            tokens, single = part.get("special_tokens"), part.get("single")
            if not isinstance(tokens, dict) or not isinstance(single, list) or len(single) > _FEW:
                return False
            named = [each["SpecialToken"]["id"] for each in single if "SpecialToken" in each]
            return all(len(tokens.get(name, {}).get("ids", ())) == 1 for name in named)
        case str(kind):
            return kind in _TAME
    # A part of a part, such as a pattern.
    return "Regex" not in part


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
            *doubled_beginnings(tokenizer, read_as_text(prompts), len(prompts)),
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


def read_as_text(prompts: Sequence[TokenizedPrompt]) -> dict[str, Sequence[int]]:
    """The tokens of those that were texts."""
    return {prompt.id: prompt.token_ids for prompt in prompts if prompt.text is not None}


def doubled_beginnings(tokenizer: TextTokenizer, prompts: Mapping[str, Sequence[int]], count: int) -> list[str]:
    """Which of `count` prompts begin with a special token twice, as a chat that was pasted as text does, in a sentence
    if there are any; `prompts` are the tokens of texts by their names."""
    found = {name: ids[0] for name, ids in prompts.items() if len(ids) > 1 and ids[0] == ids[1]}
    tokens = {name: tokenizer.backend.id_to_token(first) or "" for name, first in found.items()}
    twice = [name for name, token in tokens.items() if tokenizer.special_in(token)]
    if not twice:
        return []
    return [
        f"{len(twice)} of {count} prompts begin with {tokens[twice[0]]} twice, as their text spells out what is put "
        "before it anyway: no model has seen that in training, and what it does with its first token changes; take it "
        f"out of the text. The first is {twice[0]!r}."
    ]


def _spelled(spelled: Sequence[TokenizedPrompt], count: int) -> list[str]:
    if not spelled:
        return []
    tokens = ", ".join(sorted({token for prompt in spelled for token in prompt.special_in_text}))
    return [
        f"{len(spelled)} of {count} prompts spell out special tokens ({tokens}), which the model reads as those tokens "
        f"and not as text; the first is {spelled[0].id!r}."
    ]
