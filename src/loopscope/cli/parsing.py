"""From a command line to a command: which one is meant, what it takes, and what is said of what it does not take."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
import re
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from loopscope.errors import ConfigError


@runtime_checkable
class Command(Protocol):
    """What the parser makes of a command line."""

    def run(self) -> None: ...


Commands = Mapping[str, "type[Command] | Commands"]
"""Of a word its command, or those that it stands before."""

_SPELLINGS = {"analyse": "analyze", "behavior": "behaviour"}
_ALIASES = {"out": ("-o", "--output")}
_REPEATED = ("intervene", "ignore_config", "set")
"""Options of one value, which are given several times for several."""
_FOLDER = re.compile(r"(The --out f|F)olders?\b")
"""How the help of an option begins that takes folders."""
_METAVARS = {
    **dict.fromkeys(("model", "models"), "MODEL"),
    **dict.fromkeys(("text", "prompt"), "TEXT"),
    **dict.fromkeys(("exit", "rule"), "RULE"),
    **{"address": "HOST:PORT", "track": "PROMPT:TOKEN", "set": "NAME=VALUE", "intervene": "CHANGE"},
}
_METAVARS_BY_TYPE: dict[Any, str] = {int: "N", float: "X", str: "NAME", Path: "FILE"}
_POSITIONAL = get_args(tyro.conf.Positional[int])[1]
_PLAIN: dict[str, str | Callable[[re.Match[str]], str]] = {
    r"Unrecognized options: ([^-].*)": r"No option takes \1; what belongs to none comes before the options",
    r"Error parsing (\S+): invalid literal for int\(\) with base 10: ": r"\1 takes a whole number, got ",
    r"Error parsing (\S+): could not convert string to float: ": r"\1 takes a number, got ",
    r"Error parsing (\S+): no type matching (.+) could be instantiated from \[(.*)\]": lambda said: (
        f"{said[1]} takes {_types(said[2])}, got {said[3]}"
    ),
    r"invalid choice '(.*)' for argument '(\S+)'. Expected one of \((.*)\)": lambda said: (
        f"{said[2]} takes one of {_sorted(said[3])}, got {said[1]!r}"
    ),
}
"""What the parser says of values in Python's terms, and the same in plain words."""
_TYPES = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}


def parse(commands: Commands, arguments: list[str]) -> Command | None:
    """The command that a command line asks for; None where it asks for a list of them, which is then printed.

    Raises `ConfigError` for a command or an option that does not exist, with the nearest ones, and for wrong values;
    exits with 0 once a command's help was printed.
    """
    words = ["loopscope"]
    while True:
        word = _SPELLINGS.get(arguments[0], arguments[0]) if arguments else "--help"
        arguments = arguments[1:]
        if word in ("-h", "--help"):
            _print(words, commands)
            return None
        if word not in commands:
            near = difflib.get_close_matches(word, commands, n=2)
            meant = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(commands)}."
            raise ConfigError(f"{' '.join(words)} has no command {word!r}; {meant}")
        found = commands[word]
        words.append(word)
        if isinstance(found, type):
            return _parsed(found, " ".join(words), arguments)
        commands = found


def options(command: object, *others: str) -> dict[str, Any]:
    """What a command hands on as it is: all of its fields but for some, by name."""
    fields = [field.name for field in dataclasses.fields(cast(Any, command))]
    return {name: getattr(command, name) for name in fields if name not in others}


def _parsed(cls: type[Command], name: str, arguments: list[str]) -> Command:
    flags = ["--help", *_flags(cls)]
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--model" and flag not in flags and {"model", "models"} & set(get_type_hints(cls)):
            model = [value] if equals else arguments[place + 1 : place + 2]
            # First, since behind another option it could be one more value of that.
            arguments = [*model, *arguments[:place], *arguments[place + (1 if equals else 2) :]]
        elif flag.startswith("--") and flag.replace("_", "-") not in flags:
            begun = [each for each in flags if each.startswith(flag)]
            near = list(dict.fromkeys([*begun, *difflib.get_close_matches(flag, flags, cutoff=0.5)]))[:3]
            nearest = f"The nearest are {', '.join(near)}.\n" if near else ""
            raise ConfigError(f"{name} has no option {flag}.\n{nearest}All of them: {name} --help")
    arguments = _gathered(arguments, set(flags), set(_flags(cls, lists=True)))
    said, registry = io.StringIO(), ConstructorRegistry()
    registry.struct_rule(_Options())
    try:
        with redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that what is None unless given is of another type
            found = tyro.cli(cls, prog=name, args=arguments, config=(tyro.conf.OmitArgPrefixes,), registry=registry)
            return cast(Command, _at_home(found))
    except SystemExit as stopped:
        if not stopped.code:
            raise
        # The parser draws a box: a title, what is wrong, and then what it all means.
        lines = (line.strip("│|╭╮╰╯+ ") for line in said.getvalue().splitlines()[1:])
        wrong = re.split(
            r" Got errors: | Argument helptext: | For full helptext",
            " ".join(line for line in lines if re.search(r"\w", line)),
        )[0]
        wrong = wrong.replace("{None}|", "").replace(" (required)", "").rstrip(".")
        for said_so, instead in _PLAIN.items():
            wrong = re.sub(said_so, instead, wrong)
        raise ConfigError(f"{wrong}; `{name} --help` lists all options.") from None


