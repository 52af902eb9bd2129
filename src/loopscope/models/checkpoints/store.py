"""The tensors of a checkpoint folder, in one file or several."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from loopscope._util import reading
from loopscope._util.reading import foreign, is_there, open_file, parse_json
from loopscope.errors import CheckpointError
from loopscope.models.checkpoints.find import conversion_command, is_pickled

READABLE = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Kinds of numbers that weights are read from, as safetensors spells them and as we do."""

_OTHER = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"} | {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
"""Of one number, by safetensors' spelling; 1 for others."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.")
"""Before the names of all tensors: of torch.compile, DataParallel, PEFT and FSDP."""
_AROUND_MODULES = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Within them too, where torch has wrapped single modules."""

ValueT = TypeVar("ValueT")
_Version = tuple[int, int, int]
"""Inode, size and time of the last change: another file, or another content, has another one."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One entry of a header."""

    shape: tuple[int, ...]
    code: str
    """Kind of numbers as safetensors spells it: F32, BF16."""
    file: str
    """Name of the file that holds the tensor."""

    @property
    def dtype(self) -> str:
        """Kind of numbers as torch spells it: float32, bfloat16."""
        return (READABLE | _OTHER).get(self.code, self.code)

    @property
    def nbytes(self) -> int:
        """Size in the file; kinds that are not listed here have a byte for each number."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.code, 1)


Headers = Mapping[str, TensorHeader]
"""All tensors of a checkpoint, by name."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; `CheckpointError` where there is none."""
    try:
        content = reading.read_json(path)
    except FileNotFoundError:
        advice = _inside(path.parent) or "; give the folder that holds the checkpoint's config.json"
        raise CheckpointError(f"{path.parent} has no {path.name}{advice}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _inside(folder: Path) -> str:
    """Where the checkpoint may be that is not in this folder, for the end of a message."""
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    if snapshots:
        return f"; it is a folder of the hub's cache, so give the version in it, {snapshots[-1]}"
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    return f"; give {inside[0]}, if that is the model" if inside else ""


def refuse_adapter(folder: Path) -> None:
    """Raise `CheckpointError` where the weights of a folder are not all of its model."""
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({_ADAPTER}), without which it is another model and which is not applied: "
            "merge it into the weights (PEFT's merge_and_unload) and give that folder."
        )


def without_wrappers(tensors: Mapping[str, ValueT]) -> tuple[dict[str, ValueT], tuple[str, ...]]:
    """The same by names without those of wrappers that the model was saved in, and regular expressions of which each is
    to be left out of a name once. Raises `CheckpointError` where two names would be one."""
    prefix = ""
    while tensors and (
        found := next((one for one in _WRAPPERS if all(name.startswith(prefix + one) for name in tensors)), None)
    ):
        prefix += found
    cut = {name: _AROUND_MODULES.subn("", name.removeprefix(prefix)) for name in tensors}
    short = {name: own for name, (own, _) in cut.items()}
    if len(set(short.values())) < len(short):
        name = next(name for name, count in Counter(short.values()).items() if count > 1)
        both = " and ".join(repr(long) for long in short if short[long] == name)
        raise CheckpointError(
            f"{both} are one tensor by their names without those of wrappers; save the model again, without what is "
            "left over."
        )
    most = max((count for _, count in cut.values()), default=0)
    # With comments, so that they are not the same.
    around = (f"{_AROUND_MODULES.pattern}(?#{time})" for time in range(most))
    expressions = (*((f"^{re.escape(prefix)}",) if prefix else ()), *around)
    return {short[name]: value for name, value in tensors.items()}, expressions


