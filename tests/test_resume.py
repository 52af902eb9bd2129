"""Runs that end too early go on where they stopped, and end with the numbers of a run that was never interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xarray
from filelock import FileLock

from loopscope import AnalyzeSettings, Study, analyze
from loopscope._util.netcdf import netcdf
from loopscope.cli import main
from loopscope.errors import FolderBusyError, StorageError, StudyError
from loopscope.study import write_manifest
from small_models import checkpoint

COMMAND = str(Path(sys.executable).with_name("loopscope"))
SKIP = ("behaviour", "stability")
"""Parts that take most of the time of a run so small, and are measured and kept as all others are."""
LONG = 100
"""Bytes, so tokens, of the last prompt, which makes its shard almost twice as large as the others."""
ROOM = 140_000
"""Bytes that hold each shard but the last."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short ones and a long one."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join([*(f"number {n}" for n in range(8)), "x" * LONG]), encoding="utf-8")
    return path


def settings(prompts: Path, **changes: Any) -> AnalyzeSettings:
    """One thread, so that another process adds up in the same order."""
    fields: dict[str, Any] = {
        "recurrences": 16,
        "horizon": 16,
        "batch_size": 2,
        "threads": 1,
        "device": "cpu",
        "skip": SKIP,
    }
    return AnalyzeSettings(prompts=str(prompts), **(fields | changes))


def command(model: Path, prompts: Path, out: Path) -> list[str]:
    numbers = ["--recurrences", "16", "--horizon", "16", "--batch-size", "2", "--threads", "1", "--device", "cpu"]
    return [
        "analyze",
        str(model),
        "--prompts",
        str(prompts),
        *numbers,
        "--skip",
        *SKIP,
        "--no-report",
        "--out",
        str(out),
    ]


@pytest.fixture(scope="module")
def whole(model: Path, prompts: Path) -> xarray.Dataset:
    """What every run has to end with."""
    return analyze(model, settings=settings(prompts)).dataset


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def pause_midway(process: subprocess.Popen[str], out: Path) -> None:
    """Stop the process as soon as the first shard is there."""
    limit = time.monotonic() + 120
    while not shards(out):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "no shard was written"
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)


