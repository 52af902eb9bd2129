"""Configurations as JSON: dataclasses built from objects, field by field, and objects compared."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from loopscope._util.reading import read_json
from loopscope.errors import ConfigError

_T = TypeVar("_T")


def build(cls: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    """Build a dataclass from a JSON object; `where` names it in messages, such as "the Architecture".

    A field may be a number, a string, a boolean, one of some literals, a tuple, another dataclass, or one of several
    dataclasses that a field `kind` tells apart. Raises `ConfigError` naming the first field that is unknown, missing,
    or of the wrong type.
    """
    hints = get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ConfigError(f"Unknown field {unknown[0]!r} in {where}; known fields are {', '.join(known)}.")
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in fields:
            raise ConfigError(f"{where[0].upper()}{where[1:]} lacks the field {name!r}.")
    return cls(**{name: _value(value, hints[name], f"{name!r} of {where}") for name, value in fields.items()})


def read_object(path: Path, what: str) -> Mapping[str, Any]:
    """The JSON object in a file; `what` names it in messages, such as "training configuration".

    Raises `ConfigError` for a file that cannot be read, is not JSON, or holds something else.
    """
    try:
        fields = read_json(path)
    except OSError as error:
        raise ConfigError(
            f"The {what} {path} cannot be read ({error.strerror}); give the path of a JSON file."
        ) from error
    except ValueError as error:
        raise ConfigError(f"The {what} {path} is not valid JSON: {error}.") from error
    if not isinstance(fields, Mapping):
        raise ConfigError(f"The {what} {path} holds a JSON {type(fields).__name__}, but it must be an object.")
    return fields


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of every entry in which two nested JSON objects differ, by dotted name, in sorted order.

    An entry that is not there counts as None.
    """
    before, now = _flat(first), _flat(second)
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _value(value: Any, hint: Any, where: str) -> Any:
    """One JSON value as the annotated type."""
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
    elif get_origin(hint) is tuple:
        element, *rest = get_args(hint)
        if isinstance(value, list | tuple) and (rest == [...] or len(value) == 1 + len(rest)):
            return tuple(_value(entry, element, f"an entry of {where}") for entry in value)
    else:
        options = get_args(hint) or (hint,)
        structured = [option for option in options if dataclasses.is_dataclass(option) or get_origin(option) is tuple]
        if structured and value is not None:
            return _structured(value, structured, where)
        for option in options:
            if _is(value, option):
                return option(value) if option in (int, float) else value
    raise ConfigError(f"The field {where} must be {_describe(hint)}, got {reprlib.repr(value)}.")


def _structured(value: Any, options: list[Any], where: str) -> Any:
    """A value for which there are objects or lists to choose from."""
    if get_origin(options[0]) is tuple:
        return _value(value, options[0], where)
    if isinstance(value, options[0]):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"The field {where} must be an object, got {reprlib.repr(value)}.")
    if len(options) == 1:
        return build(options[0], value, f"the {options[0].__name__}")
    found = value.get("kind")
    for option in options:
        if option.kind == found:
            return build(option, value, f"the {option.__name__}")
    kinds = ", ".join(option.kind for option in options)
    raise ConfigError(f"The field 'kind' of {where} must be one of {kinds}, got {reprlib.repr(found)}.")


def _is(value: Any, option: Any) -> bool:
    """JSON has one kind of number: a whole float is an int where an int is asked for, and an int is a float.

    A whole number beyond the range of floats is neither.
    """
    if option not in (int, float):
        return isinstance(value, option)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int):
        return abs(value) <= sys.float_info.max
    return option is float or value.is_integer()


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_describe(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "an object"
    if hint is NoneType:
        return "null"
    options = get_args(hint)
    return " or ".join(_describe(option) for option in options) if options else str(hint.__name__)
