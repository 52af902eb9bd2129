"""A kill at every operation on a file: what is run again then gives the same arrays, and nothing is left over.

    python tools/crash.py [EVERY]

Of an analysis, a training run and a sweep, each a process of its own (a fork of one that has imported loopscope) that
is ended by SIGKILL right before its n-th operation on a file in its folder; EVERY tries every so many operations alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray

import loopscope.cli
import loopscope.experiments.run_sweep
from fault_folders import SWEEP
from fault_inputs import ANALYZE, tiny
from loopscope import Study

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")


def run(arguments: list[str], out: Path, kill_at: int | None) -> int:
    """In a fork; the number of its operations, or -1 where it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def hook(event: str, details: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS and str(details[0]).startswith(str(out)):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                sys.addaudithook(hook)
                loopscope.cli.main(arguments)
            code = 0
        finally:
            os.write(writer, str(count).encode())
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 100)
    os.close(reader)
    if os.WIFSIGNALED(status):
        return -1
    assert os.waitstatus_to_exitcode(status) == 0, arguments
    return int(said)


def names(out: Path) -> set[str]:
    """Files but the pages and what was measured of time."""
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def studies(out: Path) -> dict[str, xarray.Dataset]:
    """What was found."""
    return {str(path.parent.relative_to(out)): Study.load(path.parent).dataset for path in out.rglob("study.nc")}


def weights(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("model.safetensors")}


def campaign(name: str, command: Callable[[Path], list[str]], every: int) -> int:
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        operations = run(command(whole), whole, None)
        wanted, found_names, found_weights = studies(whole), names(whole), weights(whole)
        wrong = tried = killed = 0
        for number in range(1, operations + 1, every):
            out = Path(place) / f"out-{number}"
            tried += 1
            killed += run(command(out), out, number) < 0
            run(command(out), out, None)
            same = studies(out)
            alike = same.keys() == wanted.keys() and all(same[each].identical(wanted[each]) for each in wanted)
            if not alike or names(out) != found_names or weights(out) != found_weights:
                wrong += 1
                print(f"{name}, operation {number}: {sorted(names(out) ^ found_names) or 'other numbers'}")
        print(
            f"{name:10s} {operations:4d} operations, {tried:4d} tried, {killed:4d} killed, {wrong:3d} wrong", flush=True
        )
    return wrong


def main(every: int) -> int:
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = tiny(folder / "model")
        (folder / "t.txt").write_text("one two three four five six seven eight\n\n" * 20)
        training = {
            "architecture": SWEEP["base"]["architecture"] | {"vocab_size": 300}, "steps": 4, "batch_size": 2,
            "data": {"train": "t.txt", "test": "t.txt"}, "context": 8, "log_every": 1, "checkpoint_every": 2,
            "evaluation": {"recurrences": [1], "every": 2},
        }  # fmt: skip
        (folder / "train.json").write_text(json.dumps(training))
        (folder / "sweep.json").write_text(json.dumps(SWEEP))
        more = ["--text", "one two", "three", "four five six", "--batch-size", "1"]
        wrong = campaign("analyze", lambda out: ["analyze", str(model), "--out", str(out), *ANALYZE, *more], every)
        wrong += campaign("train", lambda out: ["train", str(folder / "train.json"), "--out", str(out)], every)
        sweep = ["experiment", "training", str(folder / "sweep.json"), "--engine", "serial"]
        wrong += campaign("sweep", lambda out: [*sweep, "--out", str(out)], every)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
