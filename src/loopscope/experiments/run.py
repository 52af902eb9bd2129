"""Runs the cells of a grid, by any engine, into a folder that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loopscope._util.estimate import Phase
from loopscope.analysis.engine.run import Engine, run_items
from loopscope.analysis.job import Progress, SilentProgress
from loopscope.experiments.cells import Cell, CellResult, GridCell, GridFolder, ResultT
from loopscope.experiments.random_models import run_cell

CellT = TypeVar("CellT", bound=GridCell)


def run_grid(
    cells: Sequence[Cell],
    kind: str,
    out: Path | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> list[CellResult]:
    """The results of all cells of randomly initialised models, in their order; see `run_cells`."""
    return run_cells(run_cell, cells, kind, CellResult.from_dict, out, engine=engine, progress=progress)


def run_cells(
    work: Callable[[CellT], ResultT],
    cells: Sequence[CellT],
    kind: str,
    from_dict: Callable[[Mapping[str, Any]], ResultT],
    out: Path | None = None,
    *,
    grid: Sequence[CellT] | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> list[ResultT]:
    """The results of all cells, in their order.

    `work` makes a result of a cell, and `from_dict` of what the result's `to_dict` gave. `kind` names the experiment,
    which a folder is of. Cells that are in `out` already are not run again. `grid` are all cells of the experiment,
    where these are only some of them. Raises `StudyError` for a folder of something else.
    """
    progress = progress or SilentProgress()
    if out is None:
        return _run(work, cells, {}, engine, progress, None)
    with GridFolder(out, kind, from_dict) as folder:
        there = {cell: found for cell in cells if (found := folder.read(cell)) is not None}
        if there:
            progress.note(f"Resuming {out}: {len(there)} of {len(cells)} cells are done.")
        results = _run(work, cells, there, engine, progress, folder)
        folder.finish(cells if grid is None else grid)
        return results


def _run(
    work: Callable[[CellT], ResultT],
    cells: Sequence[CellT],
    there: dict[CellT, ResultT],
    engine: Engine | None,
    progress: Progress,
    folder: GridFolder[ResultT] | None,
) -> list[ResultT]:
    missing = [cell for cell in dict.fromkeys(cells) if cell not in there]
    progress.start([Phase("cells", len(missing) + len(there), len(there))])

    def done(place: int, result: ResultT) -> None:
        if folder is not None:
            folder.write(result)
        there[missing[place]] = result
        progress.step("cells")

    run_items(work, missing, done, engine, progress.note)
    return [there[cell] for cell in cells]
