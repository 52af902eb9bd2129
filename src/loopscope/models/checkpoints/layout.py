"""What a checkpoint holds, from its config.json and the headers of its tensors: no weight is read for it."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopscope.errors import CheckpointError, ConfigError, UnknownFamilyError
from loopscope.models.architecture import Architecture
from loopscope.models.checkpoints.config_reader import Remaining
from loopscope.models.checkpoints.families import FAMILIES
from loopscope.models.checkpoints.family import Family, TensorSlice, parameter_shapes
from loopscope.models.checkpoints.store import READABLE, Headers, TensorStore, read_json

_LOOPED_CLASS = re.compile(r"(?i)loop|recur|cycle|ponder|universal")


@dataclass(frozen=True)
class CheckpointLayout:
    """A checkpoint of a known family in which every tensor is there, is known, and has its shape."""

    family: str
    architecture: Architecture
    parts: Mapping[str, TensorSlice]
    """Where each of our parameters lies."""
    copies: Mapping[str, str]
    """Tensors that are there and must equal another one."""
    dtypes: Mapping[str, int]
    """Bytes of weights in each dtype that they are stored in: `{"bfloat16": 2_800_000_000}`. Copies and buffers that
    are not read do not count."""
    files: tuple[str, ...]
    """Names of the files that hold the tensors."""


def read_layout(folder: Path, families: Sequence[Family] = ()) -> CheckpointLayout:
    """The layout of a checkpoint folder; `families` are asked before loopscope's own.

    Raises `CheckpointError` for a folder that is no checkpoint, a family that is not known, a setting that is not
    implemented, or a tensor that is missing, unknown, or of the wrong shape or kind of number.
    """
    return find_layout(read_json(folder / "config.json"), TensorStore(folder).headers, str(folder), families)


def find_layout(
    config: Mapping[str, Any],
    headers: Headers,
    where: str,
    families: Sequence[Family] = (),
    ignore_config: Collection[str] = (),
) -> CheckpointLayout:
    """The layout of a checkpoint whose config and headers come from anywhere; `where` names it in messages.

    `ignore_config` names fields of the config to pass over. Raises `CheckpointError` as `read_layout` does, and for one
    of these fields that the family knows, `ConfigError` for one that is not there.
    """
    family = _recognise(config, headers, where, (*families, *FAMILIES))
    remaining = Remaining(config, ignore_config)
    try:
        architecture = family.architecture(remaining)
    except ConfigError as error:
        raise CheckpointError(f"{where}/config.json: {error}") from None
    if not architecture.recurrent:
        refuse_looped_class(config, where)
    parts = family.parts(architecture, headers.keys())
    _check_parts(family, architecture, parts)
    head = family.tied_head
    copies = {}
    if head is not None and architecture.tied_embeddings and head in headers:
        copies[head] = parts["embedding.weight"].name
    _check_names(family, architecture, parts, copies, headers, where)
    _check_shapes(parts, copies, headers)
    dtypes: Counter[str] = Counter()
    for name in {part.name for part in parts.values()}:
        dtypes[headers[name].dtype] += headers[name].nbytes
    return CheckpointLayout(
        family=family.name,
        architecture=architecture,
        parts=parts,
        copies=copies,
        dtypes=dict(sorted(dtypes.items())),
        files=tuple(sorted({header.file for header in headers.values()})),
    )


def refuse_looped_class(config: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` for a model that is to be read without a loop and whose config names code of its own that
    is called like a loop's: it may have a loop that no field tells of."""
    named = [*listed(config.get("architectures")), *listed(config.get("auto_map"))]
    looped = next((name for name in named if _LOOPED_CLASS.search(name)), None)
    if looped is not None:
        raise CheckpointError(
            f"The config.json of {where} names {looped!r:.80} as what runs the model, which by its name loops, while "
            f"model_type {config.get('model_type')!r:.40} is without a loop. Load it by that code and give it to "
            "loopscope.hook; if it has no loop, correct the name."
        )


def listed(value: Any) -> list[str]:
    """The texts in a list or among the values of a mapping."""
    values = value.values() if isinstance(value, Mapping) else value
    return [each for each in values if isinstance(each, str)] if isinstance(values, Iterable) else []


def refuse_ignored(ignore_config: Collection[str], unknown: UnknownFamilyError) -> None:
    """Raise `ConfigError` for fields to pass over in a config that loopscope does not read itself."""
    if ignore_config:
        raise ConfigError(
            f"--ignore-config is for models that loopscope reads itself, and this one it does not: {unknown} Leave the "
            "option out; what runs the model then reads config.json by itself."
        )


