"""Sweeps over trained models: their cells, tasks, controls and files; a killed sweep; and what their numbers say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from loopscope.analysis.engine import make_engine
from loopscope.cli import main
from loopscope.errors import ConfigError, StudyError
from loopscope.experiments.cells import CELLS
from loopscope.experiments.load import load_experiment
from loopscope.experiments.run_sweep import automaton_documents, automaton_row, run_sweep, run_sweep_cell
from loopscope.experiments.seeds import Told, fisher_p, interval
from loopscope.experiments.sweep import Sweep, control_architecture
from loopscope.experiments.sweep_cells import AutomatonTask, SweepResult
from loopscope.experiments.sweep_findings import (
    BIGRAM,
    TRAINING_COLUMNS,
    advice,
    control_results,
    summaries,
    training_rows,
)
from loopscope.models.architecture import Architecture

TINY: dict[str, Any] = {
    "task": {"kind": "automaton", "cells": 4, "steps": 2, "documents": 64, "test_documents": 8},
    "base": {
        "architecture": {
            "width": 16,
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 16,
            "mlp_width": 16,
            "prelude": 1,
            "recurrent": 1,
            "coda": 0,
            "recurrences": 2,
            "injection": "linear",
        },
        "steps": 4,
        "batch_size": 4,
        "optimizer": {"warmup_steps": 1},
        "log_every": 1,
        "checkpoint_every": 1,
    },
    "seeds": 1,
    "study": {"prompts": 2, "horizon": 8, "beyond": 4},
}


def sweep(**changes: Any) -> Sweep:
    return Sweep.from_dict({**TINY, **changes})


def without_time(result: SweepResult) -> SweepResult:
    return dataclasses.replace(result, seconds=0.0)


def test_the_automaton_is_rule_60() -> None:
    rows = np.random.default_rng(0).integers(0, 2, (20, 9))
    for row, after in zip(rows, automaton_row(rows, 3), strict=True):
        expected = list(row)
        for _ in range(3):
            expected = [expected[0], *(a ^ b for a, b in itertools.pairwise(expected))]
        assert list(after) == expected


def test_rows_of_the_test_text_are_never_trained_on() -> None:
    task = AutomatonTask(cells=8, documents=2000, test_documents=200)
    train, test = automaton_documents(task)
    assert (len(train), len(test)) == (2000, 200)
    assert not {text[1:9] for text in train} & {text[1:9] for text in test}
    assert automaton_documents(task) == (train, test)
    for text in train[:50]:
        row = np.array([[int(bit) for bit in text[1:9]]])
        assert text[9] == ">"
        assert [int(bit) for bit in text[10:]] == list(automaton_row(row, int(text[0]))[0])


def test_grids_are_products_and_a_design_occurs_once() -> None:
    found = sweep(
        grids=[
            {"architecture.recurrent": [1, 2], "architecture.injection": ["none", "linear"]},
            {"architecture.recurrent": [2]},
        ],
        recipes={"damped": {"architecture.eta": 0.5}},
        controls=["equal-depth"],
        seeds=2,
    ).cells()
    looped = [cell for cell in found if cell.control is None]
    assert [cell.design for cell in looped[::2]] == [
        "damped", "injection=none", "base", "recurrent=2 injection=none", "recurrent=2",
    ]  # fmt: skip
    assert [cell.seed for cell in looped] == [0, 1] * 5
    # As deep as (1, 1 x 2, 0) and (1, 2 x 2, 0).
    controls = [cell for cell in found if cell.control is not None]
    assert [cell.config.architecture.layers for cell in controls] == [3, 3, 5, 5]
    assert len({cell.name for cell in found}) == len(found)
    assert looped[0].config.evaluation.recurrences == (1, 2, 4, 8)


@pytest.mark.parametrize("injection", ["none", "linear", "bounded"])
def test_a_control_has_the_parameters_or_the_depth(injection: str) -> None:
    looped = Architecture.from_dict(
        {"vocab_size": 40, "width": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "mlp_width": 64, "prelude": 1,
         "recurrent": 1, "coda": 1, "recurrences": 4, "injection": injection, "eta": 0.5}
    )  # fmt: skip
    deep, large = (control_architecture(looped, control) for control in ("equal-depth", "equal-parameters"))
    assert deep.layers == 6
    assert not deep.is_looped
    assert large.layers == 3
    assert large.parameters == pytest.approx(looped.parameters, rel=0.06)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[SweepResult]]:
    """A tiny sweep by a worker."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    asked = sweep(recipes={"plain": {}, "stepped": {"penalties.last_step": 0.5}})
    return out, run_sweep(asked, out, base=Path(), engine=make_engine("processes", 1))


