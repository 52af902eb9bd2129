"""What a command is done to, at any moment, and what has to be true of it then; `crash` runs these."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import xarray

from fault_inputs import status_of
from loopscope import Study

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
"""Of Python's audit events, those of files."""
NEEDS_ROOM = ("os.mkdir", "os.rename")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PAGE, LONGEST, PATIENCE = 4096, 600, 300
NOBODY = 65534
Before = Callable[[], None]
Fault = Callable[[str, str], None]
"""What is done before an event with a path."""


class Command(NamedTuple):
    """What is done again and again."""

    name: str
    arguments: Callable[[Path], list[str]]
    """Given its folder."""
    times: int = 50
    """That a campaign of random moments tries it."""
    workers: int = 0


class Child:
    """A command in a fork, in a session of its own; `before` is done there first."""

    def __init__(self, arguments: list[str], before: Before = lambda: None) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - closed when it is over
        self.started = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            self._become(arguments, before)

    def _become(self, arguments: list[str], before: Before) -> None:
        code = 99
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(self.said.fileno(), 2)
            # What is started in the background is told to ignore these.
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            before()
            code = status_of(arguments)
        finally:
            os._exit(code)

    def over(self) -> bool:
        """Without waiting; a child stays a zombie until `end`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self) -> tuple[int, str]:
        """Status, negative after a signal that killed it, and what it said."""
        deadline = time.monotonic() + PATIENCE
        while not self.over():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.said.seek(0)
        with self.said:
            return code, self.said.read().decode(errors="replace")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def sleep_until(self, seconds: float) -> None:
        """After its start, or its end."""
        while time.monotonic() < self.started + seconds and not self.over():
            time.sleep(0.001)


def at_operation(out: Path, number: int, then: Fault) -> None:
    """Before the operation of that number on a file below `out`, and each that follows, `then` is done."""
    count = 0

    def hook(event: str, details: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(details[0]).startswith(str(out)):
            count += 1
            if count >= number:
                then("write" if event == "open" and int(str(details[2] or 0)) & WRITES else event, str(details[0]))

    sys.addaudithook(hook)


def kill(event: str, path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(event: str, path: str) -> None:
    if event == "write" or event in NEEDS_ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def read_only(event: str, path: str) -> None:
    if event != "open":
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


class Found(NamedTuple):
    """What a command has made."""

    studies: dict[str, xarray.Dataset]
    weights: dict[str, bytes]
    names: set[str]


def found(out: Path) -> Found:
    def named(pattern: str) -> Iterator[tuple[str, Path]]:
        return ((str(path.relative_to(out)), path) for path in out.rglob(pattern))

    return Found(
        {name: Study.load(path.parent).dataset for name, path in named("study.nc")},
        {name: path.read_bytes() for name, path in named("model.safetensors")},
        {name for name, path in named("*") if path.is_file()},
    )


def differences(one: Found, other: Found) -> str:
    if one.names != other.names:
        return f"files {sorted(one.names ^ other.names)}"
    studies = one.studies.keys() == other.studies.keys()
    alike = studies and all(one.studies[name].identical(other.studies[name]) for name in one.studies)
    return "" if alike and one.weights == other.weights else "other numbers"


def left_over(out: Path) -> list[str]:
    """Temporary files, locks, and shards beside a finished study."""
    left = [path for pattern in (".*.part", ".lock") for path in out.rglob(pattern)]
    for manifest in out.rglob("manifest.json"):
        if json.loads(manifest.read_text())["status"] == "complete":
            left += manifest.parent.glob("shards")
    return [str(path.relative_to(out)) for path in left]


class Campaign:
    """Counts of one command under one kind of fault."""

    def __init__(self, command: Command, place: Path, quick: bool) -> None:
        self.command, self.place, self.quick = command, place, quick
        self.random = random.Random(command.name)
        whole = place / "whole"
        reader, writer = os.pipe()

        def tell(event: str, path: str) -> None:
            os.write(writer, b"x")

        code, said = Child(command.arguments(whole), partial(at_operation, whole, 0, tell)).end()
        assert code == 0, said
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            self.operations = len(pipe.read())
        again = Child(command.arguments(place / "timed"))
        assert again.end()[0] == 0
        self.seconds = time.monotonic() - again.started
        self.whole = found(whole)
        assert not left_over(whole), left_over(whole)
        problem = differences(found(place / "timed"), self.whole)
        assert not problem, problem
        self.wrong = 0

    def moments(self) -> Iterator[tuple[Path, float]]:
        """Folders, and seconds at random in which the command is not over."""
        for number in range(min(4, self.command.times) if self.quick else self.command.times):
            yield self.place / f"m{number}", self.random.uniform(0, self.seconds)

    def stages(self) -> Iterator[tuple[Path, int]]:
        """Folders and operations."""
        for number in range(1, self.operations + 1, max(1, self.operations // 4) if self.quick else 1):
            yield self.place / f"o{number}", number

    def blame(self, what: str, problem: str) -> None:
        if problem:
            self.wrong += 1
            print(f"{self.command.name}, {what}: {problem}", flush=True)

    def check(self, what: str, ended: tuple[int, str], allowed: tuple[int, ...], out: Path, *, tidy: bool) -> None:
        """How it ended, and that the same command then gives the same; one count of what is wrong."""
        code, said = ended
        last = (said.strip().splitlines() or [""])[-1]
        problem = ""
        if code not in allowed:
            problem = f"status {code}: {said[-1500:]}"
        elif "Traceback" in said or len(last) > LONGEST + 20 or (code > 0 and not last.startswith("loopscope: ")):
            problem = f"it said {said[-1500:]}"
        elif tidy and out.exists() and left_over(out):
            problem = f"left {left_over(out)}"
        code, said = Child(self.command.arguments(out)).end()
        if code:
            problem = problem or f"again: status {code}: {said[-1500:]}"
        else:
            problem = problem or differences(found(out), self.whole)
        shutil.rmtree(out)
        self.blame(what, problem)

    # Each returns (tried, how many of these the fault met).

    def kills(self) -> tuple[int, int]:
        tried = met = 0
        for out, number in self.stages():
            ended = Child(self.command.arguments(out), partial(at_operation, out, number, kill)).end()
            tried, met = tried + 1, met + (ended[0] < 0)
            self.check(f"killed at operation {number}", ended, (0, -signal.SIGKILL), out, tidy=False)
        return tried, met

    def failing(self, fail: Fault) -> tuple[int, int]:
        tried = met = 0
        for out, number in self.stages():
            ended = Child(self.command.arguments(out), partial(at_operation, out, number, fail)).end()
            tried, met = tried + 1, met + (ended[0] > 0)
            self.check(f"{fail.__name__} from operation {number}", ended, (0, 2), out, tidy=fail is full)
        return tried, met

    def small_disk(self) -> tuple[int, int]:
        """A disk of so many pages, in memory, until one is large enough."""
        tried = met = 0
        with _disk(self.place / "disk") as resize:
            if resize is None:
                return 0, 0
            size = 0
            while True:
                size += max(1, size // 4) if self.quick else 1 if size < 16 else 4
                resize(size)
                out = self.place / "disk" / "out"
                ended = Child(self.command.arguments(out)).end()
                tried, met = tried + 1, met + (ended[0] > 0)
                resize(2**16)
                self.check(f"a disk of {size} pages", ended, (0, 2), out, tidy=True)
                if not ended[0]:
                    return tried, met

    def random_kills(self) -> tuple[int, int]:
        tried = met = 0
        for out, moment in self.moments():
            child = Child(self.command.arguments(out))
            child.sleep_until(moment)
            workers = psutil.Process(child.pid).children(recursive=True)
            child.signal(signal.SIGKILL)
            ended = child.end()
            tried, met = tried + 1, met + (ended[0] < 0)
            self.check(f"killed after {moment:.3f} s", ended, (0, -signal.SIGKILL), out, tidy=False)
            self.blame("orphans", _running(workers))
        return tried, met

    def random_worker_kills(self) -> tuple[int, int]:
        tried = met = 0
        for out, moment in self.moments():
            child = Child(self.command.arguments(out))
            child.sleep_until(moment)
            workers = _workers(child)
            while not workers and not child.over():
                time.sleep(0.001)
                workers = _workers(child)
            if workers:
                self.random.choice(workers).kill()
            ended = child.end()
            tried, met = tried + 1, met + ("A worker died" in ended[1])
            self.check(f"a worker killed after {moment:.3f} s", ended, (0,), out, tidy=True)
        return tried, met

    def signals(self) -> tuple[int, int]:
        return self._signals(second=False)

    def two_signals(self) -> tuple[int, int]:
        return self._signals(second=True)

    def _signals(self, *, second: bool) -> tuple[int, int]:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        tried = met = 0
        for index, (out, moment) in enumerate(self.moments()):
            number = numbers[index % 3]
            reader, writer = os.pipe()
            child = Child(self.command.arguments(out), partial(_say_when_heard, writer))
            os.close(writer)
            os.read(reader, 1)
            child.sleep_until(moment)
            workers = psutil.Process(child.pid).children(recursive=True)
            child.signal(number)
            if second:
                time.sleep(self.random.choice((0.0, 0.01, 0.1)))
                child.signal(number)
            ended = child.end()
            os.close(reader)
            tried, met = tried + 1, met + (ended[0] > 0)
            what = f"{number.name}{' twice' if second else ''} after {moment:.3f} s"
            self.check(what, ended, (0, 128 + number), out, tidy=True)
            self.blame("orphans", _running(workers))
        return tried, met

    def together(self) -> tuple[int, int]:
        """The second one a moment later: one of them refuses, or finds it done."""
        tried = met = 0
        for out, moment in self.moments():
            one = Child(self.command.arguments(out))
            one.sleep_until(moment)
            other = Child(self.command.arguments(out))
            ended, refused = one.end(), other.end()
            if ended[0]:
                ended, refused = refused, ended
            tried, met = tried + 1, met + (refused[0] == 2)
            if refused[0]:
                busy = "Another loopscope process" in refused[1] and refused[0] == 2
                self.blame("together", "" if busy else refused[1][-1500:])
            self.check(f"two, {moment:.3f} s apart", ended, (0,), out, tidy=True)
        return tried, met

    def forbidden(self) -> tuple[int, int]:
        """A folder that its user may not write to, and a parent of which this is so: empty, and finished."""
        made = self.place / "made"
        Child(self.command.arguments(made)).end()
        bare = self.place / "bare"
        bare.mkdir()
        tried = met = 0
        for out in (bare, bare / "new", made):
            before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            for path in (out, *out.rglob("*")):
                if path.exists():
                    path.chmod(0o555 if path.is_dir() else 0o444)
            code, said = Child(self.command.arguments(out), _as_nobody).end()
            after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            tried, met = tried + 1, met + (code == 2)
            right = code in (0, 2) and before == after and "Traceback" not in said
            self.blame(f"forbidden {out.name}", "" if right else f"status {code}: {said[-1500:]}")
        return tried, met


def _say_when_heard(writer: int) -> None:
    """Signals come when the command hears them: a process that is still being started knows nothing of loopscope."""
    install = signal.signal

    def heard(number: int, handler: object) -> object:
        before = install(number, handler)  # type: ignore[arg-type]
        if number == signal.SIGHUP:
            os.write(writer, b"x")
            signal.signal = install
        return before

    signal.signal = heard  # type: ignore[assignment]


def _workers(child: Child) -> list[psutil.Process]:
    """Those that are at work."""
    try:
        return [each for each in psutil.Process(child.pid).children() if "engine.worker" in " ".join(each.cmdline())]
    except psutil.Error:
        return []


def _running(processes: list[psutil.Process]) -> str:
    """Those that are still there after two seconds."""
    _, alive = psutil.wait_procs(processes, timeout=2)
    return f"{len(alive)} processes live on" if alive else ""


@contextmanager
def _disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """A file system in memory; what is yielded gives it so many pages. None where none can be made."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return

    def resize(pages: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", folder], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _as_nobody() -> None:
    if os.getuid() == 0:
        os.setuid(NOBODY)
