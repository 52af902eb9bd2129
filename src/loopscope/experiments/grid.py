"""Runs the cells of a grid, by any engine, into a folder that can be gone on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopscope.engine import Engine, run_items
from loopscope.experiments.cells import run_cell
from loopscope.grids import Cell, CellResult, GridFolder
from loopscope.job import Progress, SilentProgress

__all__ = ["run_grid"]


def run_grid(
    cells: Sequence[Cell],
    kind: str,
    out: Path | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> list[CellResult]:
    """The results of all cells, in their order.

    `kind` names the experiment, which a folder is of. Cells that are in `out` already are not run again. Raises
    `StudyError` for a folder of something else.
    """
    progress = progress or SilentProgress()
    if out is None:
        return _run(cells, {}, engine, progress, None)
    with GridFolder(out, kind) as folder:
        there = {cell: found for cell in cells if (found := folder.read(cell)) is not None}
        if there:
            progress.note(f"Going on with {out}: {len(there)} of {len(cells)} cells are done.")
        return _run(cells, there, engine, progress, folder)


def _run(
    cells: Sequence[Cell],
    there: dict[Cell, CellResult],
    engine: Engine | None,
    progress: Progress,
    folder: GridFolder | None,
) -> list[CellResult]:
    missing = [cell for cell in dict.fromkeys(cells) if cell not in there]
    progress.start(len(missing) + len(there), len(there))

    def done(place: int, result: CellResult) -> None:
        if folder is not None:
            folder.write(result)
        there[missing[place]] = result
        progress.step()

    run_items(run_cell, missing, done, engine, progress.note)
    return [there[cell] for cell in cells]
