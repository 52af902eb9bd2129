"""The result of an analysis: named arrays, the manifest, and the tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xarray as xr

from loopscope._files import write_atomically
from loopscope.errors import StudyError

__all__ = ["ARRAYS", "MANIFEST", "TOKENS", "Study"]

MANIFEST = "manifest.json"
ARRAYS = "study.nc"
TOKENS = "tokens.jsonl"

_ENGINE: Literal["netcdf4"] = "netcdf4"


@dataclass(frozen=True, eq=False)
class Study:
    """Everything that report, figures and comparisons read. The variables are listed in docs/study.md."""

    dataset: xr.Dataset
    manifest: Mapping[str, Any]
    tokens: Sequence[Mapping[str, Any]]
    """One entry a prompt, the fields of a `TokenizedPrompt`: id, text, token_ids, token_strings and so on."""
    folder: Path | None = None
    """Where it was loaded from or saved to."""

    @classmethod
    def load(cls, folder: str | Path) -> Study:
        """Read a finished study.

        Raises `StudyError` for a folder that holds none, an unfinished one, or damaged files.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest.get("kind") == "verdicts":
            raise StudyError(
                f"{folder} holds verdicts on trajectories and no study; give the --out folder of a `loopscope analyze` "
                "run."
            )
        if manifest.get("status") != "complete":
            raise StudyError(
                f"The study in {folder} is not finished; run the same `loopscope analyze` command to finish it."
            )
        for name in (ARRAYS, TOKENS):
            if not (folder / name).is_file():
                raise StudyError(f"{folder} lacks {name}; run the analysis again into a new folder.")
        try:
            dataset = read_arrays(folder / ARRAYS)
            # At line feeds alone: a prompt may hold other line ends, which JSON leaves as they are.
            lines = (folder / TOKENS).read_text(encoding="utf-8").split("\n")
            tokens = [json.loads(line) for line in lines if line]
        except (OSError, ValueError, KeyError) as error:
            raise StudyError(
                f"The study in {folder} is damaged ({error}); run the analysis again into a new folder."
            ) from None
        return cls(dataset, manifest, tokens, folder)

    def save(self, folder: str | Path) -> Study:
        """Write the study, each file whole or not at all, the manifest last. Raises `StorageError`."""
        folder = Path(folder)
        write_atomically(folder / TOKENS, tokens_file(self.tokens))
        write_atomically(folder / ARRAYS, netcdf(self.dataset))
        write_manifest(folder, self.manifest)
        return Study(self.dataset, self.manifest, self.tokens, folder)


def netcdf(dataset: xr.Dataset) -> memoryview:
    """The dataset as the bytes of one NetCDF file; made in memory, since HDF5 does not survive a full disk."""
    encoding = {
        str(name): {"zlib": True, "complevel": 1, "shuffle": True}
        for name, variable in dataset.data_vars.items()
        if variable.dtype.kind in "fu" and variable.size > 1000
    }
    return memoryview(dataset.to_netcdf(None, engine=_ENGINE, encoding=encoding))


def read_arrays(path: Path) -> xr.Dataset:
    """What `netcdf` made, read whole: a file that stays open would break when it is written again."""
    with xr.open_dataset(path, engine=_ENGINE) as opened:
        return opened.load()


def tokens_file(tokens: Sequence[Mapping[str, Any]]) -> bytes:
    """One JSON line a prompt."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in tokens).encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a study folder, finished or not. Raises `StudyError` where there is none."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is not a study (it has no manifest.json)" if folder.is_dir() else "does not exist"
        raise StudyError(f"{folder} {what}; give the --out folder of a `loopscope analyze` run.") from None
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); run the analysis again into a new folder.") from None
    if not isinstance(manifest, dict):
        raise StudyError(f"{path} does not hold a JSON object; it is not a study's manifest.")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
