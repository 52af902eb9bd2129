"""Sweeps over trained models: every cell is trained, on a text that may be made here, then analysed."""

from __future__ import annotations

import functools
import hashlib
import io
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from loopscope._util.files import write_atomically
from loopscope._util.statistics import finite_or_none
from loopscope.analysis.analyzing import analyze
from loopscope.analysis.engine.run import Engine
from loopscope.analysis.job import Progress
from loopscope.analysis.settings import Part, parts_except
from loopscope.answers.answer import Criterion
from loopscope.answers.comparison.curves import MEASURES, stage_curves
from loopscope.answers.stages import repetition
from loopscope.errors import ConfigError, StudyError
from loopscope.experiments.cells import Dynamics
from loopscope.experiments.random_models import dynamics_of
from loopscope.experiments.run import run_cells
from loopscope.experiments.sweep import Sweep
from loopscope.experiments.sweep_cells import AutomatonTask, PassCurves, SweepCell, SweepResult
from loopscope.experiments.training.cost import check_cost
from loopscope.experiments.training.data import DataFiles, read_documents
from loopscope.experiments.training.loop import TrainResult, train
from loopscope.experiments.training.run_folder import RunFolder
from loopscope.study import Study

BitRows = NDArray[np.int64]
"""(row, cell), bits."""
KIND = "training"
RUNS = "runs"
_STUDY = "study"
_STUDIED: tuple[Part, ...] = ("noise-floor", "heads", "stages")
_OF_LOOPS: tuple[Part, ...] = ("behaviour", "stability")
"""Parts of an analysis that no sweep reads; losses by recurrence are taken from the test text instead."""
_SEARCH = 60
"""Recurrences for finding a fixed point that the run does not come to."""
_CURVE_POINTS = 40
"""Of the training loss, each the mean of the logged steps around it."""
_HELD_OUT = 8
"""One row in this many is kept for the test text."""


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    base: Path,
    only: Sequence[str] = (),
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> list[SweepResult]:
    """Train and analyse every cell, in its own folder below `out/runs`; finished cells are not done again, and the
    training of one that was interrupted is resumed.

    `base` is the folder that the sweep's paths are relative to. `only` names designs, instead of all; results are then
    those of these designs. With an engine on several machines, `out` has to be on
    a disk that all of them see, or each keeps the models that it trained. Raises `ConfigError` for settings that no
    configuration can have, `StudyError` for a folder of something else.
    """
    text = "" if isinstance(sweep.task, AutomatonTask) else _text_sha256(sweep, base)
    cells = sweep.cells(text)
    names = list(dict.fromkeys(cell.design for cell in cells))
    for name in only:
        if name not in names:
            raise ConfigError(
                f"This sweep has no design named {name!r}; its designs are {', '.join(map(repr, names))}."
            )
    asked = [cell for cell in cells if cell.design in only] if only else cells
    check_cost([cell.config for cell in asked], torch.device("cpu"))
    work = functools.partial(run_sweep_cell, out=out, base=base)
    return run_cells(work, asked, KIND, SweepResult.from_dict, out, grid=cells, engine=engine, progress=progress)


def run_sweep_cell(cell: SweepCell, *, out: Path, base: Path) -> SweepResult:
    """Train and analyse one model in `out/runs`, on one thread, so that every engine gives the same numbers."""
    started = time.monotonic()
    made = isinstance(cell.task, AutomatonTask)
    if isinstance(cell.task, AutomatonTask):
        write_automaton(cell.task, out / "data")
    data = DataFiles.of(cell.config.data, out if made else base)
    folder = out / RUNS / cell.name
    trained = train(cell.config, folder, data, threads=1, console=Console(file=io.StringIO()))
    if trained.stopped_by is not None:
        signal.raise_signal(trained.stopped_by)
        raise KeyboardInterrupt
    study = _study(cell, folder, data)
    return _result(cell, trained, study, time.monotonic() - started)


def write_automaton(task: AutomatonTask, folder: Path) -> None:
    """Write `train.txt` and `test.txt`, each whole or not at all; those that are there stay. Raises `StorageError`."""
    paths = [folder / "train.txt", folder / "test.txt"]
    if all(path.is_file() for path in paths):
        return
    for path, documents in zip(paths, automaton_documents(task), strict=True):
        write_atomically(path, ("\n\n".join(documents) + "\n").encode())


def automaton_documents(task: AutomatonTask) -> tuple[list[str], list[str]]:
    """Documents for training and for the test, a function of the task alone."""
    generator = np.random.default_rng(task.seed)
    # Whether a row is kept for the test is a function of the row: a random sum over its bits, modulo.
    key = generator.integers(1, 2**31, task.cells)
    train, test = _draw(generator, task, key, held_out=False), _draw(generator, task, key, held_out=True)
    return train, test


