"""Experiments over grids of models. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loopscope._util.ranges import Count, check_ranges
from loopscope.analysis.settings import EngineName, check_engine
from loopscope.errors import ConfigError

if TYPE_CHECKING:
    from loopscope.analysis.engine.run import Engine
    from loopscope.experiments.cells import Cell, CellResult, InjectionName, NormName
    from loopscope.experiments.random_findings import Boundary
    from loopscope.experiments.sweep_findings import DesignSummary
else:
    from typing import Literal

    # As in `grids`, which a help text does not wait for.
    NormName = Literal["pre", "residual", "ouro", "olmo2"]
    InjectionName = Literal["none", "linear", "add"]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What every experiment takes."""

    out: Path
    """Folder for the results, a file a cell; an experiment that was interrupted is resumed."""
    engine: EngineName = "processes"
    """Where cells are run: in this process (serial), in worker processes, or on a Ray cluster (ray)."""
    workers: Count | None = None
    """How many work side by side, each on one thread; one for each CPU unless given."""
    address: str = "auto"
    """Of the Ray cluster: the one of this machine (auto), or HOST:PORT."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")
        check_engine(self.engine, self.workers, self.address)

    def make_engine(self) -> Engine | None:
        from loopscope.analysis.engine import make_engine

        return make_engine(self.engine, self.workers, self.address)


@dataclass(frozen=True, kw_only=True)
class _RandomModels(_Run):
    """What both experiments over random models take."""

    norm: tuple[NormName, ...] = ("pre", "residual", "ouro", "olmo2")
    """Where norms stand: before each branch (pre), on the residual stream (residual: Huginn), around each branch and at
    the end of a recurrence (ouro), after each branch (olmo2)."""
    injection: tuple[InjectionName, ...] = ("none", "linear", "add")
    """How the prompt enters each recurrence."""
    width: int = 192
    """Of the residual stream."""
    seeds: Count = 3
    """Models of each design."""
    recurrences: int = 128
    """The horizon; twice as many are run."""

    def cells_done(self, cells: Sequence[Cell], kind: str) -> list[CellResult]:
        from loopscope._util.progress import ProgressBar
        from loopscope.experiments.run import run_grid

        with ProgressBar("cells") as progress:
            return run_grid(cells, kind, self.out, engine=self.make_engine(), progress=progress)


@dataclass(frozen=True, kw_only=True)
class Architectures(_RandomModels):
    """Which norms and injections make fixed points, at random initialisation (arXiv 2604.11791, Figure 6).

    Says design by design whether the paper's outcome was reproduced.
    """

    depth: tuple[int, ...] = (4, 12, 16)
    """Recurrent layers."""
    std: float = 0.02
    """Standard deviation of the weights."""

    def run(self) -> None:
        from rich.console import Console

        from loopscope.experiments.random_findings import architecture_grid, reproduction

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
        console = Console(highlight=False)
        console.print(_designs(results))
        rows = reproduction(results)
        for row in rows:
            found = ", ".join(f"{count} {outcome}" for outcome, count in row.found.items()) or "not run"
            verdict = {True: "reproduced", False: "NOT reproduced", None: "not run"}[row.reproduced]
            name = f"{row.norm}, {'with' if row.injection == 'linear' else 'no'} injection"
            console.print(f"{name:26s} paper: {row.paper:12s} found: {found:44s} {verdict}", soft_wrap=True)
        print(f"report  {report}")
        print(f"reproduced: {sum(row.reproduced is True for row in rows)} of {len(rows)}")


@dataclass(frozen=True, kw_only=True)
class Phase(_RandomModels):
    """Where each design stops converging as its weights grow, and where its eigenvalues say that it should."""

    width: int = 128
    depth: int = 4
    """Recurrent layers."""
    seeds: Count = 2
    """Models of each design and scale."""
    std: tuple[float, ...] = (0.01, 0.02, 0.03, 0.045, 0.0625, 0.09)
    """Standard deviations of the weights."""
    injection_scale: tuple[float, ...] = (1.0,)
    """Factors on the injection."""

    def run(self) -> None:
        from rich.console import Console

        from loopscope.experiments.random_findings import boundaries, phase_grid

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
        console = Console(highlight=False)
        console.print(_phases(boundaries(results)))
        console.print(_LEGEND, style="dim")
        print(f"report  {report}")


@dataclass(frozen=True, kw_only=True)
class Training(_Run):
    """Train the models of a sweep, analyse each, and say which designs do well and keep it beyond the trained depth.

    Grids over block size, injection, norms and the rest of a training configuration, named recipes, seeds, and
    feed-forward controls. A sweep that was interrupted is resumed, within a cell too. See docs/experiments.md.
    """

    sweep: tyro.conf.Positional[Path]
    """A JSON file."""
    base: Path | None = None
    """Folder that the sweep's paths are relative to; the one of its file unless given."""
    only: tuple[str, ...] = ()
    """Do the cells of these designs alone, by their names in the table; others that are done stay in the report."""

    def run(self) -> None:
        from loopscope.experiments.sweep import Sweep

        # Before torch is imported, so that a wrong file is said at once.
        sweep = Sweep.load(self.sweep)

        from rich.console import Console

        from loopscope._util.progress import ProgressBar
        from loopscope.cli.console import say_answers
        from loopscope.experiments.run_sweep import run_sweep
        from loopscope.experiments.sweep_findings import advice, summaries

        with ProgressBar("cells") as progress:
            results = run_sweep(
                sweep,
                self.out,
                base=self.base or self.sweep.parent,
                only=self.only,
                engine=self.make_engine(),
                progress=progress,
            )
        Console(highlight=False).print(_trained(summaries(results)))
        say_answers(advice(results))
        print(f"report  {_report([self.out], self.out / 'report.html')}")


