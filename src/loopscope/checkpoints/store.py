"""The tensors of a checkpoint folder, in one file or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopscope.checkpoints.conversion import conversion_command, is_pickled
from loopscope.checkpoints.headers import READABLE, TensorHeader
from loopscope.errors import CheckpointError

__all__ = ["TensorStore", "read_json"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; `CheckpointError` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder that holds the checkpoint's config.json."
        ) from None
    except (ValueError, RecursionError) as error:  # of these, the second is what endless brackets give
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got a {type(content).__name__}.")
    return content


class TensorStore:
    """Tensors by name, read when asked for.

    Raises `CheckpointError` for a folder without safetensors, a damaged or truncated file, or an index that does not
    fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        self._offsets: dict[str, int] = {}
        for path in self._paths():
            for name, header, offset in _read_header(path):
                if name in self.headers:
                    raise CheckpointError(
                        f"The tensor {name!r} is in both {self.headers[name].file} and {path.name}; one of "
                        f"them is left over."
                    )
                self.headers[name] = header
                self._offsets[name] = offset
        self._check_index()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor of floating-point numbers, in the dtype it is stored in.

        They are read, not mapped: pages of a mapping count as memory of the process, which would come to hold the
        checkpoint a second time, and files that are larger than the memory cannot be mapped everywhere.
        """
        header = self.headers[name]
        path = self.folder / header.file
        width = header.nbytes // header.shape[0]
        content = bytearray((stop - start) * width)
        with _reading(path), path.open("rb") as file:
            file.seek(self._offsets[name] + start * width)
            count = file.readinto(content)
        if count != len(content):
            raise CheckpointError(f"{path} ends within {name!r}; copy or download it again.")
        dtype = getattr(torch, READABLE[header.code])
        return torch.frombuffer(content, dtype=dtype).view(stop - start, *header.shape[1:])

    def sha256(self) -> str:
        """Hash of the files' contents: of the file where there is one, of the files' hashes in order of name
        otherwise.
        """
        digests = []
        for path in self._paths():
            with _reading(path), path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def _paths(self) -> list[Path]:
        index = self.folder / _INDEX
        if index.exists():
            names = sorted({str(name) for name in self._index().values()})
            for name in names:
                if not (self.folder / name).is_file() or Path(name).name != name:
                    raise CheckpointError(f"{index} names the file {name!r}, which is not in {self.folder}.")
            return [self.folder / name for name in names]
        single = self.folder / _SINGLE
        if single.is_file():
            return [single]
        pickled = sorted(path.name for path in self.folder.iterdir() if is_pickled(path.name))
        if pickled:
            raise CheckpointError(
                f"{self.folder} holds {pickled[0]} and no {_SINGLE}; pickle files can run code and are not read: "
                f"convert it with {conversion_command(self.folder, pickled)}"
            )
        raise CheckpointError(f"{self.folder} has no {_SINGLE} (and no {_INDEX}).")

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


def _read_header(path: Path) -> Iterator[tuple[str, TensorHeader, int]]:
    """Name, header and offset in bytes of each tensor of a file.

    The library checks the file: that its header is sound, and that the tensors fill the rest of it without gaps. As it
    does not tell where they lie, the header is then read again: its length in eight bytes, and JSON.
    """
    with _reading(path):
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
    for name, entry in entries.items():
        if name != "__metadata__":
            header = TensorHeader(tuple(entry["shape"]), entry["dtype"], path.name)
            yield name, header, 8 + length + entry["data_offsets"][0]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy or download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
