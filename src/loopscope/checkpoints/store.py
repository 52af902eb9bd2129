"""The tensors of a checkpoint folder, memory-mapped, in one file or several."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopscope.checkpoints.conversion import conversion_command, is_pickled
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
        self._files: dict[str, Any] = {}
        self._place: dict[str, Path] = {}
        for path in self._paths():
            handle = self._open(path)
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if name in self._place:
                    raise CheckpointError(
                        f"The tensor {name!r} is in both {self._place[name].name} and {path.name}; one of "
                        f"them is left over."
                    )
                self._place[name] = path
            self._files[path.name] = handle
        self._check_index()

    @property
    def names(self) -> list[str]:
        """Sorted names of all tensors."""
        return sorted(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored, without reading the values."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of a tensor, in the dtype it is stored in."""
        rows: Tensor = self._file(name).get_slice(name)[start:stop]
        return rows

    def sha256(self) -> str:
        """Hash of the files' contents: of the file where there is one, of the files' hashes in order of name
        otherwise.
        """
        digests = []
        for path in self._paths():
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor, for messages."""
        return self._place[name].name

    def _file(self, name: str) -> Any:
        return self._files[self._place[name].name]

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
                f"{self.folder} holds {pickled[0]} and no {_SINGLE}; pickle files can run code and are not read: convert "
                f"it with {conversion_command(self.folder, pickled)}"
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
            if name not in self._place or self._place[name].name != file:
                raise CheckpointError(
                    f"{_INDEX} says that {name!r} is in {file}, where it is not; download both again."
                )

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}); copy or download it again.") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
