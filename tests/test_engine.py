"""Items are done in this process, in others, or on a Ray cluster: with the same results, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import xarray

from engine_work import Hold, Square
from loopscope import AnalyzeSettings, Study, analyze
from loopscope._util.estimate import Phase
from loopscope.analysis.engine import make_engine
from loopscope.analysis.engine.processes import ProcessEngine
from loopscope.analysis.engine.ray_cluster import RayEngine
from loopscope.analysis.engine.run import WorkerDiedError, run_items
from loopscope.analysis.settings import EngineName
from loopscope.errors import ConfigError, UnforeseenError, WorkerError
from loopscope.experiments.run_sweep import run_sweep
from loopscope.experiments.sweep import Sweep
from small_models import PROMPTS, checkpoint, subject

SETTINGS = AnalyzeSettings(
    recurrences=4,
    horizon=8,
    batch_size=1,
    track=(),
    threads=1,
    eigenvalue_search=8,
    skip=("behaviour", "heads", "maps", "readout"),
)


@pytest.fixture(scope="module", autouse=True)
def head() -> Iterator[str | None]:
    """The address of a Ray cluster of this machine, which takes seconds to answer: tests without it come first."""
    if importlib.util.find_spec("ray") is None:
        yield None
        return
    ray = Path(sys.executable).parent / "ray"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    port = 20000 + os.getpid() % 20000
    start = [str(ray), "start", "--head", f"--port={port}", "--num-cpus=2", "--block"]
    start += ["--include-dashboard=false", "--include-log-monitor=false", "--no-monitor"]
    process = subprocess.Popen(
        start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        parts = [process, *psutil.Process(process.pid).children(recursive=True)]
        for part in parts:
            with suppress(psutil.NoSuchProcess):  # some end with their parent
                part.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster(head: str | None) -> str:
    """The same, once it answers."""
    if head is None:
        pytest.skip("the engine ray needs the package ray")
    deadline = time.monotonic() + 120
    while True:
        try:
            RayEngine(head, 2, 0.0).close()
            return head
        except ConfigError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def engine_of(name: EngineName, request: pytest.FixtureRequest) -> Any:
    if name == "ray":
        return make_engine("ray", 2, request.getfixturevalue("cluster"))
    return make_engine(name, 2 if name == "processes" else None)


def test_a_worker_that_is_ended_gives_up_what_it_holds(tmp_path: Path) -> None:
    folder, worker = tmp_path / "held", ProcessEngine(1).start(Hold(tmp_path / "held"))
    with ThreadPoolExecutor(1) as pool:
        called = pool.submit(worker.call, 0)
        while not folder.with_suffix(".held").exists():
            assert not called.done()
            time.sleep(0.01)
        worker.close()
        with pytest.raises(WorkerDiedError):
            called.result()
    assert list(folder.iterdir()) == []


SERIAL_AND_WORKER: list[dict[str, Any]] = [{}, {"engine": "processes", "workers": 1}]
"""Settings of an analysis that is done here, and of one that is done elsewhere."""


def test_a_model_in_memory_and_interventions_reach_the_workers() -> None:
    model = subject(std=0.1)
    serial, made = (
        analyze(model, PROMPTS, settings=SETTINGS, intervene=("damp=0.5",), **changes) for changes in SERIAL_AND_WORKER
    )
    xarray.testing.assert_identical(made.dataset, serial.dataset)


def test_a_shard_that_diverges_is_a_finding_in_a_worker_too() -> None:
    model = subject(std=0.1)
    with torch.no_grad():
        model.model.embedding.weight[5] = torch.nan
    with pytest.raises(Exception, match="NaN or infinite"):
        analyze(model, PROMPTS, settings=SETTINGS, engine="processes", workers=1)


def test_what_cannot_be_sent_is_said(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="cannot be sent to a worker"):
        run_items(lambda item: item, [1], lambda index, value: None, make_engine("processes", 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"workers": 2}, "--workers needs --engine"),
        ({"engine": "processes", "workers": 0}, "--workers must be at least 1"),
        ({"address": "10.0.0.1:1"}, "add --engine ray"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AnalyzeSettings(**changes)


@pytest.mark.parametrize("name", ["serial", "processes", "ray"])
def test_every_item_is_done_once(name: EngineName, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    found: dict[int, tuple[int, int]] = {}
    (tmp_path / "talk-3").touch()
    run_items(Square(tmp_path), list(range(7)), found.__setitem__, engine_of(name, request))
    assert {index: value for index, (value, _) in found.items()} == {item: item * item for item in range(7)}
    processes = {process for _, process in found.values()}
    assert (processes == {os.getpid()}) == (name == "serial")


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_what_a_dead_worker_had_is_done_again(name: EngineName, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "kill-2").touch()
    found: dict[int, tuple[int, int]] = {}
    said: list[str] = []
    run_items(Square(tmp_path), list(range(6)), found.__setitem__, engine_of(name, request), said.append)
    assert sorted(value for value, _ in found.values()) == [0, 1, 4, 9, 16, 25]
    assert len(said) == 1
    assert "item 3 of 6 is done again" in said[0]


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_an_item_that_kills_every_worker_is_named(
    name: EngineName, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "kill-1").touch()
    found: dict[int, tuple[int, int]] = {}
    with pytest.raises(WorkerError, match="Item 2 of 3 ended 3 workers"):
        run_items(Square(tmp_path, always=True), [0, 1, 2], found.__setitem__, engine_of(name, request))


@pytest.mark.parametrize("name", ["serial", "processes", "ray"])
def test_an_error_of_the_work_is_raised_here(name: EngineName, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "fail-1").touch()
    with pytest.raises(ConfigError, match="item 1 is wrong"):
        run_items(Square(tmp_path), [0, 1, 2], lambda index, value: None, engine_of(name, request))


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_an_unexpected_error_comes_with_its_traceback(
    name: EngineName, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "break-0").touch()
    with pytest.raises(UnforeseenError, match="ZeroDivisionError: item 0") as caught:
        run_items(Square(tmp_path), [0], lambda index, value: None, engine_of(name, request))
    assert "Traceback" in caught.value.__notes__[0]


class Killer:
    """A progress that kills one of two workers as soon as one item is done."""

    def __init__(self, name: str) -> None:
        self.name, self.killed, self.said = name, False, list[str]()

    def start(self, phases: Sequence[Phase]) -> None: ...

    def first_batch(self, memory: int | None) -> None: ...

    def step(self, phase: str, count: int = 1) -> None:
        if self.killed:
            return
        wanted = "ray::_Actor" if self.name == "ray" else "loopscope.analysis.engine.worker"
        # Of other processes some may have ended, and have no command.
        workers = [
            each
            for each in psutil.process_iter(["cmdline", "ppid"])
            if wanted in " ".join(each.info["cmdline"] or [])
            and (self.name == "ray" or each.info["ppid"] == os.getpid())
        ]
        assert len(workers) == 2
        workers[0].kill()
        self.killed = True

    def note(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def serial_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A checkpoint, and what this process alone makes of it."""
    folder = checkpoint(tmp_path_factory.mktemp("study") / "model", std=0.1)
    return folder, analyze(str(folder), [*PROMPTS, *PROMPTS], settings=SETTINGS)


