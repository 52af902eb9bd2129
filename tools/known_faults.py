"""Inputs that once ended in a traceback, without an answer, or with more memory than there is, run again.

    python tools/known_faults.py [KIND ...]

Each is a command line in a process of its own, a fork of one that has imported loopscope, with limits of a minute and
4 GiB. Right is success, or one sentence of at most 700 characters with a status that is not 0 and not 70. Prints the
counts by kind and what was not right; ends with 1 if there was any.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import loopscope.cli
import loopscope.experiments.run_sweep
import loopscope.report.page.write
from fault_folders import studies, sweeps, training, trajectories
from fault_inputs import ANALYZE, Fault, configs, options, prompts, status_of, templates, tokenizers

SECONDS, MEMORY, LONGEST = 60, 4 * 2**30, 700


def answered(fault: Fault, folder: Path) -> str | None:
    """What is wrong with the answer; None for a right one."""
    arguments = fault.make(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 10**7}
    child = os.fork()
    if not child:
        _limited(arguments, folder.parent / "said")
    started = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no answer in {SECONDS} s"
        time.sleep(0.01)
    said = (folder.parent / "said").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 2):
        return f"status {code}: {said[-300:]}"
    if "Traceback" in said:
        return f"traceback: {said[-300:]}"
    if code and (len(said) > LONGEST + 3000 * ("╭" in said) or not said.strip()):
        return f"a message of {len(said):,} characters: {said[:200]}"
    changed = [path.name for path, content in before.items() if not path.exists() or path.read_bytes() != content]
    if code and [name for name in changed if not name.endswith(".html")]:
        return f"changed {changed[0]}"
    return None


def _limited(arguments: list[str], said: Path) -> None:
    """The child: never returns."""
    code = 99
    try:
        os.setsid()
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = status_of(arguments)
    finally:
        os._exit(code)


def main(kinds: list[str]) -> int:
    torch.set_num_threads(1)
    os.environ["LC_ALL"] = "C.UTF-8"
    counts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            loopscope.cli.main(["analyze", "demo:injected", "--out", str(whole), "--text", "one two three", *ANALYZE])
        makers = (configs, tokenizers, templates, prompts, options, trajectories, sweeps, training)
        faults = [*(fault for make in makers for fault in make()), *studies(whole)]
        for number, fault in enumerate(faults):
            if kinds and not any(kind in fault.kind for kind in kinds):
                continue
            folder = Path(place) / f"{number}" / "f"
            folder.mkdir(parents=True)
            counts[fault.kind] += 1
            problem = answered(fault, folder)
            if problem:
                wrong[fault.kind] += 1
                print(f"{fault.kind}, {fault.name}: {problem}", flush=True)
            shutil.rmtree(folder.parent)
    print(f"{'kind':16s} {'tried':>6s} {'wrong':>6s}")
    for kind, count in counts.items():
        print(f"{kind:16s} {count:6d} {wrong[kind]:6d}")
    print(f"{'all':16s} {counts.total():6d} {wrong.total():6d}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
