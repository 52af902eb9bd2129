"""A study while it is being made: shards of prompts on disk, each whole or absent, then one study."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from loopscope._util.config_json import differences
from loopscope._util.files import ClaimedFolder, atomic_file, write_atomically
from loopscope._util.map_codes import UNKNOWN
from loopscope._util.old_counts import COUNTS_FROM, manifest_from_one
from loopscope._util.reading import foreign, open_file, parse_json
from loopscope.errors import StudyError
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
        found = read_manifest(self.folder)
        if COUNTS_FROM not in found:
            if found.get("status") != "complete" and self.manifest["model"]["kind"] == "looped":
                raise StudyError(
                    f"{self.folder} holds a study that an earlier release began, which counted recurrences from 0; "
                    "choose another --out."
                )
            found = manifest_from_one(found)
        folder = self.folder
        known = found.get("identity")
        if not isinstance(known, dict) or not isinstance(known.get("settings", {}), dict):
            raise StudyError(f"{folder} holds something else than a study of this kind; choose another --out.")
        differing = differences(_comparable(known), _comparable(self.manifest["identity"]))
        if differing:
            some = [f"{name} was {before!r}, now {now!r}" for name, (before, now) in differing.items()][:3]
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise StudyError(f"{folder} holds another study ({'; '.join(some)}{more}); choose another --out.")

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
            with foreign():
                self.read(index)
        except (OSError, ValueError):
            return False
        return True

    def write(self, index: int, arrays: xr.Dataset) -> None:
        """Write a shard, atomically. Raises `StorageError`; earlier shards are kept."""
        named = {_key(str(name), arrays): values for name, values in arrays.items()}
        dims = json.dumps({key: values.dims for key, values in named.items()})
        content = {key: values.values for key, values in named.items()}
        with atomic_file(self._path(index)) as file:
            np.savez(file, allow_pickle=False, dims=np.array(dims), **content)

    def read(self, index: int) -> xr.Dataset:
        """A shard from disk."""
        # Opened here: numpy leaves the file of a damaged archive open.
        with open_file(self._path(index)) as file, np.load(file, allow_pickle=False) as stored:
            dims = parse_json(str(stored["dims"]))
            found = {}
            for key in stored.files:
                kind, slash, name = key.partition("/")
                if slash:
                    # An earlier release wrote no dimensions for weights: those of their sums.
                    named = dims.get(key) or dims[f"sum/{name}"]
                    found[f"{name}_weight" if kind == "weight" else name] = (named, stored[key])
            return xr.Dataset(found)

    def finish(self, study: Study) -> Study:
        """Write the study and drop the shards."""
        saved = study.save(self.folder)
        self.drop_shards()
        return saved

    def drop_shards(self) -> None:
        """Of a finished study; a process that was killed when it had just finished it left them."""
        shutil.rmtree(self.folder / _SHARDS, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.folder / _SHARDS / f"{index:05d}.npz"


def _key(name: str, arrays: xr.Dataset) -> str:
    """Of an array in a shard's file: it says whether batches are concatenated or added up."""
    if name.endswith("_weight"):
        return f"weight/{name.removesuffix('_weight')}"
    return f"sum/{name}" if f"{name}_weight" in arrays else f"prompt/{name}"


def _comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """In which order parts are skipped means nothing; and a study from before a setting was there has its default."""
    settings = {"stop_at_rest": 0, **identity.get("settings", {})}
    return {**identity, "settings": {**settings, "skip": sorted(settings.get("skip", ()))}}


def merge(shards: list[xr.Dataset]) -> dict[str, xr.Variable]:
    """The batches of a study as one: joined, and means of what they summed up. The list is emptied."""
    merged = join(shards)
    for name in [name for name in merged if f"{name}_weight" in merged]:
        weight = merged.pop(f"{name}_weight")
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: no prompt had this entry
            merged[name] = xr.Variable(merged[name].dims, merged[name].values / weight.values)
    return merged


def join(parts: list[xr.Dataset]) -> dict[str, xr.Variable]:
    """Batches as one: concatenated along prompts (or tracked tokens, or prompts whose maps are kept), and
    what they summed up added.

    Batches differ in their longest prompt; the shorter ones are filled up with what stands for nothing. The list is
    emptied, so that no more than one variable is held twice where nothing else holds the batches. (Variables alone:
    each change of a data set checks all that it holds.)
    """
    held = [dict(part.variables) for part in parts]
    parts.clear()
    names = list(dict.fromkeys(str(name) for each in held for name in each))
    joined = {}
    for name in names:
        found = [each.pop(name) for each in held if name in each]
        if name.endswith("_weight") or f"{name}_weight" in names:
            joined[name] = xr.Variable(found[0].dims, sum(each.values for each in found))
        else:
            joined[name] = _concatenated(found)
    return joined


def begun_batch_size(folder: Path) -> int | None:
    """Prompts to a shard of the study that was begun there, if one was."""
    if not (folder / MANIFEST).exists():
        return None
    found: Any = read_manifest(folder)
    for name in ("identity", "settings", "batch_size"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, int) else None


def _concatenated(parts: list[xr.Variable]) -> xr.Variable:
    """In one array that is made once: xarray's own padding and concatenation take longer than a short run."""
    along = next(dim for dim in ("tracked", "mapped", "prompt") if dim in parts[0].dims)
    whole = {dim: (sum if dim == along else max)(part.sizes[dim] for part in parts) for dim in parts[0].dims}
    dtype = np.result_type(*(part.dtype for part in parts))
    found = np.full(tuple(whole.values()), _FILLED[dtype.kind], dtype=dtype)
    begin = 0
    for part in parts:
        end = begin + part.sizes[along]
        place = tuple(slice(begin, end) if dim == along else slice(size) for dim, size in part.sizes.items())
        found[place] = part.values
        begin = end
    return xr.Variable(parts[0].dims, found)
