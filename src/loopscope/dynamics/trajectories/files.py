"""Trajectories from files of other tools: read, judged, and the verdicts written down."""

from __future__ import annotations

import dataclasses
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from loopscope._util.reading import foreign, is_there, open_file, sha256_of
from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings, Method, method_settings
from loopscope.dynamics.trajectories.states import as_states, check_dtype
from loopscope.dynamics.trajectories.tail import tail_paths
from loopscope.dynamics.verdicts import KINDS, JudgedFiles, JudgedTrajectory, Verdict
from loopscope.errors import ConfigError, last_resort, one_line
from loopscope.models.checkpoints.free_memory import available_memory
from loopscope.models.checkpoints.store import ITEM_BYTES

_DRAWN = 12
"""Trajectories of each kind whose way is kept, to be drawn: those that move most."""


@last_resort("judging trajectories")
def judge_files(
    paths: Sequence[str | Path],
    dtype: object,
    method: Method = "displacement",
    *,
    settings: DisplacementSettings | CosineSettings | None = None,
    array: str | None = None,
    first_recurrence: int = 1,
    check_order: bool = True,
    twins: Sequence[str | Path] = (),
    progress: Callable[[int], None] = lambda tokens: None,
) -> JudgedFiles:
    """Judge the trajectories of .npy, .npz and .safetensors files; see `judge` for the arguments.

    `array` names the array within a file that holds several. `twins` are files with the same arrays of other runs, for
    a single file of states. Raises `ConfigError` for a file that cannot be read or holds no trajectory; the message
    names it.
    """
    if not paths:
        raise ConfigError("No file of states was given; give .npy, .npz or .safetensors files.")
    if twins and len(paths) > 1:
        raise ConfigError("Twins belong to one file of states; judge the files one at a time.")
    chosen = settings or method_settings(method)
    judged, sources = [], []
    for path in map(Path, paths):
        for name, states in load_trajectories(path, array):
            runs = [_same_array(twin, name, path if array is None else None) for twin in map(Path, twins)]
            try:
                tensor = as_states(states)
                verdicts = judge(
                    tensor,
                    dtype,
                    method,
                    settings=chosen,
                    first_recurrence=first_recurrence,
                    check_order=check_order,
                    twins=runs,
                    progress=progress,
                )
            except ConfigError as error:
                raise ConfigError(f"{path}{f', array {name!r}' if name else ''}: {error}") from None
            recurrences = tensor.shape[1]
            sources.append({"file": str(path), "array": name, "shape": list(states.shape), "sha256": sha256_of(path)})
            paths_there = _paths(tensor, verdicts, first_recurrence, chosen.window)
            judged += [
                JudgedTrajectory(
                    file=str(path),
                    array=name,
                    token=token,
                    recurrences=recurrences,
                    verdict=verdict,
                    path=paths_there.get(token, ()),
                )
                for token, verdict in enumerate(verdicts)
            ]
    manifest = {
        "kind": "verdicts",
        "method": method,
        "settings": dataclasses.asdict(chosen),
        "dtype": check_dtype(dtype),
        "first_recurrence": first_recurrence,
        "sources": sources,
        "twins": [{"file": str(twin), "sha256": sha256_of(Path(twin))} for twin in twins],
        "versions": {name: version(name) for name in ("loopscope", "torch", "numpy")},
    }
    return JudgedFiles(trajectories=judged, manifest=manifest)


def _paths(
    states: Tensor, verdicts: Sequence[Verdict], first_recurrence: int, window: int
) -> dict[int, tuple[tuple[float, float], ...]]:
    """Through the judged tail, of the tokens of each kind that move most."""
    kept: list[int] = []
    for kind in KINDS:
        there = [token for token, verdict in enumerate(verdicts) if verdict.kind == kind and verdict.level >= 0]
        kept += sorted(there, key=lambda token: -verdicts[token].level)[:_DRAWN]
    if not kept:
        return {}
    drawn = tail_paths(states[kept], first_recurrence, window).tolist()
    return {token: tuple((x, y) for x, y in path) for token, path in zip(kept, drawn, strict=True)}


