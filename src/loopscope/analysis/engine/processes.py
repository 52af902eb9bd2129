"""Worker processes of this machine, fed through pipes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from loopscope.analysis.engine.cpus import cpu_count
from loopscope.analysis.engine.run import Worker, WorkerDiedError
from loopscope.analysis.engine.worker import pack_work, receive, send

_TOLD = 400
"""Characters of what a dying worker wrote."""
_TIDY = 2.0
"""Seconds that a worker has to give up what its work holds, such as the lock of a folder."""


class ProcessEngine:
    """Interpreters of their own, so that a script needs no `if __name__ == "__main__"` around its calls."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def start(self, work: Callable[[Any], Any]) -> Worker:
        return ProcessWorker(pack_work(work), threads=max(1, cpu_count() // self.workers))

    def close(self) -> None:
        """Each worker is closed by itself."""


class ProcessWorker:
    """`python -m loopscope.analysis.engine.worker`; it ends with its standard input, and so with this process."""

    def __init__(self, work: bytes, threads: int) -> None:
        # A file rather than a pipe, which nobody would read while the worker runs.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "loopscope.analysis.engine.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Its share of the CPUs: threads that wait for one another's CPU take many times as long.
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            # Ctrl-C is for the process that waits; it ends its workers itself.
            start_new_session=os.name == "posix",
        )
        try:
            self._send(work)
        except WorkerDiedError:
            self.close()
            raise

    def call(self, item: Any) -> Any:
        self._send(pickle.dumps(item))
        assert self._process.stdout is not None
        answer = receive(self._process.stdout)
        if answer is None:
            raise WorkerDiedError(self._how_it_ended())
        kind, value = pickle.loads(answer)  # noqa: S301 - written by our own process
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_TIDY)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # what was still to be written has nobody to read it
                    continue

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        try:
            send(self._process.stdin, content)
        except (OSError, ValueError):
            raise WorkerDiedError(self._how_it_ended()) from None

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        said = self._last_words()
        if code < 0:
            try:
                return f"process {self._process.pid} was ended by {signal.Signals(-code).name}"
            except ValueError:
                return f"process {self._process.pid} was ended by signal {-code}"
        return f"process {self._process.pid} ended with {code}: {said}"

    def _last_words(self) -> str:
        """Of standard error; nothing once the worker is closed."""
        if self._errors.closed:
            return "it was closed"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:_TOLD] if lines else "it said nothing"