@dataclass(frozen=True)
class ExperimentReport:
    """Draw one page of several experiments: small multiples, phase diagram, ranking, and what the numbers support."""

    experiments: tyro.conf.Positional[tuple[Path, ...]]
    """The --out folders of experiments."""
    out: Path
    """Where to write it, such as experiments.html."""

    def run(self) -> None:
        if not self.experiments:
            raise ConfigError("Give at least one --out folder of an experiment.")
        print(f"report  {_report(self.experiments, self.out)}")


Experiment = (
    Annotated[Architectures, tyro.conf.subcommand("architectures")]
    | Annotated[Phase, tyro.conf.subcommand("phase")]
    | Annotated[Training, tyro.conf.subcommand("training")]
    | Annotated[ExperimentReport, tyro.conf.subcommand("report")]
)


def _report(folders: Sequence[Path], out: Path) -> Path:
    from loopscope.experiments.load import load_experiment
    from loopscope.report.page.write import write_experiments

    return write_experiments([load_experiment(folder) for folder in folders], out)


def _trained(found: Sequence[DesignSummary]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("design", "layout", "loss", "beyond", "kept", "accuracy", "settled", box=None, pad_edge=False)
    for each in found:
        looped = each.control is None
        table.add_row(
            escape(each.name),
            each.results[0].layout,
            f"{each.loss.mean:.3f}",
            f"{each.beyond.mean:.3f}" if looped else "-",
            f"{each.kept} of {len(each.results)}" if looped else "-",
            f"{100 * each.accuracy.mean:.1f} %",
            "-" if each.settled is None else f"{100 * each.settled:.0f} %",
        )
    return table


def _designs(results: Sequence[CellResult]) -> Any:
    from rich.table import Table

    from loopscope.experiments.cells import by_design

    table = Table("norm", "injection", "layers", "outcome (cells)", "least cosine", "norm 2H / H", "predicted rate",
                  box=None, pad_edge=False)  # fmt: skip
    for (norm, injection, depth), group in by_design(results, lambda cell: (cell.norm, cell.injection, cell.depth)):
        outcomes: dict[str, int] = {}
        for each in group:
            outcomes[str(each.outcome)] = outcomes.get(str(each.outcome), 0) + 1
        table.add_row(
            norm,
            injection,
            str(depth),
            ", ".join(f"{outcome} ({count})" for outcome, count in outcomes.items()),
            _range([each.degeneracy for each in group]),
            _range([each.norm_growth for each in group]),
            _range([each.radius for each in group]),
        )
    return table


def _phases(found: Sequence[Boundary]) -> Any:
    from rich.table import Table

    scales = [f"{scale:g}" for scale in found[0].scales]
    table = Table("norm", "injection", *scales, "predicted", "observed", box=None, pad_edge=False)
    for each in found:
        scaled = "" if each.injection_scale == 1 else f" x {each.injection_scale:g}"
        cells = [
            f"{_LETTERS[tends]} {'' if radius is None else format(radius, '.2f')}".strip()
            for tends, radius in zip(each.tends, each.radius, strict=True)
        ]
        table.add_row(each.norm, f"{each.injection}{scaled}", *cells, _scale(each.predicted), _scale(each.observed))
    return table


_LETTERS = {
    "fixed point": "F",
    "at floor": "A",
    "orbit": "O",
    "slider": "S",
    "bounded": "B",
    "diverging": "D",
    "unknown": "?",
}
_LEGEND = (
    "By the standard deviation of the weights: what most tokens tend to (F fixed point, A at floor, O orbit, S slider, "
    "B bounded, D diverging, ? unknown) and the largest predicted rate of those whose fixed point is known; then the "
    "scale at which that rate crosses 1, and the one at which half of the tokens no longer settle."
)


def _scale(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(values: Sequence[float | None]) -> str:
    """Least and largest, over seeds."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low} to {high}"
