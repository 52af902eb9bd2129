"""What of a checkpoint the code of transformers would pass over without a word: stored numbers, and fields."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from loopscope.errors import CheckpointError
from loopscope.models.checkpoints.layout import listed, refuse_looped_class
from loopscope.models.checkpoints.store import READABLE, Headers
from loopscope.models.hooks.how_often import LOOPS

_NARROW = re.compile(r"F8_|F4|F6")
"""How safetensors names the numbers that only a scale beside them makes weights of."""


def check_foreign(config: Mapping[str, Any], headers: Headers, known: Any, where: str) -> None:
    """`known` is the configuration as transformers has read it. Raises `CheckpointError` for weights that are stored as
    whole numbers or in eight bits and would be taken as they are, and for a field that is named like a number of loops
    and that the configuration's class does not have, or code of another name that is called like a loop's: the model
    may loop, and the code of transformers does not."""
    for name, header in headers.items():
        whole = header.code not in READABLE and name.endswith("weight")
        if (whole or _NARROW.match(header.code)) and not config.get("quantization_config"):
            raise CheckpointError(
                f"{name!r} in {header.file} is stored as {header.dtype}; weights are read as floating-point numbers "
                "only: give the checkpoint as it was before it was quantised."
            )
    if not any(hasattr(sys.modules["transformers"], name) for name in listed(config.get("architectures"))):
        refuse_looped_class(config, where)
    for field, value, kind in _unknown(config, known):
        if (
            LOOPS.search(field)
            and isinstance(value, int | float | str | list | dict)
            and value not in (0, 1, "", [], {})
        ):
            raise CheckpointError(
                f"config.json sets {field} = {value!s:.40}, which {kind} of transformers does not know: the model may "
                "loop, and the code of transformers would run it without a loop. Load it by its own code and give it "
                "to loopscope.hook; if the field says nothing of the model, take it out of config.json."
            )


def _unknown(config: Mapping[str, Any], known: Any) -> Iterator[tuple[str, Any, str]]:
    """Fields that the configuration's class does not have, with their values and its name."""
    with suppress(Exception):  # a class that cannot be made without arguments says nothing
        there = {*type(known)().to_dict(), *type(known).attribute_map}
        yield from ((name, value, type(known).__name__) for name, value in config.items() if name not in there)
    for name, part in config.items():
        if isinstance(part, Mapping) and hasattr(getattr(known, name, None), "to_dict"):
            yield from _unknown(part, getattr(known, name))


def reason_of(error: Exception) -> str:
    """The first line of an error of another library, and the next one where the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
