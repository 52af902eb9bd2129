"""Reading the folder of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from loopscope._util.reading import read_json
from loopscope.errors import ConfigError, StudyError
from loopscope.experiments.cells import CELLS, GRID_FILE, CellResult
from loopscope.experiments.sweep_cells import SweepResult

ExperimentKind = Literal["architectures", "phase", "training"]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a folder holds."""

    folder: Path
    kind: ExperimentKind
    cells: tuple[CellResult, ...] = ()
    """Of random models, for the first two kinds."""
    trained: tuple[SweepResult, ...] = ()
    """For the last one."""
    finished: bool = True
    """False where cells of the grid are missing. Before a command first came to its end, all cells that are there are
    taken."""


def load_experiment(folder: str | Path) -> Experiment:
    """Read the results of a `loopscope experiment` command: the cells of the grid that was asked for last.

    Raises `StudyError` for a folder that holds none, or damaged files.
    """
    folder = Path(folder)
    if not (folder / GRID_FILE).is_file():
        raise StudyError(
            f"{folder} is not an experiment (it has no {GRID_FILE}); give the --out folder of `loopscope experiment`."
        )
    try:
        manifest = read_json(folder / GRID_FILE)
        kind = manifest["kind"]
        names = manifest.get("cells")
        if kind not in get_args(ExperimentKind):
            raise ValueError(f"an experiment named {kind!r} is not known")
        if names is None:
            paths = sorted((folder / CELLS).glob("*.json"))
        else:
            # The last part alone: a name in a manifest leads to no other folder.
            paths = [folder / CELLS / f"{Path(name).name}.json" for name in names]
        entries = [read_json(path) for path in paths]
        found: dict[str, Any] = (
            {"trained": tuple(SweepResult.from_dict(entry) for entry in entries)}
            if kind == "training"
            else {"cells": tuple(CellResult.from_dict(entry) for entry in entries)}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise StudyError(f"The experiment in {folder} is damaged ({error}); run it again.") from None
    if not entries:
        raise StudyError(f"The experiment in {folder} has no finished cell yet; wait for it, or run it again.")
    return Experiment(folder=folder, kind=cast(ExperimentKind, kind), finished=bool(manifest.get("finished")), **found)
