"""Experiments over grids of models. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from loopscope._util.ranges import Processes, Range, check_ranges
from loopscope._util.table import Table
from loopscope.analysis.settings import EngineName, check_engine
from loopscope.cli.parsing import Commands
from loopscope.errors import ConfigError
from loopscope.experiments.designs import INJECTIONS, NORMS, SCALES, InjectionName, NormName

if TYPE_CHECKING:
    from loopscope.analysis.engine.run import Engine
    from loopscope.experiments.cells import Cell, CellResult


_Seeds = Annotated[int, Range(1, 1000)]


@dataclass(frozen=True, kw_only=True)
class GridCommand:
    """What every experiment takes."""

    out: Path
    """Folder for the results, one file per cell; an interrupted experiment is resumed."""
    engine: EngineName = "processes"
    """Where cells are run: in this process (serial), in worker processes, or on a Ray cluster (ray)."""
    workers: Processes | None = None
    """Number of workers, each on one thread; default: one for each CPU."""
    address: str = "auto"
    """Address of the Ray cluster: the one of this machine (auto), or HOST:PORT."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")
        check_engine(self.engine, self.workers, self.address)

    def make_engine(self) -> Engine | None:
        from loopscope.analysis.engine import make_engine

        return make_engine(self.engine, self.workers, self.address)


@dataclass(frozen=True, kw_only=True)
class _RandomModels(GridCommand):
    """What both experiments over random models take."""

    norm: tuple[NormName, ...] = NORMS
    """Where the norms are: before each branch (pre), on the residual stream (residual, as in Huginn), around each
    branch and at the end of a recurrence (ouro), after each branch (olmo2)."""
    injection: tuple[InjectionName, ...] = INJECTIONS
    """How the prompt enters each recurrence."""
    width: int = 192
    """Width of the residual stream."""
    seeds: _Seeds = 3
    """Number of models of each design."""
    recurrences: int = 128
    """The horizon; twice as many recurrences are run."""

    def cells_done(self, cells: Sequence[Cell], kind: str) -> list[CellResult]:
        from loopscope._util.progress import ProgressBar
        from loopscope.experiments.run import run_grid

        with ProgressBar("cells") as progress:
            return run_grid(cells, kind, self.out, engine=self.make_engine(), progress=progress)


@dataclass(frozen=True, kw_only=True)
class Architectures(_RandomModels):
    """Find which norms and injections make fixed points at random initialisation (arXiv 2604.11791, Figure 6).

    Says for each design whether the paper's outcome was reproduced.
    """

    depth: tuple[int, ...] = (4, 12, 16)
    """Number of recurrent layers."""
    std: float = 0.02
    """Standard deviation of the weights."""

    def run(self) -> None:
        from rich.console import Console

        from loopscope.cli.console import say_path, say_table
        from loopscope.experiments.random_findings import (
            ARCHITECTURE_COLUMNS,
            architecture_grid,
            architecture_rows,
            reproduction,
        )

        cells = architecture_grid(
            norms=self.norm,
            injections=self.injection,
            depths=self.depth,
            seeds=self.seeds,
            std=self.std,
            width=self.width,
            recurrences=self.recurrences,
        )
        results = self.cells_done(cells, "architectures")
        report = _report([self.out], self.out / "report.html")
        say_table(Table(columns=ARCHITECTURE_COLUMNS, rows=architecture_rows(results)))
        console, rows = Console(highlight=False), reproduction(results)
        for row in rows:
            name = f"{row.norm}, {'with' if row.injection == 'linear' else 'no'} injection"
            console.print(
                f"{name:26s} paper: {row.paper:12s} found: {row.found_text:44s} {row.verdict}", soft_wrap=True
            )
        say_path("report", report)
        ends = f"by recurrence {2 * self.recurrences}"
        print(f"reproduced {ends}: {sum(row.reproduced is True for row in rows)} of {len(rows)}")


