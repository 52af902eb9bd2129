"""Experiments over grids of random models: known outcomes, cells that are done once, and what a user is told."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loopscope.cli import main
from loopscope.errors import ConfigError, StudyError
from loopscope.experiments.cells import CELLS, Cell, CellOutcome, CellResult, GridFolder
from loopscope.experiments.random_findings import (
    PAPER,
    architecture_grid,
    boundaries,
    phase_answers,
    phase_grid,
    reproduction,
)
from loopscope.experiments.random_models import run_cell
from loopscope.experiments.run import run_grid

SMALL: dict[str, Any] = {"width": 32, "tokens": 6, "recurrences": 16}


def cell(**changes: Any) -> Cell:
    fields: dict[str, Any] = {"norm": "pre", "injection": "linear", "depth": 2, "seed": 0, **SMALL, **changes}
    return Cell(**fields)


def result(**changes: Any) -> CellResult:
    fields: dict[str, Any] = {
        "cell": cell(),
        "outcome": CellOutcome.FIXED_POINT,
        "settling": "fixed point",
        "degeneracy": 0.5,
        "drift": 0.0,
        "norm_growth": 1.0,
        "counts": (1, 2),
        "distance": (0.5, None),
        "norm": (1.0, 1.0),
        "radius": 0.5,
        "radius_median": 0.4,
        "radius_error": 1e-6,
        "predicted": {"fixed point": 6},
        "observed_rate": 0.5,
    }
    return CellResult(**(fields | changes))


def test_the_designs_of_the_paper_end_as_it_says() -> None:
    """One seed, 4 layers; the command runs three depths and three seeds."""
    cells = [Cell(norm=norm, injection=injection, depth=4, seed=0) for norm, injection in PAPER]
    found = run_grid(cells, "architectures")
    assert [each.outcome for each in found] == list(PAPER.values())
    assert [row.reproduced for row in reproduction(found)] == [True] * 6
    settles = [each for each in found if each.outcome is CellOutcome.FIXED_POINT]
    for each in settles:
        assert each.radius is not None
        assert each.observed_rate is not None
        assert each.observed_rate == pytest.approx(each.radius, abs=0.1)
    degenerate = found[list(PAPER).index(("pre", "none"))]
    assert degenerate.degeneracy is not None
    assert degenerate.degeneracy > 0.999
    assert degenerate.norm_growth is not None
    assert degenerate.norm_growth > 1.9


def test_a_cell_is_a_function_of_itself_alone() -> None:
    one, other = run_cell(cell()), run_cell(cell())
    assert {**one.to_dict(), "seconds": 0} == {**other.to_dict(), "seconds": 0}
    assert run_cell(cell(seed=1)).distance != one.distance


def test_results_come_back_from_their_files(tmp_path: Path) -> None:
    with GridFolder(tmp_path / "grid", "architectures", CellResult.from_dict) as folder:
        folder.write(result())
        assert folder.read(cell()) == result()
        assert folder.read(cell(seed=5)) is None
        next((tmp_path / "grid" / CELLS).iterdir()).write_text("{half a fil")
        assert folder.read(cell()) is None


def test_cells_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    cells = [cell(seed=seed) for seed in range(3)]
    with GridFolder(tmp_path / "grid", "architectures", CellResult.from_dict) as folder:
        folder.write(result(cell=cells[1], settling="as it was"))
    found = run_grid(cells, "architectures", tmp_path / "grid")
    assert [each.cell for each in found] == cells
    assert found[1].settling == "as it was"
    assert run_grid(cells, "architectures", tmp_path / "grid") == found


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_experiment_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "grid"
    arguments = ["experiment", "architectures", "--out", str(out), "--width", "32", "--recurrences", "16",
                 "--depth", "2", "--norm", "pre", "--injection", "linear", "none", "--seeds", "6"]  # fmt: skip
    started = subprocess.Popen(
        [sys.executable, "-m", "loopscope", *arguments, "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((out / CELLS).glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    done = {path.name: path.read_bytes() for path in (out / CELLS).glob("*.json")}
    assert 0 < len(done) < 12
    main([*arguments, "--engine", "serial"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("reproduced by recurrence ")
    assert len(list((out / CELLS).glob("*.json"))) == 12
    assert all((out / CELLS / name).read_bytes() == content for name, content in done.items())


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="already holds other files"):
        run_grid([cell()], "architectures", tmp_path)
    with GridFolder(tmp_path / "phase", "phase", CellResult.from_dict):
        pass
    with pytest.raises(StudyError, match="another experiment"):
        run_grid([cell()], "architectures", tmp_path / "phase")


@pytest.mark.parametrize("changes", [{"depth": 0}, {"width": 33}, {"std": 0.0}, {"seed": -1}, {"recurrences": 4}])
def test_a_cell_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must"):
        cell(**changes)


def test_the_boundary_lies_where_the_curves_cross() -> None:
    found = [
        result(cell=cell(std=std, judged=True), radius=radius, verdicts={"fixed point": settled, "orbit": 6 - settled})
        for std, radius, settled in ((0.01, 0.5, 6), (0.02, 0.75, 6), (0.04, 1.25, 0), (0.08, None, 0))
    ]
    (boundary,) = boundaries(found)
    assert boundary.scales == (0.01, 0.02, 0.04, 0.08)
    assert boundary.predicted == pytest.approx(0.02 * 2**0.5)
    assert boundary.observed == pytest.approx(0.02 * 2**0.5)
    assert boundary.tends == ("fixed point", "fixed point", "orbit", "orbit")


@pytest.mark.parametrize(("shifts", "outcome"), [((0, 0.01, -0.01, 0.02, 0), "yes"), ((0, 0.9), "cannot tell")])
def test_whether_eigenvalues_say_where_stability_is_lost_is_for_seeds_to_tell(
    shifts: tuple[float, ...], outcome: str
) -> None:
    """Predicted is the scale times a shift of each seed; of two seeds that differ nothing is concluded."""
    found = [
        result(
            cell=cell(std=std, seed=seed, judged=True),
            radius=1 + math.log2(std / 0.02) - 0.5 - shift,
            verdicts={"fixed point": settled, "orbit": 6 - settled},
        )
        for seed, shift in enumerate(shifts)
        for std, settled in ((0.01, 6), (0.02, 6), (0.04, 0), (0.08, 0))
    ]
    (answer,) = phase_answers(found)
    assert answer.outcome == outcome
    assert f"over {len(shifts)} seeds" in answer.sentence


def test_a_phase_diagram_of_a_tiny_design(tmp_path: Path) -> None:
    cells = phase_grid(
        norms=("pre",), injections=("linear",), scales=(0.02, 0.4), seeds=1, depth=2, width=32, recurrences=16
    )
    (boundary,) = boundaries(run_grid(cells, "phase", tmp_path / "phase"))
    assert boundary.settles[0] == 1
    assert boundary.settles[1] == 0


def test_the_grid_has_every_combination() -> None:
    cells = architecture_grid(depths=(4, 12), seeds=2)
    assert len(cells) == len(set(cells)) == 4 * 3 * 2 * 2
    assert len({each.name for each in cells}) == len(cells)


def test_what_was_not_run_is_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--norm", "pre", "--injection", "linear", "--depth", "2", "--seeds", "1", "--width", "32"]
    main(["experiment", "architectures", "--out", str(tmp_path / "grid"), "--engine", "serial", *one])
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "reproduced by recurrence 256: 1 of 6"
    assert said.count("not run") >= 5
    entry = json.loads(next((tmp_path / "grid" / CELLS).iterdir()).read_text())
    assert entry["outcome"] == "fixed point"


def test_wrong_settings_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["experiment", "architectures", "--out", str(tmp_path / "grid"), "--width", "33"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "multiple of 32" in said