@pytest.mark.parametrize("name", ["processes", "ray"])
def test_a_study_is_the_same_whoever_makes_it_though_a_worker_is_killed(
    name: EngineName, serial_study: tuple[Path, Study], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, serial = serial_study
    changes: dict[str, Any] = {"engine": name, "workers": 2}
    if name == "ray":
        changes["address"] = request.getfixturevalue("cluster")
    killer, prompts, out = Killer(name), [*PROMPTS, *PROMPTS], tmp_path / "study"
    made = analyze(str(folder), prompts, settings=SETTINGS, out=out, progress=killer, **changes)
    assert killer.killed
    assert any("A worker died" in note for note in killer.said)
    xarray.testing.assert_identical(made.dataset, serial.dataset)
    # Who did it is no part of what a study is: another engine goes on with it.
    again = analyze(str(folder), prompts, settings=SETTINGS, out=out)
    xarray.testing.assert_identical(again.dataset, Study.load(out).dataset)


SWEEP = {
    "task": {"kind": "automaton", "cells": 4, "steps": 2, "documents": 64, "test_documents": 8},
    "base": {
        "architecture": {"width": 16, "heads": 1, "kv_heads": 1, "head_dim": 16, "mlp_width": 16, "prelude": 1,
                         "recurrent": 1, "coda": 0, "recurrences": 2, "injection": "linear"},
        "steps": 8, "batch_size": 4, "optimizer": {"warmup_steps": 1}, "checkpoint_every": 2,
    },
    "seeds": 3,
    "controls": [],
    "study": {"prompts": 2, "horizon": 8},
}  # fmt: skip


def test_a_sweep_is_whole_though_a_worker_is_killed(tmp_path: Path) -> None:
    """Training included: the worker that goes on starts from the last checkpoint of the one that died."""
    out, there = tmp_path / "serial", tmp_path / "processes"
    serial = run_sweep(Sweep.from_dict(SWEEP), out, base=tmp_path)
    # Two of them, which also make the text for training at once.
    killer, engine = Killer("processes"), make_engine("processes", 2)
    made = run_sweep(Sweep.from_dict(SWEEP), there, base=tmp_path, engine=engine, progress=killer)
    assert any("A worker died" in note for note in killer.said)
    assert [dataclasses.replace(each, seconds=0.0) for each in made] == [
        dataclasses.replace(each, seconds=0.0) for each in serial
    ]
    weights = [sorted((folder / "runs").glob("*/model.safetensors")) for folder in (there, out)]
    assert len(weights[0]) == len(weights[1]) == 3
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


def test_a_cluster_that_is_not_there_is_said() -> None:
    pytest.importorskip("ray", reason="the engine ray needs the package ray")
    with pytest.raises(ConfigError, match=r"No Ray cluster can be reached at '127\.0\.0\.1:1'"):
        make_engine("ray", 1, "127.0.0.1:1")