@dataclass(frozen=True, kw_only=True)
class PhaseDiagram(_RandomModels):
    """Find where each design stops converging as its weights grow, and where its eigenvalues predict it."""

    width: int = 128
    depth: int = 4
    """Number of recurrent layers."""
    seeds: _Seeds = 2
    """Number of models of each design and scale."""
    std: tuple[float, ...] = SCALES
    """Standard deviations of the weights."""
    injection_scale: tuple[float, ...] = (1.0,)
    """Factors on the injection."""

    def run(self) -> None:
        from rich.console import Console

        from loopscope.cli.console import say_path, say_table
        from loopscope.experiments.random_findings import boundaries, phase_grid, phase_rows

        cells = phase_grid(
            norms=self.norm,
            injections=self.injection,
            scales=self.std,
            injection_scales=self.injection_scale,
            seeds=self.seeds,
            width=self.width,
            depth=self.depth,
            recurrences=self.recurrences,
        )
        results = self.cells_done(cells, "phase")
        report = _report([self.out], self.out / "report.html")
        columns, rows = phase_rows(boundaries(results), lambda kind: kind.letter)
        say_table(Table(columns=columns, rows=rows))
        Console(highlight=False).print(_LEGEND, style="dim")
        say_path("report", report)


@dataclass(frozen=True, kw_only=True)
class Training(GridCommand):
    """Train the models of a sweep, analyse each, and say which designs keep their loss beyond the trained depth.

    A sweep is a grid over block size, injection, norms and the rest of a training configuration, with named recipes,
    seeds and feed-forward controls. An interrupted sweep is resumed, also within a cell. See docs/experiments.md.
    """

    sweep: tyro.conf.Positional[Path]
    """The sweep, a JSON file."""
    base: Path | None = None
    """Folder that the sweep's paths are relative to; default: the folder of its file."""
    only: tuple[str, ...] = ()
    """Run only the cells of these designs, by their names in the table; others that are done stay in the report."""

    def run(self) -> None:
        from loopscope.experiments.sweep import Sweep

        # Before torch is imported, so that a wrong file is said at once.
        sweep = Sweep.load(self.sweep)

        from loopscope._util.progress import ProgressBar
        from loopscope.cli.console import say_answers, say_path, say_table
        from loopscope.experiments.run_sweep import run_sweep
        from loopscope.experiments.sweep_findings import TRAINING_COLUMNS, advice, summaries, training_rows

        with ProgressBar("cells") as progress:
            results = run_sweep(
                sweep,
                self.out,
                base=self.base or self.sweep.parent,
                only=self.only,
                engine=self.make_engine(),
                progress=progress,
            )
        shown = [TRAINING_COLUMNS.index(name) for name in _SHOWN]
        rows = [[row[column] for column in shown] for row in training_rows(summaries(results))]
        say_table(Table(columns=_SHOWN, rows=rows))
        say_answers(advice(results))
        say_path("report", _report([self.out], self.out / "report.html"))


@dataclass(frozen=True)
class ExperimentReport:
    """Write one report of several experiments: small multiples, phase diagram, ranking, supported conclusions."""

    experiments: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of experiments."""
    out: Path
    """File to write, such as experiments.html."""

    def run(self) -> None:
        from loopscope.cli.console import say_path

        if not self.experiments:
            raise ConfigError("Give at least one --out folder of an experiment.")
        say_path("report", _report(self.experiments, self.out))


EXPERIMENTS: Commands = {
    "architectures": Architectures,
    "phase": PhaseDiagram,
    "training": Training,
    "report": ExperimentReport,
}


def _report(folders: Sequence[Path], out: Path) -> Path:
    from loopscope.experiments.load import load_experiment
    from loopscope.report.page.write import write_experiments

    return write_experiments([load_experiment(folder) for folder in folders], out)


_SHOWN = ("design", "layout", "loss", "loss beyond", "kept", "accuracy", "settled")
"""Columns of the table of trained models for which a terminal has room."""
_LEGEND = (
    "For each standard deviation of the weights: what most tokens do in the long run (F fixed point, A at floor, "
    "O orbit, S slider, B bounded, D diverging, ? unknown) and the largest predicted rate of those whose fixed point "
    "is known; then the scale at which that rate crosses 1, and the one at which half of the tokens no longer settle."
)