def test_a_sweep_trains_analyses_and_compares(ran: tuple[Path, list[SweepResult]]) -> None:
    out, results = ran
    plain, stepped, deep, large = results
    assert (plain.cell.design, stepped.cell.design) == ("plain", "stepped")
    assert sorted(plain.loss) == [1, 2, 4, 8]
    assert plain.loss != stepped.loss
    assert plain.dynamics is not None
    assert sum(plain.dynamics.verdicts.values()) == 2 * 11  # the frame's begin, and 10 characters
    assert plain.stages is not None
    assert plain.stages.recurrences == (1, 2, 8)
    assert deep.dynamics is None
    assert list(deep.loss) == [1]
    assert control_results(results, plain, "equal-depth") == deep
    assert control_results(results, plain, "equal-parameters") == large
    # The last document has no token behind it, which its window would need.
    documents = (out / "data" / "test.txt").read_text().split()[:-1]
    bits = "".join(document.partition(">")[2] for document in documents)
    ones = bits.count("1") / len(bits)
    assert len(bits) == 7 * 4
    assert plain.unigram_entropy == pytest.approx(-ones * math.log(ones) - (1 - ones) * math.log(1 - ones))
    loaded = load_experiment(out)
    assert loaded.finished
    assert list(loaded.trained) == results


def test_a_cell_is_a_function_of_itself_and_the_text(ran: tuple[Path, list[SweepResult]], tmp_path: Path) -> None:
    """In this process, into another folder: what the worker found."""
    result = ran[1][1]
    assert without_time(run_sweep_cell(result.cell, out=tmp_path, base=tmp_path)) == without_time(result)


def test_finished_cells_are_not_done_again(ran: tuple[Path, list[SweepResult]]) -> None:
    out, results = ran
    stamps = {path: path.stat().st_mtime_ns for path in (out / CELLS).iterdir()}
    again = sweep(recipes={"plain": {}, "stepped": {"penalties.last_step": 0.5}})
    assert run_sweep(again, out, base=Path(), only=["plain"]) == results[:1]
    assert {path: path.stat().st_mtime_ns for path in (out / CELLS).iterdir()} == stamps
    loaded = load_experiment(out)
    assert (list(loaded.trained), loaded.finished) == (results, True)
    with pytest.raises(ConfigError, match="no design named 'other'"):
        run_sweep(again, out, base=Path(), only=["other"])