def automaton_row(rows: BitRows, steps: int) -> BitRows:
    """The rows after `steps` steps of rule 60: each cell becomes `cell xor left neighbour`."""
    for _ in range(steps):
        rows = rows ^ np.concatenate([np.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)
    return rows


def _draw(generator: np.random.Generator, task: AutomatonTask, key: BitRows, *, held_out: bool) -> list[str]:
    wanted = task.test_documents if held_out else task.documents
    found: list[str] = []
    while len(found) < wanted:
        rows = generator.integers(0, 2, (4 * _HELD_OUT * wanted if held_out else 2 * wanted, task.cells))
        rows = rows[((rows @ key) % 2**31 % _HELD_OUT == 0) == held_out][: wanted - len(found)]
        steps = generator.integers(1, task.steps + 1, len(rows))
        after = np.stack([automaton_row(rows, number) for number in range(task.steps + 1)])[steps, np.arange(len(rows))]
        found += [
            f"{number}{''.join(map(str, row))}>{''.join(map(str, answer))}"
            for number, row, answer in zip(steps, rows, after, strict=True)
        ]
    return found


def _text_sha256(sweep: Sweep, base: Path) -> str:
    """Of both texts: with others, the cells are others."""
    hashes = DataFiles.of(sweep.data, base).hashes()
    return hashlib.sha256(f"{hashes['train']} {hashes['test']} {hashes['tokenizer']}".encode()).hexdigest()


def _study(cell: SweepCell, folder: Path, data: DataFiles) -> Study:
    architecture = cell.config.architecture
    documents = read_documents(data.test, cell.config.data.template)[: cell.study.prompts]
    of_loops: dict[str, Any] = {"judged_layers": "last", "eigenvalue_search": _SEARCH} if architecture.is_looped else {}
    return analyze(
        folder,
        documents,
        out=folder / _STUDY,
        recurrences=max(cell.config.evaluation.recurrences) if architecture.is_looped else 1,
        horizon=cell.study.horizon,
        batch_size=cell.study.prompts,
        truncate=cell.config.context,
        seed=cell.config.seed,
        track=(),
        skip=parts_except(*_STUDIED, *(_OF_LOOPS if architecture.is_looped else ())),
        threads=1,
        device="cpu",
        **of_loops,
    )


def _result(cell: SweepCell, trained: TrainResult, study: Study, seconds: float) -> SweepResult:
    architecture, results = cell.config.architecture, trained.results
    assert results is not None
    test = results["test"]
    return SweepResult(
        cell=cell,
        layout=results["layout"],
        parameters=results["parameters"],
        depth=architecture.visits(architecture.recurrences),
        tokens=results["training"]["tokens"],
        curve=_curve(RunFolder(trained.folder)),
        loss={int(number): loss for number, loss in test["loss"].items()},
        accuracy={int(number): share for number, share in test["accuracy"].items()},
        unigram_entropy=test["unigram_entropy"],
        bigram_entropy=test["bigram_entropy"],
        dynamics=Dynamics(**dynamics_of(study, Criterion())) if architecture.is_looped else None,
        stages=_stages(cell, study),
        seconds=round(seconds, 1),
    )


def _curve(folder: RunFolder) -> tuple[tuple[int, float], ...]:
    steps = [(entry["step"], entry["loss"]) for entry in folder.entries("step")]
    groups = np.array_split(np.array(steps, dtype=np.float64), min(_CURVE_POINTS, len(steps)))
    return tuple((int(group[-1, 0]), round(float(group[:, 1].mean()), 5)) for group in groups)


def _stages(cell: SweepCell, study: Study) -> PassCurves | None:
    try:
        curves = stage_curves(study, cell.name)
    except StudyError:
        # Every prompt diverged.
        return None
    architecture = cell.config.architecture
    numbers = sorted({1, architecture.recurrences, curves.recurrences})
    return PassCurves(
        measures=MEASURES,
        recurrences=tuple(numbers),
        values=tuple(
            tuple(tuple(_rounded(value) for value in rows[number - 1]) for number in numbers) for rows in curves.values
        ),
        repetition={name: _rounded(repetition(rows[1:])) for name, rows in zip(MEASURES, curves.block, strict=True)}
        if curves.looped
        else {},
    )


def _rounded(value: float) -> float | None:
    """Six digits, which no figure shows; None where there is no number."""
    return finite_or_none(float(f"{value:.6g}"))