def _recognise(config: Mapping[str, Any], names: Collection[str], where: str, families: Sequence[Family]) -> Family:
    """The family that both the config's model_type and the tensors' names belong to."""
    # Files of no library have no model_type, and name the class that read them.
    names_of_it = ("model_type", "_class_name", "model_class_name")
    model_type = next((config[name] for name in names_of_it if config.get(name)), None)
    by_type = [family for family in families if model_type in family.model_types]
    by_names = [family for family in families if family.recognises(names)]
    for family in by_type:
        if family in by_names:
            return family
    if by_type and by_names:
        raise CheckpointError(
            f"The config.json of {where} says model_type {model_type!r}, but its tensors are named as those of "
            f"{' or '.join(family.name for family in by_names)}; one of the two belongs to another model."
        )
    if len(by_type) == 1:
        return by_type[0]  # the names that do not fit are named one by one
    raise UnknownFamilyError(
        f"{where} is of no known family, by its model_type {model_type!r} and the names of its "
        f"tensors; known families are {', '.join(family.name for family in families)}."
    )


def _check_parts(family: Family, architecture: Architecture, parts: Mapping[str, TensorSlice]) -> None:
    """A family has to give every parameter as many values as it has, and to leave no row of a tensor unread."""
    ranges: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, shape in parameter_shapes(architecture).items():
        if name not in parts:
            raise CheckpointError(f"The family {family.name} says of no tensor that it holds the parameter {name!r}.")
        part = parts[name]
        start, stop = part.rows
        ranges[part.name].append((start, stop))
        if (stop - start) * math.prod(part.shape[1:]) != math.prod(shape):
            raise CheckpointError(
                f"The family {family.name} takes rows {start} to {stop} of {part.name!r}, of shape {part.shape}, for "
                f"the parameter {name!r} of shape {shape}."
            )
    for part in parts.values():
        read = 0
        for start, stop in sorted(ranges[part.name]):
            read = max(read, stop) if start <= read else read
        if read != part.shape[0]:
            raise CheckpointError(
                f"The family {family.name} says of no parameter that it lies in row {read} of {part.name!r}, of shape "
                f"{part.shape}."
            )


def _check_names(
    family: Family,
    architecture: Architecture,
    parts: Mapping[str, TensorSlice],
    copies: Collection[str],
    headers: Headers,
    where: str,
) -> None:
    wanted = {part.name for part in parts.values()}
    missing = sorted(wanted - headers.keys())
    if missing:
        raise CheckpointError(
            f"{where} lacks {_count(missing, 'tensor')} that a {family.name} model of layout {architecture.layout} "
            f"has, first {missing[0]!r}{_with_prefix(missing[0], headers)}."
        )
    unknown = sorted(name for name in headers.keys() - wanted - set(copies) if not family.unused.fullmatch(name))
    if unknown:
        raise CheckpointError(
            f"{where} holds {_count(unknown, 'tensor')} that a {family.name} model of layout {architecture.layout} "
            f"does not have, first {unknown[0]!r} (in {headers[unknown[0]].file}); it is another model than its "
            "config says."
        )


def _with_prefix(name: str, headers: Headers) -> str:
    """What stands before this name in all of the file's, said."""
    longer = next((each for each in headers if each.endswith(f".{name}")), "")
    prefix = longer.removesuffix(name)
    if not prefix or not all(each.startswith(prefix) for each in headers):
        return ""
    return f"; all of its tensors begin with {prefix!r}, without which they must be saved"


def _count(names: list[str], noun: str) -> str:
    return f"1 {noun}" if len(names) == 1 else f"{len(names)} {noun}s"


def _check_shapes(parts: Mapping[str, TensorSlice], copies: Mapping[str, str], headers: Headers) -> None:
    wanted = {part.name: part.shape for part in parts.values()}
    wanted |= {copy: wanted[original] for copy, original in copies.items()}
    for name, shape in wanted.items():
        header = headers[name]
        if header.shape != shape:
            raise CheckpointError(f"{name!r} in {header.file} has shape {header.shape}; config.json asks for {shape}.")
        if header.code not in READABLE:
            raise CheckpointError(
                f"{name!r} in {header.file} is stored as {header.dtype}; weights are read as floating-point numbers "
                "only: give the checkpoint as it was before it was quantised."
            )
