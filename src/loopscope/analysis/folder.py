"""A study while it is being made: shards of prompts on disk, each whole or absent, then one study."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopscope._util.config_json import differences
from loopscope._util.files import ClaimedFolder, atomic_file, write_atomically
from loopscope._util.map_codes import UNKNOWN
from loopscope.errors import StudyError
from loopscope.measures.base import Arrays, Named
from loopscope.study import MANIFEST, TOKENS, Study, read_manifest, tokens_file, write_manifest

_FILLED = {"f": np.nan, "i": -1, "u": UNKNOWN}
"""What stands where a shard has nothing, by the kind of the array: numbers, counted things, codes of maps."""

_SHARDS = "shards"


class StudyFolder(ClaimedFolder):
    """Opens, resumes and finishes one study folder.

    `identity` is the part of the manifest that the numbers depend on. A folder whose study has another identity is
    refused, with what differs; one with the same identity is resumed.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], tokens: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(folder, MANIFEST)
        self.manifest = manifest
        self.tokens = tokens

    def check(self) -> None:
        _check_same(self.folder, read_manifest(self.folder), self.manifest)

    def begin(self) -> None:
        # The manifest first: from then on the folder is known to be this study's.
        write_manifest(self.folder, {**self.manifest, "status": "running"})
        write_atomically(self.folder / TOKENS, tokens_file(self.tokens))

    @property
    def is_complete(self) -> bool:
        return read_manifest(self.folder).get("status") == "complete"

    def has(self, index: int) -> bool:
        """Shard `index` is on disk and readable."""
        try:
            self.read(index)
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return False
        return True

    def write(self, index: int, arrays: Arrays) -> None:
        """Write a shard, atomically. Raises `StorageError`; earlier shards are kept."""
        named = {
            **{f"prompt/{name}": entry for name, entry in arrays.per_prompt.items()},
            **{f"sum/{name}": entry for name, entry in arrays.summed.items()},
        }
        content = {name: entry.values for name, entry in named.items()}
        content |= {f"weight/{name}": values for name, values in arrays.weight.items()}
        dims = json.dumps({name: entry.dims for name, entry in named.items()})
        with atomic_file(self._path(index)) as file:
            np.savez(file, allow_pickle=False, dims=np.array(dims), **content)

    def read(self, index: int) -> Arrays:
        """A shard from disk."""
        arrays = Arrays()
        # Opened here: numpy leaves the file of a damaged archive open.
        with self._path(index).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            dims = json.loads(str(stored["dims"]))
            for key in stored.files:
                kind, _, name = key.partition("/")
                if kind == "weight":
                    arrays.weight[name] = stored[key]
                elif kind in ("prompt", "sum"):
                    target = arrays.per_prompt if kind == "prompt" else arrays.summed
                    target[name] = Named(tuple(dims[key]), stored[key])
        return arrays

    def finish(self, study: Study) -> Study:
        """Write the study and drop the shards."""
        saved = study.save(self.folder)
        shutil.rmtree(self.folder / _SHARDS, ignore_errors=True)
        return saved

    def _path(self, index: int) -> Path:
        return self.folder / _SHARDS / f"{index:05d}.npz"


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = differences(found.get("identity", {}), wanted["identity"])
    if differing:
        some = [f"{name} was {before!r}, now {now!r}" for name, (before, now) in differing.items()][:3]
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise StudyError(f"{folder} holds another study ({'; '.join(some)}{more}); choose another --out.")


def merge(shards: Sequence[Arrays]) -> dict[str, Named]:
    """Put the shards' arrays together, in order: one entry a prompt (or tracked token, or prompt whose maps are kept),
    and means for the sums.

    Shards differ in their longest prompt; the shorter ones are filled up with what stands for nothing. They are
    emptied on the way, so that no more than one variable is held twice.
    """
    merged: dict[str, Named] = {}
    for name in dict.fromkeys(name for shard in shards for name in shard.per_prompt):
        parts = [shard.per_prompt.pop(name) for shard in shards if name in shard.per_prompt]
        dims = parts[0].dims
        axis = next(dims.index(name) for name in ("tracked", "mapped", "prompt") if name in dims)
        merged[name] = Named(dims, _concatenate([part.values for part in parts], axis))
    for name in dict.fromkeys(name for shard in shards for name in shard.summed):
        total = sum(shard.summed[name].values for shard in shards)
        weight = sum(shard.weight[name] for shard in shards)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no prompt had this entry
            merged[name] = Named(shards[0].summed[name].dims, np.asarray(total / weight))
    return merged


def _concatenate(parts: Sequence[np.ndarray], axis: int) -> np.ndarray:
    shape = [max(part.shape[dimension] for part in parts) for dimension in range(parts[0].ndim)]
    shape[axis] = sum(part.shape[axis] for part in parts)
    whole = np.full(shape, _FILLED[parts[0].dtype.kind], dtype=parts[0].dtype)
    start = 0
    for part in parts:
        place = [slice(0, length) for length in part.shape]
        place[axis] = slice(start, start + part.shape[axis])
        whole[tuple(place)] = part
        start += part.shape[axis]
    return whole