def test_some_designs_alone_are_no_finished_sweep(ran: tuple[Path, list[SweepResult]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = sweep(recipes={"plain": {}, "stepped": {"penalties.last_step": 0.5}}, controls=[])
    (found,) = run_sweep(asked, out, base=Path(), only=["plain"])
    assert without_time(found) == without_time(ran[1][0])
    loaded = load_experiment(out)
    assert (list(loaded.trained), loaded.finished) == ([found], False)


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_sweep_goes_on_with_the_same_numbers(
    ran: tuple[Path, list[SweepResult]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "sweep.json", tmp_path / "out"
    recipes = {"plain": {}, "stepped": {"penalties.last_step": 0.5}}
    file.write_text(json.dumps({**TINY, "recipes": recipes}))
    arguments = ["experiment", "training", str(file), "--out", str(out)]
    command = [sys.executable, "-m", "loopscope", *arguments, "--workers", "1"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((out / CELLS).glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(started.pid).children()
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert 0 < len(list((out / CELLS).glob("*.json"))) < 4
    main([*arguments, "--engine", "serial"])
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("report  ")
    assert "plain" in said
    found = load_experiment(out).trained
    assert [without_time(each) for each in found] == [without_time(each) for each in ran[1]]
    page = (out / "report.html").read_text()
    assert "Which trained designs do best" in page
    assert "stepped" in page
    assert BIGRAM in page


def made_up(
    result: SweepResult, seed: int, design: str, losses: dict[int, float], settled: int = 0, eta: float = 1.0
) -> SweepResult:
    """With the losses given, and that many of ten tokens settled; designs differ in their damping."""
    config = dataclasses.replace(result.cell.config, seed=seed)
    dynamics = result.dynamics
    if dynamics is not None:
        config = dataclasses.replace(config, architecture=dataclasses.replace(config.architecture, eta=eta))
        verdicts = {"fixed point": settled, "bounded": 10 - settled}
        dynamics = dataclasses.replace(dynamics, verdicts=verdicts)
    cell = dataclasses.replace(result.cell, design=design, config=config)
    return dataclasses.replace(result, cell=cell, loss=losses, dynamics=dynamics)


def seeds_of(
    one: SweepResult, design: str, trained: list[float], beyond: list[float], settled: int = 0, eta: float = 1.0
) -> list[SweepResult]:
    pairs = enumerate(zip(trained, beyond, strict=True))
    return [made_up(one, seed, design, {1: 3.0, 2: here, 8: there}, settled, eta) for seed, (here, there) in pairs]


def test_advice_says_what_the_seeds_carry(ran: tuple[Path, list[SweepResult]]) -> None:
    one = dataclasses.replace(ran[1][0], bigram_entropy=1.2)
    losses = [1.00, 1.01, 0.99, 1.02, 0.98]
    dear = [loss + 0.5 for loss in losses]
    results = [
        *seeds_of(one, "plain", losses, [loss + 1 for loss in losses], 1),
        *seeds_of(one, "steady", [loss - 0.1 for loss in losses], [loss - 0.1 for loss in losses], 9),
        *seeds_of(one, "dear", dear, dear, 9),
        # Kept in four of five seeds.
        *seeds_of(one, "unsure", losses, [*losses[:4], 3.0], 9),
    ]
    found = {answer.key: answer for answer in advice(results)}
    keepers = found["keepers"].sentence
    assert found["keepers"].verdict == "2 of 4"
    assert "Kept: 2 of 4 (steady; dear). Lost: 1 of 4 (plain). Undecided by the seeds: 1 of 4 (unsure)." in keepers
    assert "5 seeds per design" in keepers
    assert found["recipes"].verdict == "yes, steady"
    assert "dear" not in found["recipes"].sentence
    # Two designs against one: no test tells them apart.
    assert (found["settling"].verdict, found["settling"].outcome) == ("2 of 2, against 0 of 1", "cannot tell")
    assert found["bigram"].outcome == "partly"
    assert "1.200 nats" in found["bigram"].sentence
    assert "Above it: 1 of 4 (dear)" in found["bigram"].sentence
    kept = {row[0]: row[TRAINING_COLUMNS.index("kept")] for row in training_rows(summaries(results))}
    assert kept == {
        "steady": "yes, 5 of 5", "plain": "no, 0 of 5", "unsure": "undecided, 4 of 5", BIGRAM: "–",
        "dear": "yes, 5 of 5",
    }  # fmt: skip
    assert list(kept)[-2:] == [BIGRAM, "dear"]


def test_two_seeds_that_differ_tell_nothing(ran: tuple[Path, list[SweepResult]]) -> None:
    """The best of two by the means, and no sentence that says so."""
    one = ran[1][0]
    results = [
        *seeds_of(one, "plain", [1.0, 1.1], [2.0, 4.0]),
        *seeds_of(one, "better", [0.9, 0.7], [0.95, 0.7], 9),
    ]
    found = {answer.key: answer for answer in advice(results)}
    assert found["keepers"].outcome == "cannot tell"
    assert "Undecided by the seeds: 2 of 2" in found["keepers"].sentence
    assert "recipes" not in found  # whether the plain loss is lost is not known either
    single = {answer.key: answer for answer in advice([results[0], results[2]])}
    assert single["keepers"].outcome == "cannot tell"


def test_a_control_that_designs_share_counts_once(ran: tuple[Path, list[SweepResult]]) -> None:
    """However many designs stand beside it, five controls are five."""
    one, _, deep, _ = ran[1]
    controls = [1.0, 1.2, 0.9, 1.1, 0.8]
    gaps = [0.05, -0.02, 0.04, 0.01, -0.03]
    trained = [control + gap for control, gap in zip(controls, gaps, strict=True)]
    beside = [made_up(deep, seed, deep.cell.design, {1: loss}) for seed, loss in enumerate(controls)]
    for designs in (1, 11):
        looped = [
            each
            for number in range(designs)
            for each in seeds_of(one, f"design {number}", trained, trained, eta=1 - number / 20)
        ]
        found = {answer.key: answer for answer in advice([*looped, *beside])}["against-equal-depth"]
        assert f"The mean difference is {interval(gaps)} nats over 5 seeds" in found.sentence
        assert "each of the 5 controls counts once" in found.sentence
        assert found.outcome == "cannot tell"


def test_an_interval_over_seeds_is_students() -> None:
    # 4.303 and 6.205 are the 97.5 % and 98.75 % quantiles of Student's t with two degrees of freedom.
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert interval([1.0, 2.0, 3.0], 2).high - 2.0 == pytest.approx(6.205 / math.sqrt(3), rel=1e-3)
    assert interval([1.0]).high == math.inf


def test_of_designs_without_an_effect_one_sweep_in_twenty_says_something() -> None:
    """The intervals hold together: 11 designs of 5 seeds whose means are zero."""
    generator = np.random.default_rng(0)
    sweeps = generator.normal(size=(1000, 11, 5))
    said = sum(len(Told.of({str(i): list(row) for i, row in enumerate(each)}).on(0)) < 11 for each in sweeps)
    assert 0.03 < said / len(sweeps) < 0.07


def test_fishers_test_of_the_lady_tasting_tea() -> None:
    """Design of Experiments, 1935: four of four cups right has the probability 1 in 70, or 2 in 70 on both sides."""
    assert fisher_p((4, 0), (0, 4)) == pytest.approx(2 / 70)
    assert fisher_p((3, 1), (1, 3)) == pytest.approx(34 / 70)
    assert fisher_p((2, 2), (2, 2)) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"seed": 1}, "'seed'"),
        ({"task": {"kind": "automaton", "cells": 1}}, "task.cells"),
        ({"grids": [{"architecture.recurent": [1]}]}, "recurent"),
        ({"grids": [{"architecture.recurrent": 2}]}, "list of values"),
        ({"grids": {"architecture.recurrent": [2]}}, "list of objects"),
        ({"grids": [{"architecture.recurrent": [0]}]}, "no loop"),
        (
            {"recipes": {"lost": {"architecture.injection": "none", "architecture.state_init": "normal"}}},
            "never enters",
        ),
        ({"base": {**TINY["base"], "context": 99}}, "leave it out"),
        ({"base": {**TINY["base"], "seed": 3}}, "leave it out"),
        ({"grids": [{"seed": [1, 2]}]}, "seed is decided by the sweep"),
        ({"recipes": {"other text": {"data.train": "other.txt"}}}, "data.train is decided by the sweep"),
        ({"base": {**TINY["base"], "evaluation": {"recurrences": [1]}}}, "decided by the sweep"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        sweep(**changes).cells()
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_no_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StudyError, match="not an experiment"):
        load_experiment(tmp_path)
    commands = [
        (["report", str(tmp_path), "--out", str(tmp_path / "page.html")], "not an experiment"),
        (["training", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")], "cannot be read"),
    ]
    for arguments, reason in commands:
        with pytest.raises(SystemExit) as end:
            main(["experiment", *arguments])
        said = capsys.readouterr().err
        assert (end.value.code, said.count("\n")) == (2, 1)
        assert reason in said


def test_a_text_that_is_not_there_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    base = {**TINY["base"], "context": 16, "architecture": {**TINY["base"]["architecture"], "vocab_size": 300}}
    asked = sweep(task={"kind": "gsm8k", "folder": "nowhere"}, base=base)
    with pytest.raises(ConfigError, match="cannot be read"):
        run_sweep(asked, tmp_path / "out", base=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "seeds"), [("recipes", 5), ("architectures-trained", 2)])
def test_the_shipped_results_are_those_of_their_sweep(name: str, seeds: int) -> None:
    """Every cell, and for every looped model both controls, though one may be the control of several designs."""
    folder = Path(__file__).parent.parent / "results" / name
    experiment = load_experiment(folder)
    found = experiment.trained
    assert experiment.finished
    assert [each.cell for each in found] == Sweep.load(folder / "sweep.json").cells(found[0].cell.text_sha256)
    assert {path.stem for path in (folder / CELLS).iterdir()} == {each.cell.name for each in found}
    looped = [each for each in found if each.cell.control is None]
    assert {len(each.results) for each in summaries(found)} == {seeds}
    assert all(
        control_results(found, each, control) for each in looped for control in ("equal-depth", "equal-parameters")
    )
    assert advice(found)
