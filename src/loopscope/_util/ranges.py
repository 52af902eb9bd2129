"""Types and ranges of settings, declared beside the fields: `steps: Annotated[int, Range(1)]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from loopscope._util.wording import listed
from loopscope.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Range:
    """What a number may be; of an optional number, what it may be where it is given; of a tuple, each of its entries.

    NaN is in no range, infinity in those that say so.
    """

    least: int | float | None = None
    most: int | float | None = None
    _: KW_ONLY
    above: int | float | None = None
    below: int | float | None = None
    infinite: bool = False
    """Infinity may be given, for no limit."""
    why: str = ""
    """Goes on behind a comma: `so that ...`."""

    def broken_by(self, value: int | float) -> str | None:
        """What the value must be and is not; None for a value within the range. NaN is within none."""
        if isinstance(value, int) and abs(value) > _MOST:
            return f"be at most {_MOST if self.most is None else self.most}"
        if self.above is not None and not (value > self.above and self._may_be(value)):
            if self.above == 0:
                return "be positive" if self.infinite else "be a positive finite number"
            return f"be above {self.above}"
        if self.least is not None and not value >= self.least:
            return "not be negative" if self.least == 0 else f"be at least {self.least}"
        if self.most is not None and not value <= self.most:
            return f"be at most {self.most}"
        if self.below is not None and not value < self.below:
            return f"be below {self.below}"
        return None if self._may_be(value) else "be a finite number"

    def _may_be(self, value: int | float) -> bool:
        return math.isfinite(value) or (self.infinite and not math.isnan(value))


_MOST = 2**53
"""Of whole numbers without a range of their own: what floating-point numbers can hold, and code multiply."""

Count = Annotated[int, Range(1, 10**6)]
Seed = Annotated[int, Range(0)]
Processes = Annotated[int, Range(1, 1024)]
"""Or threads."""
Positive = Annotated[float, Range(above=0)]


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raises `ConfigError` for the first field of a dataclass that is of another type than declared, or outside its
    range. A list becomes the tuple that it stands for.

    The message begins with `prefix` and the field's name, which `--` makes a flag: `--map-tokens must be at least 1`.
    """
    cls: type = type(settings)
    for name, hint in _hints(cls):
        given = getattr(settings, name)
        check_type(f"{prefix}{name.replace('_', '-') if prefix == '--' else name}", given, hint)
        if isinstance(given, list) and get_origin(_bare(hint)) is tuple:
            object.__setattr__(settings, name, tuple(given))
    for name, allowed in _ranges(cls):
        given = getattr(settings, name)
        for value in given if isinstance(given, tuple) else [given]:
            # A word, such as auto, stands for no number.
            broken = None if value is None or isinstance(value, str) else allowed.broken_by(value)
            if broken:
                shown = name.replace("_", "-") if prefix == "--" else name
                why = f", {allowed.why}" if allowed.why else ""
                raise ConfigError(f"{prefix}{shown} must {broken}{why}, got {_number(value)}.")


def check_type(name: str, value: object, hint: Any) -> None:
    """Raises `ConfigError` for what is not of the declared type, as far as that is made of plain values and paths."""
    hint = _bare(hint)
    if _fits(value, hint):
        return
    entry = _bare(get_args(hint)[0]) if get_origin(hint) is tuple else None
    if entry is not None and isinstance(value, tuple | list):
        value, hint = next((each for each in value if not _fits(each, entry)), value), entry
    raise ConfigError(f"{name} takes {listed(list(_kinds(hint)), 'or')}, got {value!r}.")


_PLAIN: dict[Any, tuple[type | UnionType, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
    Path: (str | Path, "a path"),
    NoneType: (NoneType, ""),
}
"""Of a declared type what is of it, and what to call it."""


def _bare(hint: Any) -> Any:
    return _bare(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def _fits(value: object, hint: Any) -> bool:
    hint = _bare(hint)
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in of)
    if origin is Literal:
        return isinstance(value, str | int) and value in of
    if origin is tuple:
        return isinstance(value, tuple | list) and (of[1:] != (...,) or all(_fits(each, of[0]) for each in value))
    return hint not in _PLAIN or (isinstance(value, _PLAIN[hint][0]) and (hint is bool or not isinstance(value, bool)))


def _kinds(hint: Any) -> Iterator[str]:
    hint = _bare(hint)
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        for each in get_args(hint):
            yield from _kinds(each)
    elif origin is Literal:
        yield from map(str, get_args(hint))
    elif origin is tuple:
        yield "several values, in a tuple or a list"
    elif _PLAIN[hint][1]:
        yield _PLAIN[hint][1]


def _number(value: int | float) -> str:
    """Python writes no whole number of more than 4300 digits."""
    huge = isinstance(value, int) and value.bit_length() > 200
    return f"one of about {int(value).bit_length() * 0.301:.0f} digits" if huge else str(value)


@cache
def _hints(cls: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(cls)]


@cache
def _ranges(cls: type) -> list[tuple[str, Range]]:
    """Of the fields that have one."""
    return [(name, found) for name, hint in _hints(cls) for found in _declared(hint)]


def _declared(hint: Any) -> Iterator[Range]:
    """In an annotation, wherever it stands: `Count`, `Count | None`, `tuple[Count, ...]`."""
    if isinstance(hint, Range):
        yield hint
    for part in get_args(hint):
        yield from _declared(part)
