"""Trajectories from files of other tools: read, judged, and the verdicts written down."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loopscope.dynamics.trajectories.judge import judge
from loopscope.dynamics.trajectories.settings import CosineSettings, DisplacementSettings, Method, method_settings
from loopscope.dynamics.trajectories.states import as_states, check_dtype
from loopscope.dynamics.trajectories.tail import tail_paths
from loopscope.dynamics.verdicts import KINDS, JudgedFiles, JudgedTrajectory, Verdict
from loopscope.errors import ConfigError

_DRAWN = 12
"""Trajectories of each kind whose way is kept, to be drawn: those that move most."""


def judge_files(
    paths: Sequence[str | Path],
    dtype: object,
    method: Method = "displacement",
    *,
    settings: DisplacementSettings | CosineSettings | None = None,
    array: str | None = None,
    first_recurrence: int = 0,
    check_order: bool = True,
    progress: Callable[[int], None] = lambda tokens: None,
) -> JudgedFiles:
    """Judge the trajectories of .npy, .npz and .safetensors files; see `judge` for the arguments.

    `array` names the array within a file that holds several. Raises `ConfigError` for a file that cannot be read or
    holds no trajectory; the message names it.
    """
    chosen = settings or method_settings(method)
    judged, sources = [], []
    for path in map(Path, paths):
        for name, states in load_trajectories(path, array):
            try:
                tensor = as_states(states)
                verdicts = judge(
                    tensor,
                    dtype,
                    method,
                    settings=chosen,
                    first_recurrence=first_recurrence,
                    check_order=check_order,
                    progress=progress,
                )
            except ConfigError as error:
                raise ConfigError(f"{path}{f', array {name!r}' if name else ''}: {error}") from None
            recurrences = tensor.shape[1]
            sources.append({"file": str(path), "array": name, "shape": list(states.shape), "sha256": _digest(path)})
            paths_there = _paths(tensor, verdicts)
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
        "versions": {name: version(name) for name in ("loopscope", "torch", "numpy")},
    }
    return JudgedFiles(trajectories=judged, manifest=manifest)


def _paths(states: Tensor, verdicts: Sequence[Verdict]) -> dict[int, tuple[tuple[float, float], ...]]:
    """Of the tokens of each kind that move most."""
    kept: list[int] = []
    for kind in KINDS:
        there = [token for token, verdict in enumerate(verdicts) if verdict.kind == kind and verdict.level >= 0]
        kept += sorted(there, key=lambda token: -verdicts[token].level)[:_DRAWN]
    if not kept:
        return {}
    drawn = tail_paths(states[kept]).tolist()
    return {token: tuple((x, y) for x, y in path) for token, path in zip(kept, drawn, strict=True)}


def load_trajectories(path: str | Path, array: str | None = None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    """(name, states) of the arrays in a file, or of the one called `array`. Nothing is unpickled.

    Raises `ConfigError` for a missing or damaged file, another format, and a name that the file does not have.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; give a .npy, .npz or .safetensors file.")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{path} is no .npy, .npz or .safetensors file; save the states as one of these.")
    try:
        yield from reader(path, array)
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); save the states again without pickled objects.") from None


def _read_npy(path: Path, array: str | None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    if array is not None:
        raise ConfigError(f"{path} holds one array without a name; leave --array out.")
    yield "", np.load(path, mmap_mode="r", allow_pickle=False)


def _read_npz(path: Path, array: str | None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        for name in _chosen(path, list(stored.files), array):
            yield name, stored[name]


def _read_safetensors(path: Path, array: str | None) -> Iterator[tuple[str, NDArray[Any] | Tensor]]:
    with safe_open(path, framework="pt") as stored:
        for name in _chosen(path, list(stored.keys()), array):
            yield name, stored.get_tensor(name)


def _chosen(path: Path, names: list[str], array: str | None) -> list[str]:
    if array is None:
        return names
    if array not in names:
        raise ConfigError(f"{path} has no array {array!r}; it has {', '.join(names) or 'none'}.")
    return [array]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
