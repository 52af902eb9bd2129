"""Files that hold prompts, read into records.

A `Record` is a prompt that nobody has looked at yet: its fields are judged only once it has been drawn, so that a bad
value that is not used does no harm.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loopscope._util.hub import downloading, require
from loopscope._util.reading import foreign, parse_json, read_bytes
from loopscope.errors import PromptError, one_line

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
            fields = parse_json(line)
        except ValueError as error:
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
    content = io.BytesIO(_read_bytes(path))
    parquet = require("pyarrow.parquet", f"The parquet file {path}")
    try:
        with foreign():
            names = parquet.read_schema(content).names
            if field not in names:
                raise PromptError(f"{path} has no field {field!r}; its fields are {', '.join(names)}.")
            columns = [name for name in dict.fromkeys((field, "id")) if name in names]
            rows = parquet.read_table(content, columns=columns).to_pylist()
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} is not a readable parquet file ({_reason(error)}); get it again.") from error
    return _records(list(enumerate(rows, 1)), "Row", path)


def _read_bytes(path: Path) -> bytes:
    try:
        return read_bytes(path)
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
    return one_line(error)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One data file, of the package or of a dataset repository. Files, not loading scripts: no code of a dataset ever
    runs."""

    file: str
    field: str
    repo: str = ""
    """On the hub; empty for a file of the package."""
    revision: str = ""
    """A commit, so that the prompts stay what they are, and a cached copy is used without asking the network."""


SHIPPED_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "word-problems": Preset(file="demo/prompts/word-problems.jsonl", field="question"),
        "gsm8k-64": Preset(file="demo/prompts/gsm8k-64.jsonl", field="question"),
    }
)

HUB_PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "gsm8k": Preset(
            repo="openai/gsm8k",
            revision="740312add88f781978c0658806c59bc2815b9866",
            file="main/test-00000-of-00001.parquet",
            field="question",
        ),
        "svamp": Preset(
            repo="ChilleD/SVAMP",
            revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef",
            file="data/test-00000-of-00001.parquet",
            field="question_concat",
        ),
        "aqua": Preset(
            repo="deepmind/aqua_rat",
            revision="33301c6a050c96af81f63cad5562cb5363e88971",
            file="raw/test-00000-of-00001.parquet",
            field="question",
        ),
        "math500": Preset(
            repo="HuggingFaceH4/MATH-500",
            revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
            file="test.jsonl",
            field="problem",
        ),
        "arc-challenge": Preset(
            repo="allenai/ai2_arc",
            revision="210d026faf9955653af8916fad021475a3f00453",
            file="ARC-Challenge/test-00000-of-00001.parquet",
            field="question",
        ),
        "humaneval": Preset(
            repo="openai/openai_humaneval",
            revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
            file="openai_humaneval/test-00000-of-00001.parquet",
            field="prompt",
        ),
    }
)


def preset_names() -> list[str]:
    """Every name that --prompts takes, the shipped ones first."""
    return [*SHIPPED_PRESETS, *HUB_PRESETS]


def find_preset(name: str) -> tuple[Path, str] | None:
    """The preset's file, downloaded if it is not cached, and the field that holds its prompts; None for other names.

    Raises `MissingDependencyError` without the extra `hub`, `PromptError` if the hub cannot be reached or no longer has
    the file.
    """
    if name in SHIPPED_PRESETS:
        shipped = SHIPPED_PRESETS[name]
        return Path(str(resources.files("loopscope").joinpath(shipped.file))), shipped.field
    if name in HUB_PRESETS:
        return _download(name, HUB_PRESETS[name]), HUB_PRESETS[name].field
    return None


def _download(name: str, preset: Preset) -> Path:
    purpose = f"The preset {name!r}"
    hub = require("huggingface_hub", purpose)
    if preset.file.endswith(".parquet"):
        require("pyarrow", purpose)  # before the download, which would be in vain without it
    copy = f"give a copy of it with --prompts FILE --field {preset.field}"
    with downloading(purpose, preset.repo, error=PromptError, otherwise=copy, revision=preset.revision):
        path = hub.hf_hub_download(preset.repo, preset.file, revision=preset.revision, repo_type="dataset")
    return Path(path)