class TensorStore:
    """Tensors by name, read when asked for.

    Raises `CheckpointError` for a folder without safetensors, with two sets of them or with an adapter, a damaged or
    truncated file, an index that does not fit, and, whenever it reads, a file that is no longer the one whose header
    was read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_adapter(folder)
        self.headers: dict[str, TensorHeader] = {}
        self._offsets: dict[str, int] = {}
        self._versions: dict[str, _Version] = {}
        for path in self._paths():
            self._versions[path.name], entries = _read_header(path)
            for name, header, offset in entries:
                if name in self.headers:
                    raise CheckpointError(
                        f"The tensor {name!r} is in both {self.headers[name].file} and {path.name}; one of "
                        f"them is left over."
                    )
                self.headers[name] = header
                self._offsets[name] = offset
        self._check_index()
        self._offsets, _ = without_wrappers(self._offsets)
        self.headers, self.wrappers = without_wrappers(self.headers)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor of floating-point numbers, in the dtype it is stored in.

        They are read, not mapped: pages of a mapping count as memory of the process, which would come to hold the
        checkpoint a second time, and files that are larger than the memory cannot be mapped everywhere.
        """
        header = self.headers[name]
        path = self.folder / header.file
        width = header.nbytes // header.shape[0]
        content = bytearray((stop - start) * width)
        with self._open(path) as file:
            file.seek(self._offsets[name] + start * width)
            file.readinto(content)
        dtype = getattr(torch, READABLE[header.code])
        return torch.frombuffer(content, dtype=dtype).view(stop - start, *header.shape[1:])

    def sha256(self) -> str:
        """Hash of the files' contents: of the file where there is one, of the files' hashes in order of name
        otherwise.
        """
        digests = []
        for path in self._paths():
            with self._open(path) as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @contextmanager
    def _open(self, path: Path) -> Iterator[BufferedReader]:
        """A file, which must not have been changed since its header was read, nor be changed while it is open.

        A training run may write its next checkpoint over the one that is being loaded, whose values would then be read
        from where the tensors used to lie.
        """
        with _reading(path), open_file(path) as file:
            before = _version(file)
            yield file
            if not before == _version(file) == self._versions.get(path.name):
                raise CheckpointError(f"{path} was changed while it was being read; load it again when it is complete.")

    def _paths(self) -> list[Path]:
        single, index = self.folder / _SINGLE, self.folder / _INDEX
        if index.exists():
            names = sorted({str(name) for name in self._index().values()})
            for name in names:
                if Path(name).name != name or not is_there(self.folder / name):
                    raise CheckpointError(f"{index} names the file {name!r}, which is not in {self.folder}.")
            if single.is_file() and _SINGLE not in names:
                raise CheckpointError(
                    f"{self.folder} holds both {_SINGLE} and {_INDEX}, which names other files; one of them is left "
                    "over, so take it away."
                )
            return [self.folder / name for name in names]
        if single.is_file():
            return [single]
        if single.is_symlink():
            raise CheckpointError(f"{single} is a link to a file that is not there; download or copy it again.")
        pickled = sorted(path.name for path in self.folder.iterdir() if is_pickled(path.name))
        if pickled:
            raise CheckpointError(
                f"The folder holds {pickled[0]} and no {_SINGLE}; pickle files can run code and are not read: "
                f"convert it with {conversion_command(self.folder, pickled)}"
            )
        raise CheckpointError(f"{self.folder} has no {_SINGLE} (and no {_INDEX}){self._instead()}.")

    def _instead(self) -> str:
        """What there is in their place, and what to do."""
        others = sorted(path.name for path in self.folder.glob("*.safetensors") if path.is_file())
        if any(name.startswith("adapter") for name in others):
            return (
                f"; {others[0]} is an adapter, which is not applied: merge it into the weights (PEFT's "
                "merge_and_unload) and give that folder"
            )
        if len(others) == 1:
            return f"; if {others[0]} holds all of the weights, rename it to {_SINGLE}"
        if others:
            return (
                f"; there are {', '.join(others[:3])}{' and others' if len(others) > 3 else ''}, and no index of them"
            )
        return _inside(self.folder)

    def _index(self) -> dict[str, str]:
        index = read_json(self.folder / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{self.folder / _INDEX} has no weight_map; download it again.")
        return index

    def _check_index(self) -> None:
        if not (self.folder / _INDEX).exists():
            return
        for name, file in self._index().items():
            if name not in self.headers or self.headers[name].file != file:
                raise CheckpointError(
                    f"{_INDEX} says that {name!r} is in {file}, where it is not; download both again."
                )


def _version(file: BufferedReader) -> _Version:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_header(path: Path) -> tuple[_Version, list[tuple[str, TensorHeader, int]]]:
    """The file's version, and name, header and offset in bytes of each of its tensors.

    The library checks the file: that its header is sound, and that the tensors fill the rest of it without gaps. As it
    does not tell where they lie, the header is then read again: its length in eight bytes, and JSON.
    """
    # Our own way of opening first, as it opens nothing but files.
    with _reading(path), open_file(path) as file, foreign():
        try:
            with safe_open(path, framework="numpy"):
                pass
        except MemoryError:
            raise CheckpointError(
                f"{path} cannot be looked at within this process's limit on addresses (ulimit -v), which has to be "
                "larger than the file whatever is loaded of it; raise it."
            ) from None
        version = _version(file)
        length = int.from_bytes(file.read(8), "little")
        entries = parse_json(file.read(length).decode())
    return version, [
        (name, TensorHeader(tuple(entry["shape"]), entry["dtype"], path.name), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy or download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