def load_trajectories(path: str | Path, array: str | None = None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    """(name, states) of the arrays in a file, or of the one called `array`. Nothing is unpickled.

    Raises `ConfigError` for a missing or damaged file, another format, and a name that the file does not have.
    """
    path = Path(path)
    if not is_there(path) or path.is_dir():
        what = "is a folder" if is_there(path) else "does not exist"
        raise ConfigError(f"{path} {what}; give a .npy, .npz or .safetensors file.")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path} is no .npy, .npz or .safetensors file; save the states as one of these.")
    try:
        with foreign(), open_file(path) as file:
            yield from reader(path, file, array)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({one_line(error)}); save the states again without pickled objects."
        ) from None


def _same_array(twin: Path, name: str, unchosen: Path | None) -> Tensor:
    """The array of that name in a file of twins, or its only one where one of the two has no name; `unchosen` is a file
    of states that was not asked for one of its arrays."""
    if unchosen is not None and name and twin.suffix.lower() == ".npy":
        raise ConfigError(
            f"{twin} holds one array without a name, and those of {unchosen} have names, such as {name}; say whose "
            f"twin it is (--array {name})."
        )
    there = list(load_trajectories(twin, None if twin.suffix.lower() == ".npy" else name or None))
    if len(there) > 1:
        raise ConfigError(f"{twin} holds {len(there)} arrays, and the states have no name; keep one in it.")
    try:
        return as_states(there[0][1])
    except ConfigError as error:
        raise ConfigError(f"{twin}: {error}") from None


def _read_npy(path: Path, file: BinaryIO, array: str | None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    if array is not None:
        raise ConfigError(f"{path} holds one array without a name; leave --array out.")
    states = np.load(path, mmap_mode="r", allow_pickle=False)
    _check_size(path, states.nbytes)
    yield "", states


def _read_npz(path: Path, file: BinaryIO, array: str | None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    with zipfile.ZipFile(file) as archive:
        there = [entry.filename for entry in archive.infolist()]
        for name in _chosen(path, [name.removesuffix(".npy") for name in there], array):
            if there.count(f"{name}.npy") != 1:
                raise ValueError(f"{name} is in it {there.count(f'{name}.npy')} times as an array")
            held = archive.getinfo(f"{name}.npy").file_size
            _check_size(path, held)
            with archive.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, _, dtype = read_header(member)
            # numpy makes room for what the header says before it reads.
            if math.prod(shape) * dtype.itemsize > held:
                raise ValueError(f"{name} has the shape {shape}, for which there are {held:,} bytes")
            with archive.open(f"{name}.npy") as member:
                yield name, np.lib.format.read_array(member, allow_pickle=False)


def _read_safetensors(path: Path, file: BinaryIO, array: str | None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    with safe_open(path, framework="pt") as stored:
        for name in _chosen(path, list(stored.keys()), array):
            held = stored.get_slice(name)
            _check_size(path, math.prod(held.get_shape()) * ITEM_BYTES.get(held.get_dtype(), 1))
            yield name, stored.get_tensor(name)


def _check_size(path: Path, nbytes: int) -> None:
    """States are held twice while they are judged."""
    free = available_memory(torch.device("cpu"))
    if 2 * nbytes > free:
        raise ConfigError(
            f"The states in {path} have {nbytes:,} bytes, which twice would not fit into the {free:,} of memory that "
            "are free; judge fewer tokens at a time."
        )


def _chosen(path: Path, names: list[str], array: str | None) -> list[str]:
    if not names:
        raise ConfigError(f"{path} holds no array; save the states of one site in it, (token, recurrence, width).")
    if array is None:
        return names
    if array not in names:
        raise ConfigError(f"{path} has no array {array!r}; it has {', '.join(names)}.")
    return [array]