def _at_home(given: Any) -> Any:
    """With paths whose `~` no shell has replaced, as in `--out=~/study`."""
    if isinstance(given, Path):
        return Path(os.path.expanduser(given))  # noqa: PTH111 (which leaves what is nobody's home)
    if isinstance(given, tuple):
        return tuple(map(_at_home, given))
    if dataclasses.is_dataclass(given) and not isinstance(given, type):
        names = [field.name for field in dataclasses.fields(given) if field.init]
        return dataclasses.replace(given, **{name: _at_home(getattr(given, name)) for name in names})
    return given


def _sorted(choices: str) -> str:
    """The parser gives them in quotes and in any order."""
    return ", ".join(sorted(re.findall(r"'([^']+)'", choices)))


def _types(types: str) -> str:
    """As the parser writes them, such as `INT|{auto}`."""
    return " or ".join(_TYPES.get(each, each.strip("{}").replace(",", ", ")) for each in types.strip("()").split("|"))


def _gathered(arguments: list[str], flags: set[str], lists: set[str]) -> list[str]:
    """With all values of a list behind its option once, where it is given several times: the parser keeps the last."""
    others: list[str] = []
    values: dict[str, list[str]] = {}
    taking, repeated = others, False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        if flag in lists:
            repeated |= flag in values
            taking = values.setdefault(flag, [])
            if equals:
                taking.append(value)
                taking = others  # `--text=a` takes no more
        else:
            taking = others if flag in flags else taking
            taking.append(argument)
    return [*others, *(each for flag in values for each in (flag, *values[flag]))] if repeated else arguments


def _flags(cls: type, *, lists: bool = False) -> Iterator[str]:
    """Every option of a command that begins with two dashes, or those alone that take several values at once."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(kind):
            yield from _flags(cast(type, kind), lists=lists)
        elif _POSITIONAL not in extras and (not lists or (get_origin(kind) is tuple and name not in _REPEATED)):
            flag = name.replace("_", "-")
            yield from (f"--{flag}", *_ALIASES.get(name, ()), *([f"--no-{flag}"] if kind is bool else []))


def _print(words: list[str], commands: Commands) -> None:
    """What there is, a line or two each."""
    print(f"usage: {' '.join(words)} COMMAND ...   (of each: {' '.join(words)} COMMAND --help)\n")
    column = max(map(len, commands)) + 4
    for name, command in commands.items():
        about = command.__doc__ or "" if isinstance(command, type) else f"One of {', '.join(command)}."
        sentence = " ".join(about.split("\n\n")[0].split())
        lines = textwrap.wrap(sentence, min(shutil.get_terminal_size().columns, 100) - column)
        print(f"  {name}".ljust(column) + f"\n{' ' * column}".join(lines))


class _Options:
    """Dataclasses as tyro reads them, with names of values that say something, and without a word of None."""

    asking = False
    """tyro itself, which asks this rule again."""

    def __call__(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if self.asking or not dataclasses.is_dataclass(info.type):
            return None
        self.asking = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            self.asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(map(_as_option, spec.fields)))


def _as_option(field: StructFieldSpec) -> StructFieldSpec:
    kind, *extras = get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
    if dataclasses.is_dataclass(kind):
        return field
    if get_origin(kind) in (Union, UnionType):
        kind = Union[tuple(each for each in get_args(kind) if each is not type(None))]  # noqa: UP007 (made of a tuple)
    entry = get_args(kind)[0] if get_origin(kind) is tuple else kind
    while get_origin(entry) is Annotated:
        entry = get_args(entry)[0]
    helptext = field.helptext() if callable(field.helptext) else field.helptext
    text = " ".join((helptext or "").split())
    metavar = _METAVARS.get(field.name, _METAVARS_BY_TYPE.get(entry))
    if entry is Path and _FOLDER.match(text):
        metavar = "DIR"
    if get_origin(entry) is Literal:
        metavar = f"{{{','.join(map(str, get_args(entry)))}}}"
    if metavar and get_origin(kind) is tuple and field.name not in _REPEATED:
        metavar += " ..."
    hint = "" if field.default in (None, (), False) else "(the default)" if field.default is True else _default_of
    option = tyro.conf.arg(metavar=metavar, aliases=_ALIASES.get(field.name), help_behavior_hint=hint)
    repeated = [get_args(tyro.conf.UseAppendAction[int])[1]] if field.name in _REPEATED else []
    return dataclasses.replace(
        field,
        type=Annotated[(kind, *extras, option, *repeated)],  # type: ignore[arg-type]
        helptext=text,
    )


def _default_of(shown: str) -> str:
    """A list that is required has nothing for its default."""
    return f"(default: {shown})" if shown else "(required)"
