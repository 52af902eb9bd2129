"""From what the user gave to prompts, with the system prompt that stands before each."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loopscope._util.reading import is_there
from loopscope.errors import PromptError
from loopscope.prompts.prompt import Prompt, subsample
from loopscope.prompts.sources import (
    TEXT_FIELD,
    Record,
    find_preset,
    preset_names,
    read_json_lines,
    read_parquet,
    read_text,
    read_text_lines,
)
from loopscope.prompts.tokenizer import SpecialToken, TextTokenizer

SHIPPED_SYSTEM_PROMPTS: Mapping[str, str] = MappingProxyType(
    {"persona": "system_prompts/persona.txt", "maths": "system_prompts/maths.txt"}
)
"""Files of the package."""
PADDING = "padding"

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
NO_LINES = {".json": "JSON", ".csv": "a table", ".tsv": "a table"}
"""What must not be read line by line: headings, quotation marks and brackets would become part of the prompts."""


def load_prompts(
    *,
    prompts: str | None = None,
    field: str | None = None,
    text: Sequence[str] = (),
    whole_file: bool = False,
    limit: int | None = None,
    sample_seed: int | None = None,
    system_prompt: Path | None = None,
    chunk: int | None = None,
) -> list[Prompt]:
    """Read prompts from one source, and draw those to use.

    The source is `text`, a list of prompts, or `prompts`: the name of a preset, or else a file. Of a .jsonl or .parquet
    file `field` names the field that holds the prompt, as text or as a list of token ids (it replaces a preset's own);
    any other file is plain text, with a prompt on each line that is not blank, or one prompt if `whole_file`. For
    `limit` and `sample_seed` see `draw`. The file `system_prompt`, or the shipped text of that name (`persona`,
    `maths`), goes before every prompt, with a blank line between; that of `padding` is for `pad_prompts` to make, as it
    takes the model's tokenizer. With `chunk` a text file is one prompt too, which `cut_text` will cut; it is then that
    prompts are drawn.

    Raises `PromptError` for anything that cannot be read as asked, `MissingDependencyError` without the extra `hub`
    where it is needed.
    """
    if isinstance(text, str):  # whose characters would be the prompts
        raise PromptError(f"text must be a list of prompts, got the text {_abridged(text)}; put it into a list.")
    if (prompts is None) == (not text):
        given = "neither was given" if prompts is None else "both were given"
        raise PromptError(
            f"Prompts come from --prompts (a file, or a preset such as {preset_names()[0]}) or from --text, "
            f"and {given}; give one of them."
        )
    if prompts is None:
        for name, value in (("--field", field), ("--whole-file", whole_file), ("--chunk", chunk)):
            if value:
                raise PromptError(f"{name} says how to read a file, but the prompts come from --text; leave it out.")
        where = "The prompt" if len(text) == 1 else "Prompt {} of --text"
        records = [Record(f"text-{n}", where.format(n), {TEXT_FIELD: each}) for n, each in enumerate(text, 1)]
        field = TEXT_FIELD
    else:
        whole = "--whole-file" if whole_file else None if chunk is None else "--chunk"
        records, field = _read(prompts, field, whole)
    system = None if system_prompt is None else read_system_prompt(system_prompt)
    drawn = records if chunk is not None else subsample(records, limit=limit, seed=sample_seed)
    return [_prompt(record, field, system) for record in drawn]


def _read(source: str, field: str | None, whole: str | None) -> tuple[list[Record], str]:
    """Records of a file or preset, and the field that holds their prompts; `whole` is the option, if any, that takes
    the file as one text."""
    if whole and field is not None:
        raise PromptError(
            f"{whole} takes a file as one text and --field takes a field of each line; leave one of them out."
        )
    preset = find_preset(source)
    if preset is not None:
        if whole:
            raise PromptError(f"{whole} is for text files, and {source!r} is a preset; leave it out.")
        path, own_field = preset
        field = field or own_field
    else:
        path = _existing(source)
    if whole:
        return [Record("file", f"The file {path}", {TEXT_FIELD: read_text(path).strip("\n")})], TEXT_FIELD
    records, field = _read_records(path, field)
    if not records:
        raise PromptError(f"{path} holds no prompts; put one on each line.")
    return records, field


def _read_records(path: Path, field: str | None) -> tuple[list[Record], str]:
    kind = path.suffix.lower()
    if kind == PARQUET:
        if field is None:
            raise PromptError(f"{path} is a table; name the column that holds the prompts with --field.")
        return read_parquet(path, field), field
    if field is not None:
        return read_json_lines(path), field
    if kind in JSON_LINES:
        records = read_json_lines(path)
        names = ", ".join(records[0].fields) if records else "none, as the file is empty"
        raise PromptError(f"{path} is JSONL; name the field that holds the prompts with --field (there are: {names}).")
    if kind in NO_LINES:
        raise PromptError(
            f"{path} is {NO_LINES[kind]}, of which a line is no prompt; write one JSON object a line (.jsonl) and name "
            "the field with --field, or take the file as one text with --whole-file."
        )
    return read_text_lines(path), TEXT_FIELD


def _existing(source: str) -> Path:
    """The file that the user named, or the reason why it is none."""
    path = Path(source).expanduser()
    if is_there(path):
        return path
    if any(character.isspace() for character in source):
        raise PromptError(f"There is no file {_abridged(source)}; if this is a prompt itself, give it with --text.")
    if path.suffix or len(path.parts) != 1:
        raise PromptError(f"The prompt file {path} does not exist; check the path.")
    names = preset_names()
    close = difflib.get_close_matches(source.lower(), names, n=1)
    hint = f"did you mean {close[0]}, or another of" if close else "give the path of a file, or one of the presets"
    raise PromptError(f"{source!r} is neither a file nor a preset; {hint} {', '.join(names)}.")


def _prompt(record: Record, field: str, system: str | None) -> Prompt:
    if field not in record.fields:
        names = ", ".join(record.fields) or "none"
        raise PromptError(f"{record.where} has no field {field!r}; its fields are {names}.")
    value: Any = record.fields[field]
    named = record.where if field == TEXT_FIELD and len(record.fields) == 1 else f"{record.where}, field {field!r},"
    if isinstance(value, str):
        _check_text(value, named)
        return Prompt(record.id, text=value, system=system)
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return Prompt(record.id, token_ids=tuple(value), system=system)
    raise PromptError(f"{named} must be text or a list of token ids (whole numbers from 0), got {_abridged(value)}.")


def _check_text(text: str, where: str) -> None:
    if not text.strip():
        raise PromptError(f"{where} is empty or blank; a prompt needs at least one word, so fill it in or take it out.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} holds half of a character (a lone surrogate, character {error.start}), which is no valid text; "
            "write the character itself."
        ) from error


def system_prompt_names() -> list[str]:
    """Every name that --system-prompt takes."""
    return [*SHIPPED_SYSTEM_PROMPTS, PADDING]


def read_system_prompt(source: Path) -> str | None:
    """The text of a shipped system prompt or a file; None for `padding`, which needs a tokenizer (see `pad_prompts`).

    A name goes before a file that is called the same. Raises `PromptError` for a file that is missing or empty.
    """
    name = str(source)
    if name == PADDING:
        return None
    if name in SHIPPED_SYSTEM_PROMPTS:
        return _shipped(name)
    if not is_there(source) and len(source.parts) == 1 and not source.suffix:
        raise PromptError(
            f"{name!r} is neither a file nor the name of a system prompt; give the path of a file, or one of "
            f"{', '.join(system_prompt_names())}."
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
    file = resources.files("loopscope.prompts").joinpath(SHIPPED_SYSTEM_PROMPTS[name])
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


def _abridged(value: object, length: int = 40) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
