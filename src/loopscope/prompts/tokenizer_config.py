"""What lies beside a tokenizer.json: tokenizer_config.json, special_tokens_map.json, chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from loopscope._util.reading import read_json, read_text
from loopscope.errors import PromptError, one_line

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that have names, under which chat templates use them."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The settings of a tokenizer that count, all of them optional.

    They are read as transformers 5 reads them: the tokens of special_tokens_map.json count only where
    tokenizer_config.json has no `added_tokens_decoder`, and chat_template.jinja goes before a template in
    tokenizer_config.json.
    """

    named: Mapping[str, str]
    """`bos_token` and so on, those that there are."""
    tokens: tuple[AddedToken, ...]
    """Every token that is declared, in the order in which those without an id yet get theirs."""
    add_bos: bool | None
    add_eos: bool | None
    chat_template: str | None
    notes: tuple[str, ...]
    """What a user should know about these files, in sentences."""

    @classmethod
    def read(cls, folder: Path) -> TokenizerConfig:
        """Read what there is; raises `PromptError` for a file that is there and makes no sense."""
        config = _read_object(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_object(folder / "special_tokens_map.json")
        template, notes = _chat_template(folder, config)
        named = {name: text for name in _NAMED if (text := _content(config.get(name))) is not None}
        return cls(
            named=named,
            tokens=tuple(_declared(config, named, folder)),
            add_bos=_flag(config, "add_bos_token"),
            add_eos=_flag(config, "add_eos_token"),
            chat_template=template,
            notes=tuple(notes),
        )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} is not readable JSON ({one_line(error)}); get the file again.") from error
    if not isinstance(content, dict):
        raise PromptError(f"{path} must hold a JSON object, got a {type(content).__name__}; get the file again.")
    return content


def _content(token: object) -> str | None:
    """The text of a token, which files give as text or as an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    return value if isinstance(value, bool) else None


def _declared(config: Mapping[str, Any], named: Mapping[str, str], folder: Path) -> list[AddedToken]:
    tokens: list[AddedToken] = []
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        try:
            tokens += [_added_token(decoder[id_]) for id_ in sorted(decoder, key=int)]
        except (KeyError, TypeError, ValueError) as error:
            raise PromptError(
                f"{folder / 'tokenizer_config.json'} has an unreadable added_tokens_decoder ({one_line(error)}); get "
                "the file again."
            ) from error
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    listed = extra.values() if isinstance(extra, Mapping) else extra if isinstance(extra, list) else []
    known = {token.content for token in tokens}
    texts = [*named.values(), *(text for token in listed if (text := _content(token)) is not None)]
    return tokens + [
        AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(texts) if text not in known
    ]


def _added_token(fields: Mapping[str, Any]) -> AddedToken:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(fields["content"], **{name: bool(fields[name]) for name in names if name in fields})


def _chat_template(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The default template, and sentences about what was passed over."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_text(file), []
        except (OSError, ValueError) as error:
            raise PromptError(f"{file} is not readable text ({one_line(error)}); get the file again.") from error
    given = config.get("chat_template")
    if given is None:
        given = _read_object(folder / "chat_template.json").get("chat_template")
    if given is None or isinstance(given, str):
        return given, []
    templates = {}
    if isinstance(given, list) and all(isinstance(entry, Mapping) for entry in given):
        templates = {str(entry.get("name")): entry.get("template") for entry in given}
    default = templates.get("default")
    if isinstance(default, str):
        return default, []
    names = ", ".join(str(name) for name in templates) or "none that can be read"
    return None, [f"Of the chat templates of the model ({names}) none is named default, so none can be used."]
