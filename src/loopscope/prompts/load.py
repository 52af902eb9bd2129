"""From what the user gave to prompts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopscope.errors import PromptError
from loopscope.prompts.conditions import read_system_prompt
from loopscope.prompts.files import (
    TEXT_FIELD,
    Record,
    read_json_lines,
    read_parquet,
    read_text,
    read_text_lines,
)
from loopscope.prompts.presets import find_preset, preset_names
from loopscope.prompts.prompt import Prompt
from loopscope.prompts.sample import draw

__all__ = ["load_prompts"]

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
        records = [Record(f"text-{n}", f"Prompt {n} of --text", {TEXT_FIELD: each}) for n, each in enumerate(text, 1)]
        field = TEXT_FIELD
    else:
        whole = "--whole-file" if whole_file else None if chunk is None else "--chunk"
        records, field = _read(prompts, field, whole)
    system = None if system_prompt is None else read_system_prompt(system_prompt)
    drawn = records if chunk is not None else draw(records, limit=limit, seed=sample_seed)
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
    if _exists(path):
        return path
    if any(character.isspace() for character in source):
        raise PromptError(f"There is no file {_abridged(source)}; if this is a prompt itself, give it with --text.")
    if path.suffix or len(path.parts) != 1:
        raise PromptError(f"The prompt file {path} does not exist; check the path.")
    names = preset_names()
    close = difflib.get_close_matches(source.lower(), names, n=1)
    hint = f"did you mean {close[0]}, or another of" if close else "give the path of a file, or one of the presets"
    raise PromptError(f"{source!r} is neither a file nor a preset; {hint} {', '.join(names)}.")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no name of a file: a whole prompt is longer than names may be
        return False


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


def _abridged(value: object, length: int = 40) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