def end(process: subprocess.Popen[str], out: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a paused process a signal and let it go on. Exit status and standard error."""
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert not (out / "study.nc").exists(), "too late: the run has ended"
    return process.returncode, stderr


def shards(out: Path) -> list[Path]:
    return sorted((out / "shards").glob("[0-9]*.npz"))


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """Writing beyond `size` fails, as it does on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def template(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was given no room for its last shard."""
    out = tmp_path_factory.mktemp("template") / "study"
    with no_file_larger_than(ROOM), pytest.raises(StorageError):
        analyze(model, settings=settings(prompts), out=out)
    assert len(shards(out)) == 4
    return out


@pytest.fixture
def interrupted(template: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(template, tmp_path / "study"))


def test_a_run_that_was_killed_goes_on(
    model: Path, prompts: Path, whole: xarray.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    arguments = command(model, prompts, out)
    process = begin(arguments)
    pause_midway(process, out)
    status, _ = end(process, out, signal.SIGKILL)
    assert status == -signal.SIGKILL
    with pytest.raises(StudyError, match="not finished"):
        Study.load(out)
    done = len(shards(out))
    assert 1 <= done < 5
    main(arguments)
    assert f"Going on with {out}: {done} of 5 shards are done." in capsys.readouterr().err
    xarray.testing.assert_identical(Study.load(out).dataset, whole)
    assert not shards(out)
    before = contents(out)
    main(arguments)
    assert "already holds this study, finished; nothing to measure" in capsys.readouterr().err
    assert contents(out) == before
    (out / "tokens.jsonl").unlink()
    with pytest.raises(SystemExit):
        main(arguments)
    assert "already holds" not in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_finished_and_a_second_process_has_to_wait(
    model: Path, prompts: Path, whole: xarray.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    arguments = command(model, prompts, out)
    process = begin(arguments)
    pause_midway(process, out)
    with pytest.raises(FolderBusyError, match="Another loopscope process is writing"):
        analyze(model, settings=settings(prompts), out=out)
    status, stderr = end(process, out, signal.SIGINT)
    assert status == 130
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("loopscope: interrupted; what was finished is kept")
    assert shards(out)
    main(arguments)
    assert "shards are done" in capsys.readouterr().err
    xarray.testing.assert_identical(Study.load(out).dataset, whole)


def test_a_full_disk_ends_a_real_process_with_a_sentence(
    model: Path, prompts: Path, whole: xarray.Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "study"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

    process = subprocess.run(
        [COMMAND, *command(model, prompts, out)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith(f"loopscope: There is no room left to write {out / 'shards' / '00004.npz'}; ")
    assert len(shards(out)) == 4
    assert sorted(path.name for path in (out / "shards").iterdir()) == [f"0000{index}.npz" for index in range(4)]
    xarray.testing.assert_identical(analyze(model, settings=settings(prompts), out=out).dataset, whole)


def test_a_disk_that_is_full_at_the_very_end_loses_nothing(
    model: Path, prompts: Path, whole: xarray.Dataset, interrupted: Path
) -> None:
    # Room for the last shard, but not for the study.
    size = len(netcdf(whole)) - 1
    with no_file_larger_than(size), pytest.raises(StorageError, match=r"no room left to write .*study\.nc"):
        analyze(model, settings=settings(prompts), out=interrupted)
    assert len(shards(interrupted)) == 5
    xarray.testing.assert_identical(analyze(model, settings=settings(prompts), out=interrupted).dataset, whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 300),
        lambda path: path.unlink(),
    ],
    ids=["cut", "empty", "garbage", "missing"],
)
def test_a_damaged_shard_is_measured_again(
    model: Path, prompts: Path, whole: xarray.Dataset, interrupted: Path, damage: Callable[[Path], object]
) -> None:
    damage(interrupted / "shards" / "00002.npz")
    xarray.testing.assert_identical(analyze(model, settings=settings(prompts), out=interrupted).dataset, whole)


@pytest.mark.parametrize("left", [".manifest.json.x1y2z3_4.part", "manifest.json", ".lock"])
def test_a_run_that_was_killed_at_its_very_start_goes_on(model: Path, prompts: Path, tmp_path: Path, left: str) -> None:
    few = settings(prompts, limit=2)
    wanted = analyze(model, settings=few, out=tmp_path / "whole")
    out = tmp_path / "study"
    out.mkdir()
    write_manifest(out, {**wanted.manifest, "status": "running"})
    content = (out / "manifest.json").read_text(encoding="utf-8")
    (out / "manifest.json").unlink()
    (out / left).write_text({"manifest.json": content, ".lock": ""}.get(left, content[:50]), encoding="utf-8")
    xarray.testing.assert_identical(analyze(model, settings=few, out=out).dataset, wanted.dataset)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"horizon": 20}, "settings.horizon was 16, now 20"),
        ({"recurrences": 23}, "settings.recurrences was 16, now 23"),
        ({"seed": 1}, "settings.seed was 0, now 1"),
        ({"batch_size": 3}, "settings.batch_size was 2, now 3"),
        ({"dtype": "float64"}, "model.dtype was 'float32', now 'float64'"),
        ({"limit": 3}, "prompts.count was 9, now 3"),
        ({"skip": ("readout",)}, "settings.skip"),
    ],
)
def test_another_study_in_the_folder_is_refused_and_kept(
    model: Path, prompts: Path, interrupted: Path, changes: dict[str, object], named: str
) -> None:
    before = contents(interrupted)
    with pytest.raises(StudyError, match="holds another study") as caught:
        analyze(model, settings=settings(prompts, **changes), out=interrupted)
    assert named in str(caught.value)
    assert "choose another --out" in str(caught.value)
    assert contents(interrupted) == before


def test_another_model_in_the_folder_is_refused(interrupted: Path, prompts: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "model", seed=1)
    with pytest.raises(StudyError, match=r"model\.weights_sha256 was"):
        analyze(other, settings=settings(prompts), out=interrupted)


def test_what_changes_no_number_may_change(
    model: Path, prompts: Path, whole: xarray.Dataset, interrupted: Path
) -> None:
    again = analyze(model, settings=settings(prompts, horizon_method="second-pass"), out=interrupted)
    xarray.testing.assert_identical(again.dataset, whole)
    moved = model.rename(model.with_name("moved"))
    try:
        analyze(moved, settings=settings(prompts, keep_limit=1), out=interrupted)
    finally:
        moved.rename(model)


def test_a_folder_with_other_files_is_refused_and_kept(model: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    with pytest.raises(StudyError, match=r"already holds other files .notes\.txt.*new or empty folder"):
        analyze(model, settings=settings(prompts), out=tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_whose_manifest_is_damaged_is_refused_and_kept(model: Path, prompts: Path, interrupted: Path) -> None:
    (interrupted / "manifest.json").write_text("{", encoding="utf-8")
    before = contents(interrupted)
    with pytest.raises(StudyError, match=r"manifest\.json is damaged"):
        analyze(model, settings=settings(prompts), out=interrupted)
    assert contents(interrupted) == before


def test_a_folder_that_is_held_is_left_alone(model: Path, prompts: Path, interrupted: Path) -> None:
    before = contents(interrupted)
    with FileLock(interrupted / ".lock"), pytest.raises(FolderBusyError, match="wait for it or choose another --out"):
        analyze(model, settings=settings(prompts), out=interrupted)
    (interrupted / ".lock").unlink(missing_ok=True)
    assert contents(interrupted) == before


def test_the_manifest_of_a_run_in_progress_says_so(interrupted: Path) -> None:
    manifest = json.loads((interrupted / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "running"
    assert len((interrupted / "tokens.jsonl").read_text(encoding="utf-8").splitlines()) == 9
