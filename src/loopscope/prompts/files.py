"""Files that hold prompts, read into records.

A `Record` is a prompt that nobody has looked at yet: its fields are judged only once it has been drawn, so that a bad
value that is not used does no harm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopscope._extras import require
from loopscope.errors import PromptError

__all__ = ["TEXT_FIELD", "Record", "read_json_lines", "read_parquet", "read_text", "read_text_lines"]

TEXT_FIELD = "text"
"""Where the records of a plain text file have their text."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """Fields under an id, and where they stand, for messages."""

    id: str
    where: str
    fields: Mapping[str, Any]


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark and with line feeds alone at line ends.

    Raises `PromptError` if the file is missing, a folder, not readable, or not UTF-8.
    """
    content = _read_bytes(path)
    start = len(_BOM) if content.startswith(_BOM) else 0
    try:
        text = content[start:].decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{path} is not UTF-8 text (byte {start + error.start} does not fit); save it as UTF-8 and try again."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text_lines(path: Path) -> list[Record]:
    """One record for each line that is not blank."""
    return [Record(f"line-{number}", f"Line {number} of {path}", {TEXT_FIELD: line}) for number, line in _lines(path)]


def read_json_lines(path: Path) -> list[Record]:
    """One record for each line that is not blank, which must hold a JSON object.

    Raises `PromptError` naming the first line that does not.
    """
    rows = []
    for number, line in _lines(path):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PromptError(
                f"Line {number} of {path} is not JSON ({_reason(error)}); "
                "a JSONL file holds one complete JSON object on each line."
            ) from error
        if not isinstance(fields, dict):
            raise PromptError(
                f"Line {number} of {path} is not a JSON object but {_json_type(fields)}; "
                'write {"question": ...} and name the field with --field question.'
            )
        rows.append((number, fields))
    return _records(rows, "Line", path)


def read_parquet(path: Path, field: str) -> list[Record]:
    """One record for each row, with the column `field` and, if there is one, the column `id`.

    Raises `MissingDependencyError` without pyarrow, `PromptError` for a damaged file or an unknown column.
    """
    _read_bytes(path, 4)
    parquet = require("pyarrow.parquet", f"The parquet file {path}")
    try:
        names = parquet.read_schema(path).names
        if field not in names:
            raise PromptError(f"{path} has no field {field!r}; its fields are {', '.join(names)}.")
        columns = [name for name in dict.fromkeys((field, "id")) if name in names]
        rows = parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise PromptError(f"{path} is not a readable parquet file ({_reason(error)}); get it again.") from error
    return _records(list(enumerate(rows, 1)), "Row", path)


def _read_bytes(path: Path, size: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(size)
    except FileNotFoundError as error:
        raise PromptError(f"The file {path} does not exist; check the path.") from error
    except IsADirectoryError as error:
        raise PromptError(f"{path} is a folder; give a file in it.") from error
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({_reason(error)}); give a file that can.") from error


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines that are not blank, numbered from 1. Only line feeds cut: JSON strings may hold other separators."""
    return [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def _records(rows: Sequence[tuple[int, dict[str, Any]]], unit: str, path: Path) -> list[Record]:
    """Records go by their own ids if every one has its own, else all of them by their number."""
    own = [str(fields["id"]) for _, fields in rows if type(fields.get("id")) in (str, int)]
    named = len(own) == len(rows) == len(set(own))
    return [
        Record(
            str(fields["id"]) if named else f"{unit.lower()}-{number}",
            f"{unit} {number} of {path}",
            fields,
        )
        for number, fields in rows
    ]


def _json_type(value: object) -> str:
    return {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def _reason(error: Exception) -> str:
    """What went wrong, on one line and without a closing stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
